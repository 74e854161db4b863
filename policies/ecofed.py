"""EcoFed as a policy: a frozen trunk, of which devices run the first blocks forward, and hosts that train what follows.

Wu, Ullah, Rodgers, Kilpatrick, Spence, Varghese, "EcoFed: Efficient Communication for DNN Partitioning-based Federated
Learning", IEEE TPDS 35(3), 2024, arXiv 2304.05495. Nothing but activations with their labels travels from devices. Where we
depart: the trunk runs with stored statistics, so that what leaves it depends on the sample alone (there, on the batch);
codes are unsigned, of ``bits`` bits for each channel, and entropy coded (there, signed 8 bit for the whole tensor).

Acts on the plans of the policies before it in a chain.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from msgspec.structs import replace

from ..comms.codecs import CodecSpec
from ..learning.part import Part
from ..learning.spec import Count
from .activation_codec import Bits, activation_codec, check_bits
from .decision import Decision
from .draw import uniform_order
from .fields import check_fields
from .plan import Plan, Split
from .policy import State
from .view import View


@dataclass(frozen=True)
class EcoFed:
    """The same cut for all devices: behind block ``cut`` of the model ("" for its first).

    ``depth``: last block of the frozen trunk, at the cut or behind it ("": the cut); hosts run what is between frozen.
    ``period``: every so many rounds devices upload; in those between hosts train on as many views drawn from all that they
    have buffered, and devices that have none upload where there are too few. ``window``: packets that may be under way.
    ``bits``: of a code (0: float32, and not coded at all).
    """

    cut: str = ""
    depth: str = ""
    period: Count = 2
    window: Count = 8
    bits: Bits = 4

    needs_plans: ClassVar[bool] = True
    freezes: ClassVar[bool] = True
    needs_kinds: ClassVar[tuple[str, ...]] = ("activations", "labels")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        check_bits(self.bits)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Where it cuts, so that a cut that is not clean is found before the run."""
        return tuple(name for name in (self.cut, self.depth) if name)

    @property
    def needs_codecs(self) -> tuple[str, ...]:
        """What every device must run."""
        return tuple(spec.name for spec in self._codec)

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Cut the plans."""
        if view.dispatched or not decision.plans:
            return decision, state
        held = {} if view.version % self.period == 0 else self._held(view)
        order = uniform_order(np.random.default_rng(view.seed), sorted(held))[: len(decision.plans)]
        plans = [self._replay(view.new_plan(device), view.hosts, *held[device]) for device in order]
        others = [plan for plan in decision.plans if plan.device not in held]
        plans += [self._upload(plan, view.hosts) for plan in others[: len(decision.plans) - len(plans)]]
        return replace(decision, plans=tuple(sorted(plans, key=lambda plan: plan.device))), state

    def _held(self, view: View) -> dict[int, tuple[str, str]]:
        """Cut and id of the newest buffered view of each idle device."""
        found: dict[int, tuple[str, str]] = {}
        for _, cut, device, name, _, _ in sorted(view.replay, key=lambda entry: -entry[4]):
            if device not in view.in_flight:
                found[device] = cut, name
        return found

    def _upload(self, plan: Plan, hosts: int) -> Plan:
        """One plan whose device sends what leaves its part of the trunk."""
        cut = self.cut or plan.part.blocks[0]
        return self._split(plan, hosts, cut, None).with_(f"ecofed: upload behind {cut}")

    def _replay(self, plan: Plan, hosts: int, cut: str, name: str) -> Plan:
        """One plan of a host alone, on what the device uploaded before."""
        return self._split(plan, hosts, cut, name).with_(f"ecofed: replay of view {name}")

    def _split(self, plan: Plan, hosts: int, cut: str, name: str | None) -> Plan:
        """A plan with a frozen trunk."""
        names = plan.part.blocks
        front = names[: names.index(cut) + 1]
        depth = self.depth or self.cut or names[0]
        split = Split(
            cut=cut,
            depth=depth,
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
