"""Transfers over links, in simulated time: each device's own rate, and links that several devices share.

Shared capacity is divided max-min fairly (progressive filling; Bertsekas and Gallager, Data Networks, sec. 6.5.2): rates
are recomputed whenever a transfer begins or ends, and a transfer whose rate never changed ends at exactly
``start + bytes / rate``, the figure that an estimate gives.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

Link = Hashable


@dataclass
class Transfer:
    """One message under way. ``cap`` is the device's own rate; ``links`` are the shared links that it crosses."""

    num_bytes: float
    cap: float
    links: tuple[Link, ...]
    started_s: float
    rate: float = 0.0
    remaining: float = field(default=0.0)
    updated_s: float = 0.0
    changed: bool = False  # whether its rate was other than the first at any time

    @property
    def ends_s(self) -> float:
        """When it ends, at its present rate."""
        if not self.changed:
            return self.started_s + self.num_bytes / self.rate
        return self.updated_s + self.remaining / self.rate


class Links:
    """All transfers under way."""

    def __init__(self, capacities: Mapping[Link, float]) -> None:
        """``capacities``: bytes per second of each shared link."""
        self._capacities = dict(capacities)
        self._transfers: dict[int, Transfer] = {}

    def begin(self, key: int, *, num_bytes: int, cap: float, links: Iterable[Link], now_s: float) -> None:
        """A transfer starts."""
        transfer = Transfer(num_bytes, cap, tuple(links), now_s, remaining=num_bytes, updated_s=now_s)
        self._transfers[key] = transfer
        if transfer.links:
            self._share(now_s)
        else:
            transfer.rate = cap

    def end(self, key: int, *, now_s: float) -> float:
        """A transfer is over: the seconds it took."""
        transfer = self._transfers.pop(key)
        if transfer.links:
            self._share(now_s)
        return now_s - transfer.started_s if transfer.changed else transfer.num_bytes / transfer.rate

    def ends(self) -> dict[int, float]:
        """When each transfer ends, as things stand."""
        return {key: transfer.ends_s for key, transfer in self._transfers.items()}

    def _share(self, now_s: float) -> None:
        """Divide the shared links anew."""
        sharing = [t for t in self._transfers.values() if t.links]
        for transfer, rate in zip(sharing, fair_rates(sharing, self._capacities), strict=True):
            if rate == transfer.rate:
                continue
            if transfer.rate:
                transfer.remaining = max(0.0, transfer.remaining - transfer.rate * (now_s - transfer.updated_s))
                transfer.changed = True
            transfer.updated_s, transfer.rate = now_s, rate


def fair_rates(transfers: list[Transfer], capacities: Mapping[Link, float]) -> list[float]:
    """Max-min fair rates: raise all alike, and fix those whose own rate or whose link is exhausted first."""
    rates = [0.0] * len(transfers)
    left = {link: capacities[link] for t in transfers for link in t.links}
    open_ = set(range(len(transfers)))
    while open_:
        crossing = {link: sum(link in transfers[i].links for i in open_) for link in left}
        share = min((left[link] / count for link, count in crossing.items() if count), default=float("inf"))
        capped = [i for i in open_ if transfers[i].cap <= share]
        if capped:  # slower than their share: they leave the rest to the others
            fixed = {i: transfers[i].cap for i in capped}
        else:
            tight = {link for link, count in crossing.items() if count and left[link] / count == share}
            fixed = {i: share for i in open_ if tight & set(transfers[i].links)}
        for i, rate in fixed.items():
            rates[i] = rate
            for link in transfers[i].links:
                left[link] = max(0.0, left[link] - rate)
        open_ -= fixed.keys()
    return rates
