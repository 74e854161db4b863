"""The engine as the driver uses it, in process or in the server's actor: it returns events in small batches.

driver                         service
step()            ->           runs for a quarter of a second, and never past the end of a round
                  <-           events (msgpack), whether the run is over, the error that ended it
weights("best")   ->  <-       the bytes of a safetensors file
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import safetensors.torch
import torch

from ...comms.codec import Array
from ..engine.engine import Engine
from ..events import AnyEvent, Evaluated, RunStarted, VersionClosed
from .save_plan import SavePlan
from .saver import Saver
from .step import EventBatch, describe

_BATCH_S = 0.25


class Service:
    """Drives an engine, and keeps the best weights so far for the driver to fetch at the end."""

    def __init__(self, engine: Engine, plan: SavePlan | None = None, notices: Sequence[str] = ()) -> None:
        """At the beginning of the run, or at the checkpoint that ``plan`` names. Raises ``ValueError``, ``UnfitCheckpoint``.

        ``notices``: sentences for the operator, before the first event.
        """
        self._engine = engine
        self._best: dict[str, torch.Tensor] | None = None
        self._closed: int | None = None  # the version that closed with the last event
        self._saver = Saver(engine, plan) if plan is not None else None
        if self._saver is not None:
            self._best = self._saver.start()
        resumed = plan is not None and plan.manifest is not None
        notices = (*(plan.notices if plan is not None else ()), *notices)
        self._events: Iterator[AnyEvent] = engine.go_on(notices) if resumed else engine.events(notices)

    def step(self, logged: int) -> bytes:
        """Advance for about a quarter of a second, or to the end of the round or of the start; an ``EventBatch`` in msgpack.

        ``logged``: how many events the driver has written to the log, its own among them. Nothing is in flight between
        synchronous rounds, so a driver that pauses there pauses the run.
        """
        events: list[AnyEvent] = []
        until = time.monotonic() + _BATCH_S
        over, fault = False, None
        try:
            if (
                self._saver is not None
                and self._closed is not None
                and (self._saver.due(self._closed) or self._engine.ends)
            ):
                self.save(logged)
            self._closed = None
            while time.monotonic() < until:
                event = next(self._events, None)
                if event is None:
                    over = True
                    break
                events.append(event)
                self._closed = event.version if isinstance(event, VersionClosed) else None
                if isinstance(event, Evaluated) and event.best:
                    self._best = self._engine.weights()
                if isinstance(
                    event, RunStarted | VersionClosed
                ):  # RunStarted is shown before the first round, however long
                    break
        except Exception as error:  # sent to the driver, which raises it there
            over, fault = True, describe(error)
        return msgspec.msgpack.encode(EventBatch(events=events, over=over, fault=fault))

    def weights(self, which: str, metadata: Mapping[str, str]) -> Array:
        """The "final" (current) weights, or the "best" by evaluation (the current ones before the first evaluation).

        Those of sparse layers are as evaluation uses them; "final.master" and "best.master" are the dense ones that training
        continues from. As the bytes of a safetensors file with ``metadata``, so that a driver that only writes them needs no
        torch.
        """
        name, _, suffix = which.partition(".")
        tensors = self._best if name == "best" and self._best is not None else self._engine.weights()
        tensors = tensors if suffix else self._engine.evaluated_weights(tensors)
        return np.frombuffer(safetensors.torch.save(tensors, metadata=dict(metadata)), np.uint8)

    def save(self, logged: int) -> None:
        """Write a checkpoint of the version that closed with the last event, if one did.

        ``logged``: as in ``step``.
        """
        if self._saver is not None and self._closed is not None:
            self._saver.save(self._closed, events=logged, best=self._best)

    def close(self) -> None:
        """End the workers."""
        self._engine.close()
