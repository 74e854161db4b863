"""The ledger: every byte that travelled, by direction, kind and device, measured on what was sent."""

from collections import defaultdict
from typing import Literal

Direction = Literal["up", "down"]


class Ledger:
    """Counts bytes and messages. ``kind`` is free text: "weights", "control", "activations", "evaluation", "resync"."""

    def __init__(self) -> None:
        """An empty ledger."""
        self._bytes: dict[tuple[Direction, str, int], int] = defaultdict(int)
        self._messages: dict[tuple[Direction, str, int], int] = defaultdict(int)

    def record(self, direction: Direction, *, kind: str, device: int, num_bytes: int) -> None:
        """One message of ``num_bytes`` to or from ``device``."""
        self._bytes[direction, kind, device] += num_bytes
        self._messages[direction, kind, device] += 1

    def total(self, direction: Direction | None = None, *, kind: str | None = None, device: int | None = None) -> int:
        """Bytes of all messages that match."""
        return sum(
            count
            for (d, k, n), count in self._bytes.items()
            if direction in (None, d) and kind in (None, k) and device in (None, n)
        )

    def messages(self, direction: Direction | None = None) -> int:
        """Number of messages in a direction, or in both."""
        return sum(count for (d, _, _), count in self._messages.items() if direction in (None, d))

    def by_kind(self, direction: Direction) -> dict[str, int]:
        """Bytes of a direction by kind."""
        totals: dict[str, int] = defaultdict(int)
        for (d, kind, _), count in self._bytes.items():
            if d == direction:
                totals[kind] += count
        return dict(sorted(totals.items()))
