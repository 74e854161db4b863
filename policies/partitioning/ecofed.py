"""EcoFed as a policy: a frozen trunk, of which devices run the first blocks forward, and hosts that train what follows.

Wu, Ullah, Rodgers, Kilpatrick, Spence, Varghese, "EcoFed: Efficient Communication for DNN Partitioning-based Federated
Learning", IEEE TPDS 35(3), 2024, arXiv 2304.05495. Nothing but activations with their labels travels from devices. Where we
depart: the trunk runs with stored statistics, so that what leaves it depends on the sample alone (there, on the batch);
codes are unsigned, of ``bits`` bits for each channel, and entropy coded (there, signed 8 bit for the whole tensor).

Acts on the plans of the policies before it in a chain.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from ...comms.codec import CodecSpec
from ...learning.parts.part import Part
from ...learning.spec import Count
from ..checks.fields import check_fields
from ..decision import Decision
from ..plan import Plan, Split
from ..policy import NEEDS_PLANS, State
from ..selection.draw import uniform_order
from ..view import View
from .activation_codec import Bits, activation_codec, check_bits
from .buffered_views import BufferedView, newest_views
from .cheapest_cut import AUTO, ONE_CUT, WHOLE_GRADIENT, allowed_cuts, cheapest


@dataclass(frozen=True)
class EcoFed:
    """Behind block ``cut`` of the model ("" for the shallowest allowed), or "auto": each device where its upload is shortest.

    ``first``: last block of the shallowest cut allowed ("": the model's first block): what leaves few blocks can be inverted.
    ``depth``: last block of the frozen trunk, at the cut or behind it ("": the cut); hosts run what is between frozen.
    ``period``: every so many rounds devices upload; in those between hosts train on as many views drawn from all that they
    have buffered, and devices that have none upload where there are too few. ``uploads`` "views": in every round, one of
    ``period`` of the cohort's devices uploads, those that have no view first, then those with the oldest, if it is
    ``refresh`` rounds old (0: one view for each device, as in Ampere, arXiv 2507.07130). ``window``: packets that may be
    under way. ``bits``: of a code (0: float32, and not coded at all).
    """

    cut: str = ""
    first: str = ""
    depth: str = ""
    period: Count = 2
    uploads: Literal["period", "views"] = "period"
    refresh: Annotated[int, msgspec.Meta(ge=0)] = 0
    window: Count = 8
    bits: Bits = 4

    writes: ClassVar[tuple[str, ...]] = ("part", "split", "plans")  # replays are for devices of its own choice
    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    forbids_before: ClassVar[Mapping[str, str]] = ONE_CUT | {
        "deadline_s": "which has some of them upload views, and a view must be whole; allowed: the other order"
    }
    forbids_behind: ClassVar[Mapping[str, str]] = ONE_CUT
    forbids_settings: ClassVar[Mapping[str, str]] = WHOLE_GRADIENT
    fits_plans: ClassVar[bool] = True
    freezes: ClassVar[bool] = True
    needs_kinds: ClassVar[tuple[str, ...]] = ("activations", "labels")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        check_bits(self.bits)
        if self.cut == AUTO and not self.depth:
            raise ValueError(
                f"cut is {AUTO!r} and depth is ''; depth must name the last block of the trunk, one for all"
            )
        if self.refresh and self.uploads != "views":
            raise ValueError(f"refresh is {self.refresh}; it counts only where uploads is 'views'")

    @property
    def cuts(self) -> tuple[str, ...]:
        """Where it may cut, so that a cut that is not clean is found before the run."""
        return tuple(name for name in (self.first, self.cut, self.depth) if name and name != AUTO)

    @property
    def needs_codecs(self) -> tuple[str, ...]:
        """What every device must run."""
        return tuple(spec.name for spec in self._codec)

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Cut the plans of those who upload, and put replays in place of the others."""
        if not decision.plans:
            return decision, state
        wanted, rng, left_out = len(decision.plans), np.random.default_rng(view.seed), list[tuple[int, str]]()
        everybody = self.uploads == "period" and view.version % self.period == 0
        held = {} if everybody else newest_views(view)
        plans: list[Plan] = []
        if self.uploads == "views":
            plans = self._first_that_fit(
                view, self._due(decision.plans, held, rng), -(-wanted // self.period), left_out
            )
        asked = {plan.device for plan in plans} | {device for device, _ in left_out}
        drawn = uniform_order(rng, sorted(held.keys() - asked))[: wanted - len(plans)]
        plans += [self._replay(view.new_plan(device), view.hosts, held[device]) for device in drawn]
        new = [plan for plan in decision.plans if plan.device not in held and plan.device not in asked]
        plans += self._first_that_fit(view, new, wanted - len(plans), left_out)
        plans.sort(key=lambda plan: plan.device)
        return replace(decision, plans=tuple(plans), left_out=(*decision.left_out, *left_out)), state

    def _due(self, plans: Sequence[Plan], held: Mapping[int, BufferedView], rng: np.random.Generator) -> Iterator[Plan]:
        """Whose turn it is to upload: who has nothing buffered, in random order, then the oldest that are old enough."""
        by_device = {plan.device: plan for plan in plans}
        order = uniform_order(rng, sorted(by_device))
        yield from (by_device[device] for device in order if device not in held)
        old = [device for device in order if device in held and 0 < self.refresh <= held[device].age]
        yield from (by_device[device] for device in sorted(old, key=lambda device: -held[device].age))

    def _first_that_fit(
        self, view: View, plans: Iterable[Plan], count: int, left_out: list[tuple[int, str]]
    ) -> list[Plan]:
        """Uploads of the first ``count`` devices that have the memory; the others that were asked are noted."""
        found: list[Plan] = []
        for plan in plans:
            if len(found) >= count:
                break
            blocks = plan.part.blocks
            cuts = allowed_cuts(blocks, self.cut, first=self.first, last=self.depth)
            upload = cheapest(view, [self._upload(plan, cut, view.hosts) for cut in cuts])
            if isinstance(upload, str):
                left_out.append((plan.device, upload))
            else:
                found.append(upload)
        return found

    def _upload(self, plan: Plan, cut: str, hosts: int) -> Plan:
        """One plan whose device sends what leaves its part of the trunk."""
        return self._split(plan, hosts, cut, None).with_(f"ecofed: upload behind {cut}")

    def _replay(self, plan: Plan, hosts: int, view: BufferedView) -> Plan:
        """One plan of a host alone, on what the device uploaded before."""
        return self._split(plan, hosts, view.cut, view.name).with_(f"ecofed: replay of view {view.name}")

    def _split(self, plan: Plan, hosts: int, cut: str, name: str | None) -> Plan:
        """A plan with a frozen trunk."""
        names = plan.part.blocks
        front = names[: names.index(cut) + 1]
        split = Split(
            cut=cut,
            depth=self.depth or cut,
            host=plan.device % hosts,
            mode="ecofed",
            window=self.window,
            view=name,
            codec_up=self._codec,
        )
        return replace(plan, part=Part(blocks=front, trained=()), split=split)

    @property
    def _codec(self) -> tuple[CodecSpec, ...]:
        """The chain for activations."""
        return activation_codec(self.bits)
