"""Which partition hosts are silent. A host that hangs (stopped, in a deadlock, on a disk that does not answer) leaves its
devices waiting, and it is not their fault.

Every host is asked for a sign of life now and then. It answers in its turn, after all that it was asked before: so silent is
one from which nothing at all has come since, and that is stuck after ``seconds``.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

_A_SIGN_EVERY = 0.25  # of the seconds


class HostWatch:
    """Signs of life, by number of the host."""

    def __init__(self, seconds: float | None, *, now: Callable[[], float] = time.monotonic) -> None:
        """``seconds``: real ones without an answer; None: any."""
        self.seconds, self._now = seconds, now
        self._asked: dict[int, Any] = {}
        self._heard: dict[int, float] = {}  # when something came, or when the first sign was asked for

    def ask(self, actors: Mapping[int, Any]) -> list[Any]:
        """Ask those whose turn it is; the references of all signs that have yet to come."""
        if self.seconds is None:
            return []
        now = self._now()
        for number, actor in actors.items():
            if number not in self._asked and now - self._heard.get(number, 0.0) >= self.seconds * _A_SIGN_EVERY:
                self._asked[number] = actor.sign.remote()
                self._heard[number] = now
        return list(self._asked.values())

    def came(self, reference: Any) -> bool:
        """Whether this is a sign, which has come."""
        for number, asked in self._asked.items():
            if asked is reference:
                del self._asked[number]
                self.heard(number)
                return True
        return False

    def heard(self, number: int) -> None:
        """Something has come from a host."""
        self._heard[number] = self._now()

    def is_silent(self, number: int) -> bool:
        """Whether it owes a sign."""
        return number in self._asked

    def left_s(self) -> float | None:
        """Seconds until one is stuck, or is to be asked; None: never."""
        if self.seconds is None or not self._heard:
            return None
        now = self._now()
        shares = {number: 1.0 if number in self._asked else _A_SIGN_EVERY for number in self._heard}
        return max(0.0, min(self._heard[number] + self.seconds * share - now for number, share in shares.items()))

    def stuck(self) -> list[int]:
        """Those that have been silent for too long."""
        if self.seconds is None:
            return []
        now = self._now()
        return [number for number in self._asked if now - self._heard[number] >= self.seconds]

    def forget(self, number: int) -> None:
        """A host is gone."""
        self._asked.pop(number, None)
        self._heard.pop(number, None)
