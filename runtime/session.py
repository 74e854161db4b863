"""Where the engine of a run lives: in this process, or behind Ray."""

from typing import Protocol

import msgspec
import torch

from ..learning.randomness import one_thread
from ..policies.policy import Policy
from .config import Config
from .engine import Engine
from .errors import ConfigError, RunError
from .saver import SavePlan
from .service import Fault, Service, Step


class Session(Protocol):
    """Where the engine lives: in process, or behind Ray."""

    def step(self) -> Step:
        """The next batch of events."""
        ...

    def save(self, *, timeout_s: float) -> None:
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
        """Build the engine."""
        with one_thread():
            self._service = Service(Engine(config, policy), save)

    def step(self) -> Step:
        """The next batch of events."""
        with one_thread():
            return msgspec.msgpack.decode(self._service.step(), type=Step)

    def save(self, *, timeout_s: float) -> None:
        """Write a checkpoint, if there is something new."""
        with one_thread():
            self._service.save()

    def weights(self, which: str, *, timeout_s: float) -> dict[str, torch.Tensor]:
        """Weights by name, at once."""
        return self._service.weights(which)

    def close(self) -> None:
        """Remove what the engine has on disk."""
        self._service.close()


def open_session(config: Config, policy: Policy, save: SavePlan | None) -> Session:
    """A session of the configured back end; a user's mistake in what it builds becomes a ``ConfigError``."""
    try:
        if config.backend == "inline":
            return InlineSession(config, policy, save)
        from .ray_session import RaySession

        return RaySession(config, policy, save)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def exception(fault: Fault) -> Exception:
    """A fault as an exception of this process, with its original trace."""
    if fault.kind == "config":
        return ConfigError(fault.text)
    error = RunError(fault.text, device=fault.device, round_=fault.round, stage=fault.stage)
    error.trace = fault.trace
    return error
