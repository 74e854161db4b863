"""What a device's own link carries at a time: what its class declares, or, from a trace on, what that says."""

from bisect import bisect_right
from collections import defaultdict

from msgspec.structs import replace

from ...clusters.fleet import Fleet
from ...clusters.profile import DeviceProfile
from .disruptions import Disruption
from .in_flight import InFlightPlan


class Rates:
    """The devices of a fleet, as they are at a time."""

    def __init__(self, fleet: Fleet) -> None:
        """As declared, where there is no trace."""
        self._declared = fleet.profiles()
        self._rates: defaultdict[int, list[tuple[float, float, float]]] = defaultdict(
            list
        )  # by device, in order of time
        for kind in fleet.classes:
            assert not isinstance(kind.rates, str), "a fleet is loaded with its traces"
            for device, at_s, up, down in kind.rates or ():
                self._rates[device].append((at_s, up, down))

    def update(self, journey: InFlightPlan, *, now_s: float) -> DeviceProfile:
        """The device of a plan as it is now."""
        journey.profile = self.now(journey.plan.device, journey.fate, now_s=now_s)
        return journey.profile

    def now(self, device: int, fate: Disruption, *, now_s: float) -> DeviceProfile:
        """A device now, as its fate makes it."""
        return fate.profile(self._declared_now(device, now_s))

    def _declared_now(self, device: int, now_s: float) -> DeviceProfile:
        declared, rates = self._declared[device], self._rates.get(device, [])
        passed = bisect_right(rates, now_s, key=lambda rate: rate[0])
        if not passed:
            return declared
        _, up, down = rates[passed - 1]
        return replace(declared, up_bytes_per_s=up, down_bytes_per_s=down)
