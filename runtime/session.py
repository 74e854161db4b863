"""Where the engine of a run lives: in this process, or behind Ray."""

from collections.abc import Generator, Iterator
from typing import Protocol

import msgspec
import torch

from ..clusters.scratch import Scratch, reap_runs
from ..learning.randomness import one_thread
from ..policies.policy import Policy
from .config import Config
from .engine import Engine
from .errors import ConfigError, RunError
from .saver import SavePlan
from .service import Fault, Service, Step


class Session(Protocol):
    """Where the engine lives: in process, or behind Ray."""

    def open(self) -> Iterator[str]:
        """Build the engine; what is waited for meanwhile, one sentence each. Nothing else works before."""
        ...

    def step(self, logged: int) -> Step:
        """The next batch of events. ``logged``: events of the run that have been written by now."""
        ...

    def save(self, logged: int, *, timeout_s: float) -> None:
        """Write a checkpoint of the version that closed with the last step, if one did, and no other was written of it."""
        ...

    def weights(self, which: str, *, timeout_s: float) -> dict[str, torch.Tensor]:
        """Weights by name: "best" or "final". Raises ``RunError`` when they are not there within ``timeout_s``."""
        ...

    def close(self) -> None:
        """Release everything that the run made."""
        ...


class InlineSession:
    """The engine in this process, with one torch thread, as a worker has: the same bits as on Ray.

    Between two steps the process is as the caller has it, so other runs, in turn or in other threads, change nothing.
    """

    def __init__(self, config: Config, policy: Policy, save: SavePlan | None = None) -> None:
        """Nothing is built yet."""
        self._config, self._policy, self._save = config, policy, save
        self._scratch = Scratch()
        self._service: Service | None = None

    def open(self) -> Iterator[str]:
        """Build the engine; nothing is waited for."""
        reap_runs()
        with one_thread():
            self._service = Service(Engine(self._config, self._policy, scratch=self._scratch), self._save)
        return iter(())

    def step(self, logged: int) -> Step:
        """The next batch of events."""
        with one_thread():
            return msgspec.msgpack.decode(self._built.step(logged), type=Step)

    def save(self, logged: int, *, timeout_s: float) -> None:
        """Write a checkpoint, if there is something new."""
        with one_thread():
            self._built.save(logged)

    def weights(self, which: str, *, timeout_s: float) -> dict[str, torch.Tensor]:
        """Weights by name, at once."""
        return self._built.weights(which)

    def close(self) -> None:
        """Remove what the engine has on disk."""
        if self._service is not None:
            self._service.close()
        self._scratch.close()

    @property
    def _built(self) -> Service:
        assert self._service is not None, "the session is not open"
        return self._service


def open_session(
    config: Config, policy: Policy, save: SavePlan | None, *, replaces: str = ""
) -> Generator[str, None, Session]:
    """A session of the configured back end; what is waited for until it is open, one sentence each.

    ``replaces``: of the session before it, how its server died. A user's mistake in what is built becomes a ``ConfigError``.
    """
    session = _new_session(config, policy, save, replaces)
    try:
        yield from session.open()
    except BaseException as error:
        session.close()
        if isinstance(error, ValueError):
            raise ConfigError(str(error)) from error
        raise
    return session


def _new_session(config: Config, policy: Policy, save: SavePlan | None, replaces: str) -> Session:
    if config.backend == "inline":
        return InlineSession(config, policy, save)
    from .ray_session import RaySession

    return RaySession(config, policy, save, replaces=replaces)


def exception(fault: Fault) -> Exception:
    """A fault as an exception of this process, with its original trace."""
    if fault.kind == "config":
        return ConfigError(fault.text)
    error = RunError(fault.text, device=fault.device, round_=fault.round, stage=fault.stage)
    error.trace = fault.trace
    return error
