"""A session executes the engine of a run: in this process, or in an actor on Ray."""

from collections.abc import Generator, Iterator, Mapping
from typing import Protocol

from ...comms.codec import Array
from ...policies.policy import Policy
from ..configuration.config import Config
from ..errors import ConfigError
from .save_plan import SavePlan
from .step import EventBatch


class Session(Protocol):
    """Executes the engine of a run. ``open`` comes first, ``close`` last."""

    def open(self) -> Iterator[str]:
        """Build the engine; yields what is waited for meanwhile, one sentence each."""
        ...

    def step(self, logged: int) -> EventBatch:
        """The next batch of events. ``logged``: how many events of the run have been written to its log."""
        ...

    def save(self, logged: int, *, timeout_s: float) -> None:
        """Write a checkpoint of the version that closed with the last step, if one closed and it has none yet."""
        ...

    def weights(self, which: str, metadata: Mapping[str, str], *, timeout_s: float) -> Array:
        """The "best" or "final" weights, as the bytes of a safetensors file with ``metadata``.

        Raises ``RunError`` if they do not arrive within ``timeout_s``.
        """
        ...

    def close(self) -> None:
        """Release all that the run created."""
        ...


def open_session(
    config: Config, policy: Policy, save: SavePlan | None, *, replaces: bool = False
) -> Generator[str, None, Session]:
    """Open a session on the configured back end; yields what is waited for, one sentence each.

    ``replaces``: whether its server replaces one that died. A ``ValueError`` becomes a ``ConfigError``.
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


def _new_session(config: Config, policy: Policy, save: SavePlan | None, replaces: bool) -> Session:
    if config.backend == "inline":
        from .inline_session import InlineSession  # imported here, since one needs torch and the other Ray

        return InlineSession(config, policy, save)
    from .ray_connection import Connection

    connection = Connection(config, policy)  # starts a local Ray, which takes longer than the imports below
    try:
        from .ray_session import RaySession

        return RaySession(config, policy, save, connection=connection, replaces=replaces)
    except BaseException:
        connection.close()
        raise
