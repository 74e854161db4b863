"""EcoFed as a policy: devices run the first blocks of a frozen trunk forward, and partition hosts train the blocks behind it.

Wu, Ullah, Rodgers, Kilpatrick, Spence, Varghese, "EcoFed: Efficient Communication for DNN Partitioning-based Federated
Learning", IEEE TPDS 35(3), 2024, arXiv 2304.05495. Devices send only activations with their labels. Where we depart: the trunk
runs with stored statistics, so that an activation depends on its sample alone (there, on the batch); codes are unsigned, of
``bits`` bits for each channel, and entropy coded (there, signed 8 bit for the whole tensor).

It changes the plans of the policies before it in a chain.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from ...comms.codec import CodecSpec
from ...learning.spec import Count
from ..checks.fields import check_fields
from ..checks.statements import UploadPeriod
from ..decision import Decision
from ..plan import Plan, Split
from ..policy import NEEDS_PLANS, State
from ..selection.candidates import uniform_order
from ..view import View
from .cuts import AUTO, ONE_CUT, WHOLE_GRADIENT, Bits, activation_codec, allowed_cuts, cheapest, check_bits

_ONE_TRUNK = {
    "part.width": "whose frozen trunk is the same on all devices; allowed: one of the two",
    "tasks": "whose trunk is frozen, and the task would train it; allowed: one of the two",
}
_NO_TRAINING = {"training.sparsity": "whose devices train nothing; allowed: one of the two"}


@dataclass(frozen=True)
class BufferedView:
    """One complete upload in the buffer of a host: its cut, its id, and its age in versions."""

    cut: str
    name: str
    age: int


def newest_views(view: View) -> dict[int, BufferedView]:
    """The newest buffered view of each idle device."""
    newest: dict[int, BufferedView] = {}
    for _, cut, device, name, age, _ in sorted(view.replay, key=lambda entry: -entry[4]):
        if device not in view.in_flight:
            newest[device] = BufferedView(cut, name, age)
    return newest


@dataclass(frozen=True)
class EcoFed:
    """A cut behind block ``cut`` of the model ("": the shallowest allowed one), or "auto": for each device the fastest upload.

    ``first``: last block of the shallowest cut allowed ("": the model's first block); activations behind few blocks can be
    inverted to inputs. ``depth``: last block of the frozen trunk, at the cut or behind it ("": the cut); the hosts run the
    blocks between cut and depth without training them. ``period``: devices upload in every ``period``-th round; in the
    rounds between these the hosts train on as many views, drawn from all that they have buffered, as the cohort has devices,
    and devices without a view upload where there are too few. ``uploads`` "views": in every round one of ``period`` devices
    of the cohort uploads, first devices without a view, then those with the oldest views that are at least ``refresh``
    rounds old (0: one view for each device, as in Ampere, arXiv 2507.07130). ``window``: packets in flight. ``bits``: of the
    code of activations (0: float32, not coded).
    """

    cut: str = ""
    first: str = ""
    depth: str = ""
    period: Count = 2
    uploads: Literal["period", "views"] = "period"
    refresh: Annotated[int, msgspec.Meta(ge=0)] = 0
    window: Count = 8
    bits: Bits = 4

    writes: ClassVar[tuple[str, ...]] = ("part", "split", "plans")  # it chooses the devices of the replays
    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    forbids_before: ClassVar[Mapping[str, str]] = (
        ONE_CUT
        | _ONE_TRUNK
        | _NO_TRAINING
        | {"deadline_s": "which has some of them upload views, and a view must be whole; allowed: the other order"}
    )
    forbids_behind: ClassVar[Mapping[str, str]] = ONE_CUT | _ONE_TRUNK | _NO_TRAINING
    forbids_settings: ClassVar[Mapping[str, str]] = WHOLE_GRADIENT | {
        "models": "has one frozen trunk, which is the global model's; allowed: empty"
    }
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
        """Blocks behind which it may cut, and the end of the trunk, checked against the model before the run."""
        return tuple(name for name in (self.first, self.cut, self.depth) if name and name != AUTO)

    @property
    def needs_codecs(self) -> tuple[str, ...]:
        """Codecs that every device must run."""
        return tuple(spec.name for spec in self._codec)

    @property
    def trunk_end(self) -> str:
        """Last block of the frozen trunk; "": the model's first block."""
        return self.depth or (self.cut if self.cut != AUTO else "") or self.first

    def upload_period(self, *, devices: int, cohort: int, rounds: int) -> UploadPeriod:
        """Uploads over a whole run of ``rounds`` rounds, each with ``cohort`` of the ``devices``; all three at least 1.

        It follows from the fields, as if every upload arrived and no view were evicted. Devices are counted as an amount,
        without simulating each of them, so that the time taken depends on the number of rounds only.
        """
        if self.uploads == "period":
            return UploadPeriod(full=-(-rounds // self.period), some=0.0, part=0.0)
        most, share = -(-cohort // self.period), cohort / devices
        without, old = float(devices - cohort), 0.0  # devices without a view, and with one that is old enough
        sent = [float(cohort)]  # nothing is buffered in the first round
        for now in range(1, rounds):
            if 0 < self.refresh <= now:
                old += sent[now - self.refresh]
            new = min(most, without * share)
            again = min(most - new, old * share)
            without, old = without - new, old - again
            sent.append(new + again)
        later = sum(sent[1:])
        some = sum(min(1.0, number) for number in sent[1:])  # fewer than one device: in that share of such rounds
        return UploadPeriod(full=1.0, some=some, part=later / some / cohort if some else 0.0)

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Cut the plans of the devices that upload, and replace the others by replays."""
        if not decision.plans:
            return decision, state
        count, rng, left_out = len(decision.plans), np.random.default_rng(view.seed), list[tuple[int, str]]()
        upload_round = self.uploads == "period" and view.version % self.period == 0
        held = {} if upload_round else newest_views(view)
        plans: list[Plan] = []
        if self.uploads == "views":
            plans = self._first_that_fit(view, self._due(decision.plans, held, rng), -(-count // self.period), left_out)
        decided = {plan.device for plan in plans} | {device for device, _ in left_out}
        drawn = uniform_order(rng, sorted(held.keys() - decided))[: count - len(plans)]
        plans += [self._replay(view.new_plan(device), view.hosts, held[device]) for device in drawn]
        new = [plan for plan in decision.plans if plan.device not in held and plan.device not in decided]
        plans += self._first_that_fit(view, new, count - len(plans), left_out)
        plans.sort(key=lambda plan: plan.device)
        return replace(decision, plans=tuple(plans), left_out=(*decision.left_out, *left_out)), state

    def _due(self, plans: Sequence[Plan], held: Mapping[int, BufferedView], rng: np.random.Generator) -> Iterator[Plan]:
        """Plans of devices that should upload: those without a view, in random order, then those with the oldest views."""
        by_device = {plan.device: plan for plan in plans}
        order = uniform_order(rng, sorted(by_device))
        yield from (by_device[device] for device in order if device not in held)
        old = [device for device in order if device in held and 0 < self.refresh <= held[device].age]
        yield from (by_device[device] for device in sorted(old, key=lambda device: -held[device].age))

    def _first_that_fit(
        self, view: View, plans: Iterable[Plan], count: int, left_out: list[tuple[int, str]]
    ) -> list[Plan]:
        """Uploads of the first ``count`` devices that have the memory; devices that do not are added to ``left_out``."""
        uploads: list[Plan] = []
        for plan in plans:
            if len(uploads) >= count:
                break
            blocks = plan.part.blocks
            cuts = allowed_cuts(blocks, self.cut, first=self.first, last=self.depth)
            upload = cheapest(view, [self._upload(plan, cut, view.hosts) for cut in cuts])
            if isinstance(upload, str):
                left_out.append((plan.device, upload))
            else:
                uploads.append(upload)
        return uploads

    def _upload(self, plan: Plan, cut: str, hosts: int) -> Plan:
        """One plan whose device uploads the activations at the cut."""
        return self._split(plan, hosts, cut, None).with_(f"ecofed: upload behind {cut}")

    def _replay(self, plan: Plan, hosts: int, view: BufferedView) -> Plan:
        """One plan of a host alone, on the view that the device has uploaded before."""
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
        return replace(plan, part=replace(plan.part, blocks=front, trained=()), split=split)

    @property
    def _codec(self) -> tuple[CodecSpec, ...]:
        """The codec chain for activations."""
        return activation_codec(self.bits)
