"""Transfers over links, in simulated time: each device's own rate, and links that several devices share.

Shared capacity is divided max-min fairly (progressive filling; Bertsekas and Gallager, Data Networks, sec. 6.5.2): rates
are recomputed whenever a transfer begins or ends, and a transfer whose rate never changed ends at exactly
``start + bytes / rate``, the figure that an estimate gives.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile, NonNegative, Positive

Link = str | tuple[str, int]
Direction = Literal["up", "down"]
SERVER_LINK: Link = ("server", 0)  # no name of a shared link, which are texts


@dataclass
class Transfer:
    """One message under way. ``cap`` is the device's own rate; ``links`` are the shared links that it crosses."""

    num_bytes: NonNegative
    cap: Positive
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

    # By a checkpoint.
    SAVED: ClassVar = {"_transfers": dict[int, Transfer], "_first": tuple[float, int] | None, "_stale": bool}
    NOT_SAVED = ("_capacities",)

    def __init__(self, capacities: Mapping[Link, float]) -> None:
        """``capacities``: bytes per second of each shared link."""
        self._capacities = dict(capacities)
        self._transfers: dict[int, Transfer] = {}
        self._first: tuple[float, int] | None = None
        self._stale = False  # whether a transfer has changed since ``_first`` was found

    def begin(self, key: int, *, num_bytes: int, cap: float, links: Iterable[Link], now_s: float) -> None:
        """A transfer starts."""
        transfer = Transfer(num_bytes, cap, tuple(links), now_s, remaining=num_bytes, updated_s=now_s)
        assert key not in self._transfers, f"{key} has a transfer under way already"
        self._transfers[key] = transfer
        self._stale = True
        if transfer.links:
            self._share(now_s)
        else:
            transfer.rate = cap

    def end(self, key: int, *, now_s: float) -> float:
        """A transfer is over: the seconds it took."""
        transfer = self._transfers.pop(key)
        self._stale = True
        if transfer.links:
            self._share(now_s)
        return now_s - transfer.started_s if transfer.changed else transfer.num_bytes / transfer.rate

    def travelled(self, key: int, *, now_s: float) -> int:
        """Bytes of a transfer under way that are there by now."""
        transfer = self._transfers[key]
        left = transfer.remaining - transfer.rate * (now_s - transfer.updated_s)
        return min(int(transfer.num_bytes), max(0, int(transfer.num_bytes - left)))

    def ends(self) -> dict[int, float]:
        """When each transfer ends, as things stand."""
        return {key: transfer.ends_s for key, transfer in self._transfers.items()}

    def first(self) -> tuple[float, int] | None:
        """When and which transfer ends first, as things stand; ties by key. None: nothing is under way."""
        if self._stale:
            ends = [(transfer.ends_s, key) for key, transfer in self._transfers.items()]
            self._first, self._stale = min(ends, default=None), False
        return self._first

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


def fair_rates(transfers: Sequence[Transfer], capacities: Mapping[Link, float]) -> list[float]:
    """Max-min fair rates: raise all alike, and fix those whose own rate or whose link is exhausted first.

    Transfers of one rate of their own over the same links have one rate: they are counted, and worked out, together.
    """
    kinds = [(t.cap, t.links) for t in transfers]
    open_ = Counter(kinds)
    rates = dict.fromkeys(open_, 0.0)
    left = {link: capacities[link] for _, links in open_ for link in links}
    while open_:
        crossing: dict[Link, int] = dict.fromkeys(left, 0)
        for (_, links), number in open_.items():
            for link in links:
                crossing[link] += number
        share = min((left[link] / number for link, number in crossing.items() if number), default=float("inf"))
        fixed = {kind: kind[0] for kind in open_ if kind[0] <= share}  # slower: they leave the rest to the others
        if not fixed:
            tight = {link for link, number in crossing.items() if number and left[link] / number == share}
            fixed = {kind: share for kind in open_ if not tight.isdisjoint(kind[1])}
        for kind, rate in fixed.items():
            rates[kind] = rate
            number = open_.pop(kind)
            for link in kind[1]:
                left[link] = max(0.0, left[link] - rate * number)
    return [rates[kind] for kind in kinds]


def capacities(fleet: Fleet, direction: Direction) -> dict[Link, float]:
    """Bytes per second of all that is shared: the fleet's links, and, where they are limited, the server's and the hosts'."""
    name = f"{direction}_bytes_per_s"
    found: dict[Link, float] = {link: getattr(shared, name) for link, shared in fleet.shared_links.items()}
    if (server := getattr(fleet.server, name)) is not None:
        found[SERVER_LINK] = server
    if (host := getattr(fleet.hosts, name)) is not None:
        found |= {host_link(number): host for number in range(fleet.hosts.count)}
    return found


def crossed(fleet: Fleet, profile: DeviceProfile, direction: Direction, *, to: Link) -> tuple[Link, ...]:
    """The shared links between a device and the end that has link ``to``: the server's, or a host's."""
    limits = fleet.server if to == SERVER_LINK else fleet.hosts
    own = (profile.shared_link,) if profile.shared_link else ()
    return own if getattr(limits, f"{direction}_bytes_per_s") is None else (*own, to)


def host_link(number: int) -> Link:
    """The link of a partition host, which all of its devices share."""
    return "host", number


def own_rate(own: float, *shared: float | None) -> float:
    """The rate of a transfer that is alone on its links."""
    return min([own, *(rate for rate in shared if rate is not None)])
