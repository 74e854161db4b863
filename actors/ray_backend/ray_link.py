"""A device's way to its partition host on Ray."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayTaskError

from ...comms.codec import Array
from ...comms.ray_channel import store_told
from ..messages.host_messages import StreamFault
from .faults import DIED, first_line


@dataclass(frozen=True)
class Way:
    """A device's way to its host, as it travels to the worker: the actor, and what tells that the slot is there."""

    host: Any
    plan_id: int
    attempt: int
    begun: list[Any]  # in a list, so that Ray hands over the reference and does not wait for it


@dataclass
class RayLink:
    """The way to the host, in the worker."""

    way: Way
    under_way: deque[Any] = field(default_factory=deque)
    answers: deque[Array] = field(default_factory=deque)

    @store_told()
    def send(self, packet: Array, *, window: int) -> None:
        """Send a packet, once fewer than ``window`` are under way."""
        if self.way.begun:  # nothing may come before the slot is there
            self._wait(self.way.begun.pop())
        while len(self.under_way) >= window:
            self._taken()
        self.under_way.append(self.way.host.call.remote("take", self.way.plan_id, self.way.attempt, packet))

    def answer(self) -> Array:
        """Wait until the host has answered the oldest packet."""
        while not self.answers:
            self._taken()
        return self.answers.popleft()

    def flush(self) -> None:
        """Wait until the host has taken all."""
        while self.under_way:
            self._taken()

    def _taken(self) -> None:
        """Wait until the host has taken the oldest packet, and keep what it answers."""
        self.answers += self._wait(self.under_way.popleft())

    @store_told()
    def _wait(self, reference: Any) -> Any:
        """What a call gave; raises ``StreamFault``."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, StreamFault) else error from None
        except DIED as error:
            raise StreamFault(f"its partition host died: {first_line(error)}") from error
