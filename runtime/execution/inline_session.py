"""A session in this process."""

from collections.abc import Iterator, Mapping

import msgspec

from ...clusters.scratch import Scratch, reap_runs
from ...comms.codec import Array
from ...learning.randomness import torch_threads
from ...policies.policy import Policy
from ..configuration.config import Config
from ..engine.engine import Engine
from .save_plan import SavePlan
from .service import Service
from .step import EventBatch


class InlineSession:
    """The engine in this process, with as many torch threads as a Ray worker: the results are the same to the bit.

    Settings of the process are restored between two steps, so that several runs, in turn or in threads, do not interfere.
    """

    def __init__(self, config: Config, policy: Policy, save: SavePlan | None = None) -> None:
        """Nothing is built before ``open``."""
        self._config, self._policy, self._save = config, policy, save
        self._scratch = Scratch()
        self._service: Service | None = None

    def open(self) -> Iterator[str]:
        """Build the engine; there is nothing to wait for."""
        reap_runs()
        with torch_threads(self._config.threads):
            self._service = Service(Engine(self._config, self._policy, scratch=self._scratch), self._save)
        return iter(())

    def step(self, logged: int) -> EventBatch:
        """The next batch of events."""
        with torch_threads(self._config.threads):
            return msgspec.msgpack.decode(self._built.step(logged), type=EventBatch)

    def save(self, logged: int, *, timeout_s: float) -> None:
        """Write a checkpoint, if there is something new to write."""
        with torch_threads(self._config.threads):
            self._built.save(logged)

    def weights(self, which: str, metadata: Mapping[str, str], *, timeout_s: float) -> Array:
        """The weights; they are available at once."""
        return self._built.weights(which, metadata)

    def close(self) -> None:
        """End the engine, and remove its temporary files."""
        if self._service is not None:
            self._service.close()
        self._scratch.close()

    @property
    def _built(self) -> Service:
        assert self._service is not None, "the session is not open"
        return self._service
