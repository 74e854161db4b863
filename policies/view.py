"""The input of a policy: a frozen snapshot of the run. Numbers only: no tensors, no handles, no simulator internals.

Profiles hold what the fleet *declares*, reports what was *measured or charged* so far. The random draws of the simulator
(jitter, dropouts) are never part of a view.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from ..clusters.profile import DeviceProfile
from .estimate import Estimate
from .plan import Plan
from .report import Report

EMPTY: Mapping[int, Report] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class View:
    """A snapshot of the run.

    clock           "virtual" or "wall": whether seconds are simulated or real ones
    time_s          virtual seconds since the start (wall seconds under the wall clock)
    version         of the model; equals the number of closed rounds
    seed            of this decision: a policy's only source of randomness
    profiles        [device] declared profile; devices are numbered from 0
    samples         [device] number of local training samples
    min_samples     training samples that a device needs to take part: 2 where the model cannot be trained on a single one
    statistics      blocks of the global model that have running statistics
    hosts           number of partition hosts, which are numbered from 0
    unreachable     devices that cannot be reached now; a plan for one of them is lost immediately
    in_flight       plans dispatched and not yet ended, by device
    dispatched      plans dispatched on the current version so far (0 means: the round has not begun)
    last_reports    newest report of each device that has taken part
    participation   number of plans that each device has ended, for those that have taken part
    evaluation      newest evaluation of the global model: "accuracy", "loss", ... ; empty before the first
    movement        effective movement by the label of the task that tracks it (ProFL)
    replay          inventory of the replay buffer (EcoFed): (trunk, cut, device, view, age in versions, bytes)
    cached          hashes of the frozen blocks that each device has acknowledged (ProFL)
    links           acknowledged downlink version per device (ResFed), where links have memory
    memory_budgets  learned memory budget in bytes, for devices that ran out of memory below their declared one
    memory_margin   factor on predicted peaks: a plan is admitted if its peak times this fits the budget
    fits_later      a policy behind this one in the chain makes plans that fit memory, so that a selection need not check it
    remaining_s, remaining_bytes   rest of the run's budgets of time and bytes; None without one
    """

    clock: Literal["virtual", "wall"] = "virtual"
    time_s: float
    version: int
    seed: int
    profiles: Sequence[DeviceProfile]
    samples: Sequence[int]
    min_samples: int = 1
    statistics: Set[str] = frozenset()
    hosts: int = 1
    unreachable: Set[int] = frozenset()
    in_flight: Mapping[int, Plan] = field(default_factory=lambda: MappingProxyType({}))
    dispatched: int = 0
    last_reports: Mapping[int, Report] = field(default_factory=lambda: EMPTY)
    participation: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    evaluation: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    movement: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    replay: Sequence[tuple[str, str, int, str, int, int]] = ()
    cached: Mapping[int, Set[str]] = field(default_factory=lambda: MappingProxyType({}))
    links: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    memory_budgets: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    memory_margin: float = 1.0
    fits_later: bool = False
    remaining_s: float | None = None
    remaining_bytes: int | None = None
    plan_maker: Callable[[int], Plan] = field(repr=False)
    estimator: Callable[[int, Plan], Estimate] = field(repr=False)

    @property
    def devices(self) -> range:
        """All device numbers."""
        return range(len(self.profiles))

    def new_plan(self, device: int) -> Plan:
        """The experiment's own plan for a device: whole model, configured training and codecs, fresh id and seed.

        The id is assigned at dispatch (0 until then). The seed depends on the run's seed, the device, the version, and the
        number of plans of this version that the device was sent before, so that a second plan does not repeat the first.
        """
        return self.plan_maker(device)

    def estimate(self, device: int, plan: Plan) -> Estimate:
        """Seconds, bytes, FLOPs and peak memory of a plan on a device, by its declared profile and with idle links.

        The virtual clock charges by the same code, so the estimate is exact for codecs of fixed size when no shared link
        and no partition host is contended. Packets of other codecs are estimated at the size of the last packet of their kind,
        or before the first one at that of random numbers of the same shapes.
        """
        return self.estimator(device, plan)
