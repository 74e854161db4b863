"""Transfers over network links in simulated time: each device's own rate, and links that several devices share.

Shared capacity is divided max-min fairly (progressive filling; Bertsekas and Gallager, Data Networks, sec. 6.5.2). Rates are
recomputed whenever a transfer begins or ends. A transfer whose rate never changed ends at exactly ``start + bytes / rate``,
the figure that an estimate gives.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile, NonNegative, Positive

LinkId = str | tuple[str, int]
Direction = Literal["up", "down"]
SERVER_LINK: LinkId = ("server", 0)  # cannot collide with the fleet's shared links, whose names are strings


@dataclass
class Transfer:
    """One active transfer. ``cap``: rate of the device's own link in bytes/s. ``links``: the shared links that it crosses."""

    num_bytes: NonNegative
    cap: Positive
    links: tuple[LinkId, ...]
    started_s: float
    rate: float = 0.0
    remaining: float = field(default=0.0)
    updated_s: float = 0.0
    changed: bool = False  # whether its rate has ever differed from the first one

    @property
    def ends_s(self) -> float:
        """When it ends at its current rate."""
        if not self.changed:
            return self.started_s + self.num_bytes / self.rate
        return self.updated_s + self.remaining / self.rate


class NetworkLinks:
    """The active transfers of one direction, and the shared links that they cross."""

    # In a checkpoint.
    SAVED: ClassVar = {"_transfers": dict[int, Transfer], "_first_end": tuple[float, int] | None, "_stale": bool}
    NOT_SAVED = ("_capacities",)

    def __init__(self, capacities: Mapping[LinkId, float]) -> None:
        """``capacities``: bytes per second of each shared link."""
        self._capacities = dict(capacities)
        self._transfers: dict[int, Transfer] = {}
        self._first_end: tuple[float, int] | None = None
        self._stale = False  # whether a transfer has changed since ``_first_end`` was computed

    def begin(self, key: int, *, num_bytes: int, cap: float, links: Iterable[LinkId], now_s: float) -> None:
        """Start a transfer under ``key``."""
        transfer = Transfer(num_bytes, cap, tuple(links), now_s, remaining=num_bytes, updated_s=now_s)
        assert key not in self._transfers, f"{key} has an active transfer already"
        self._transfers[key] = transfer
        self._stale = True
        if transfer.links:
            self._update_rates(now_s)
        else:
            transfer.rate = cap

    def end(self, key: int, *, now_s: float) -> float:
        """Remove a transfer that is complete or cancelled; returns the seconds that it took."""
        transfer = self._transfers.pop(key)
        self._stale = True
        if transfer.links:
            self._update_rates(now_s)
        return now_s - transfer.started_s if transfer.changed else transfer.num_bytes / transfer.rate

    def transferred_bytes(self, key: int, *, now_s: float) -> int:
        """Bytes of an active transfer that have been transferred by now."""
        transfer = self._transfers[key]
        left = transfer.remaining - transfer.rate * (now_s - transfer.updated_s)
        return min(int(transfer.num_bytes), max(0, int(transfer.num_bytes - left)))

    def ends(self) -> dict[int, float]:
        """When each transfer ends at the current rates."""
        return {key: transfer.ends_s for key, transfer in self._transfers.items()}

    def first(self) -> tuple[float, int] | None:
        """End and key of the transfer that ends first at the current rates; ties by key. None: there is none."""
        if self._stale:
            ends = [(transfer.ends_s, key) for key, transfer in self._transfers.items()]
            self._first_end, self._stale = min(ends, default=None), False
        return self._first_end

    def _update_rates(self, now_s: float) -> None:
        """Divide the shared links anew."""
        sharing = [t for t in self._transfers.values() if t.links]
        for transfer, rate in zip(sharing, fair_rates(sharing, self._capacities), strict=True):
            if rate == transfer.rate:
                continue
            if transfer.rate:
                transfer.remaining = max(0.0, transfer.remaining - transfer.rate * (now_s - transfer.updated_s))
                transfer.changed = True
            transfer.updated_s, transfer.rate = now_s, rate


def fair_rates(transfers: Sequence[Transfer], capacities: Mapping[LinkId, float]) -> list[float]:
    """Max-min fair rates: raise all rates equally, and fix a transfer once its own cap or one of its links is exhausted.

    Transfers with the same cap and links have the same rate, so they are computed as one group.
    """
    groups = [(t.cap, t.links) for t in transfers]
    unfixed = Counter(groups)
    rates = dict.fromkeys(unfixed, 0.0)
    left = {link: capacities[link] for _, links in unfixed for link in links}
    while unfixed:
        crossing: dict[LinkId, int] = dict.fromkeys(left, 0)
        for (_, links), number in unfixed.items():
            for link in links:
                crossing[link] += number
        share = min((left[link] / number for link, number in crossing.items() if number), default=float("inf"))
        fixed = {group: group[0] for group in unfixed if group[0] <= share}  # limited by their own caps
        if not fixed:
            tight = {link for link, number in crossing.items() if number and left[link] / number == share}
            fixed = {group: share for group in unfixed if not tight.isdisjoint(group[1])}
        for group, rate in fixed.items():
            rates[group] = rate
            number = unfixed.pop(group)
            for link in group[1]:
                left[link] = max(0.0, left[link] - rate * number)
    return [rates[group] for group in groups]


def capacities(fleet: Fleet, direction: Direction) -> dict[LinkId, float]:
    """Bytes per second of every shared link: those of the fleet, and the server's and the hosts' where they are limited."""
    name = f"{direction}_bytes_per_s"
    found: dict[LinkId, float] = {link: getattr(shared, name) for link, shared in fleet.shared_links.items()}
    if (server := getattr(fleet.server, name)) is not None:
        found[SERVER_LINK] = server
    if (host := getattr(fleet.hosts, name)) is not None:
        found |= {host_link(number): host for number in range(fleet.hosts.count)}
    return found


def crossed_links(fleet: Fleet, profile: DeviceProfile, direction: Direction, *, to: LinkId) -> tuple[LinkId, ...]:
    """The shared links between a device and the server or a host, whose own link is ``to``."""
    limits = fleet.server if to == SERVER_LINK else fleet.hosts
    own = (profile.shared_link,) if profile.shared_link else ()
    return own if getattr(limits, f"{direction}_bytes_per_s") is None else (*own, to)


def host_link(number: int) -> LinkId:
    """The link of a partition host, which all of its devices share."""
    return "host", number


def uncontended_rate(own: float, *shared: float | None) -> float:
    """The rate of a transfer that is alone on its links: the slowest of them. None: not limited."""
    return min([own, *(rate for rate in shared if rate is not None)])
