"""Where the engine of a run lives: in this process, or behind Ray."""

from collections.abc import Generator, Iterator, Mapping
from typing import Protocol

from ...comms.codec import Array
from ...policies.policy import Policy
from ..configuration.config import Config
from ..errors import ConfigError
from .save_plan import SavePlan
from .step import EventBatch


class Session(Protocol):
    """Where the engine lives: in process, or behind Ray."""

    def open(self) -> Iterator[str]:
        """Build the engine; what is waited for meanwhile, one sentence each. Nothing else works before."""
        ...

    def step(self, logged: int) -> EventBatch:
        """The next batch of events. ``logged``: events of the run that have been written by now."""
        ...

    def save(self, logged: int, *, timeout_s: float) -> None:
        """Write a checkpoint of the version that closed with the last step, if one did, and no other was written of it."""
        ...

    def weights(self, which: str, metadata: Mapping[str, str], *, timeout_s: float) -> Array:
        """The "best" or "final" weights, as the bytes of a safetensors file with ``metadata``.

        Raises ``RunError`` when they are not there within ``timeout_s``.
        """
        ...

    def close(self) -> None:
        """Release everything that the run made."""
        ...


def open_session(
    config: Config, policy: Policy, save: SavePlan | None, *, replaces: str = ""
) -> Generator[str, None, Session]:
    """A session of the configured back end; what is waited for until it is open, one sentence each.

    ``replaces``: of the session before it, how its server died. A user's mistake in what is built becomes a ``ConfigError``.
    """
    try:
        session = _new_session(config, policy, save, replaces)
        try:
            yield from session.open()
        except BaseException:
            session.close()
            raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return session


def _new_session(config: Config, policy: Policy, save: SavePlan | None, replaces: str) -> Session:
    if config.backend == "inline":
        from .inline_session import InlineSession  # each here, since one imports torch and the other Ray

        return InlineSession(config, policy, save)
    from .ray_connection import Connection

    connection = Connection(config, policy)  # a local Ray begins to start, which takes longer than what is imported now
    try:
        from .ray_session import RaySession

        return RaySession(config, policy, save, connection=connection, replaces=replaces)
    except BaseException:
        connection.close()
        raise
