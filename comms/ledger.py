"""The ledger: bytes sent, by direction, kind and device, as measured on the packets."""

from collections import defaultdict
from typing import Any, ClassVar, Literal

from .codec import NumBytes

Direction = Literal["up", "down"]


class Ledger:
    """Counts bytes and messages. ``kind`` is any text, e.g. "weights", "control", "activations", "evaluation", "resync"."""

    SAVED: ClassVar[dict[str, Any]] = {  # by a checkpoint
        "_bytes": dict[tuple[Direction, str, int], NumBytes],
        "_by_kind": dict[tuple[Direction, str], NumBytes],
        "_messages": dict[tuple[Direction, str], NumBytes],
    }
    NOT_SAVED = ()

    def __init__(self) -> None:
        """An empty ledger."""
        self._bytes: dict[tuple[Direction, str, int], int] = defaultdict(int)
        self._by_kind: dict[tuple[Direction, str], int] = defaultdict(int)  # read every round, so kept as sums
        self._messages: dict[tuple[Direction, str], int] = defaultdict(int)

    def record(self, direction: Direction, *, kind: str, device: int, num_bytes: int) -> None:
        """Adds one message of ``num_bytes`` to or from ``device``."""
        self._bytes[direction, kind, device] += num_bytes
        self._by_kind[direction, kind] += num_bytes
        self._messages[direction, kind] += 1

    def total(self, direction: Direction | None = None, *, kind: str | None = None, device: int | None = None) -> int:
        """Bytes of all messages that match."""
        if device is None:
            return sum(n for (d, k), n in self._by_kind.items() if direction in (None, d) and kind in (None, k))
        return sum(
            num_bytes
            for (d, k, n), num_bytes in self._bytes.items()
            if n == device and direction in (None, d) and kind in (None, k)
        )

    def messages(self, direction: Direction | None = None, *, kind: str | None = None) -> int:
        """Number of messages that match."""
        return sum(n for (d, k), n in self._messages.items() if direction in (None, d) and kind in (None, k))

    def by_kind(self, direction: Direction) -> dict[str, int]:
        """Bytes of a direction by kind, sorted by kind."""
        return {kind: num_bytes for (d, kind), num_bytes in sorted(self._by_kind.items()) if d == direction}
