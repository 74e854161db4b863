"""Packets between server and devices, in simulated time: after the latency a packet joins its shared links, if any."""

from typing import ClassVar

from ...clusters.fleet import Fleet
from ...policies.estimate import transfer_s
from .in_flight import InFlightPlan
from .links import SERVER_LINK, Direction, Link, Links, capacities, crossed


class Transfers:
    """The packets under way. ``down`` and ``up`` hold those on shared links, among others that are not ours."""

    SAVED: ClassVar = {"down": Links, "up": Links}  # by a checkpoint
    NOT_SAVED = ("_fleet",)

    def __init__(self, fleet: Fleet) -> None:
        """None yet."""
        self.down = Links(capacities(fleet, "down"))
        self.up = Links(capacities(fleet, "up"))
        self._fleet = fleet

    def send(self, journey: InFlightPlan, stage: Direction, num_bytes: int, *, now_s: float) -> float:
        """A packet sets out: the second at which it joins its shared links, or is there."""
        journey.stage, journey.num_bytes, journey.began_s = stage, num_bytes, now_s
        rate, shared = self._way(journey)
        latency_s = journey.profile.latency_s
        if shared:
            journey.sharing = "latency"
            return now_s + latency_s
        journey.transfer_s = transfer_s(num_bytes, bytes_per_s=rate, latency_s=latency_s)
        return now_s + journey.transfer_s

    def join(self, journey: InFlightPlan, *, now_s: float) -> None:
        """A packet joins its shared links."""
        journey.sharing = "under way"
        rate, shared = self._way(journey)
        self._links(journey).begin(journey.plan.id, num_bytes=journey.num_bytes, cap=rate, links=shared, now_s=now_s)

    def landed(self, journey: InFlightPlan, *, now_s: float) -> float:
        """A packet is there: the seconds that it took."""
        if journey.sharing == "under way":
            took_s = self._links(journey).end(journey.plan.id, now_s=now_s)
            journey.transfer_s = journey.profile.latency_s + took_s
            journey.sharing = ""
        return journey.transfer_s

    def break_off(self, journey: InFlightPlan, *, now_s: float) -> int:
        """A packet goes no further, and frees its links: the bytes of it that have travelled."""
        if journey.sharing == "latency":
            return 0
        if journey.sharing == "under way":
            links, key = self._links(journey), journey.plan.id
            came = links.travelled(key, now_s=now_s)
            links.end(key, now_s=now_s)
            return came
        rate, _ = self._way(journey)
        seconds = now_s - journey.began_s - journey.profile.latency_s
        return min(journey.num_bytes, max(0, int(seconds * rate)))

    def _links(self, journey: InFlightPlan) -> Links:
        return self.down if journey.stage == "down" else self.up

    def _way(self, journey: InFlightPlan) -> tuple[float, tuple[Link, ...]]:
        """The device's own rate, and the shared links that a packet crosses."""
        direction: Direction = "down" if journey.stage == "down" else "up"
        rate: float = getattr(journey.profile, f"{direction}_bytes_per_s")
        return rate, crossed(self._fleet, journey.profile, direction, to=SERVER_LINK)
