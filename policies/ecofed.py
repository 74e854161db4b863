"""EcoFed as a policy: a frozen trunk, of which devices run the first blocks forward, and hosts that train what follows.

Wu, Ullah, Rodgers, Kilpatrick, Spence, Varghese, "EcoFed: Efficient Communication for DNN Partitioning-based Federated
Learning", IEEE TPDS 35(3), 2024, arXiv 2304.05495. Nothing but activations with their labels travels from devices. Where we
depart: the trunk runs with stored statistics, so that what leaves it depends on the sample alone (there, on the batch);
codes are unsigned, of ``bits`` bits for each channel, and entropy coded (there, signed 8 bit for the whole tensor).

Acts on the plans of the policies before it in a chain.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
from msgspec.structs import replace

from ..comms.codecs import CodecSpec
from ..learning.part import Part
from ..learning.spec import Count
from .decision import Decision
from .fields import check_fields
from .plan import Plan, Split
from .policy import State
from .view import View


@dataclass(frozen=True)
class EcoFed:
    """The same cut for all devices: behind block ``cut`` of the model ("" for its first).

    ``depth``: last block of the frozen trunk, at the cut or behind it ("": the cut); hosts run what is between frozen.
    ``window``: packets that may be under way. ``bits``: of a code (0: float32, and not coded at all).
    """

    cut: str = ""
    depth: str = ""
    window: Count = 8
    bits: Annotated[int, msgspec.Meta(ge=0, le=8)] = 4

    needs_plans: ClassVar[bool] = True
    needs_kinds: ClassVar[tuple[str, ...]] = ("activations", "labels")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        if self.bits == 1:
            raise ValueError("bits is 1; it must be 0 or between 2 and 8")

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
        return replace(decision, plans=tuple(self._upload(plan, view.hosts) for plan in decision.plans)), state

    def _upload(self, plan: Plan, hosts: int) -> Plan:
        """One plan whose device sends what leaves its part of the trunk."""
        names = plan.part.blocks
        cut = self.cut or names[0]
        front = names[: names.index(cut) + 1]
        split = Split(
            cut=cut,
            depth=self.depth or cut,
            host=plan.device % hosts,
            mode="ecofed",
            window=self.window,
            codec_up=self._codec,
        )
        return plan.with_(f"ecofed: upload behind {cut}", part=Part(blocks=front, trained=()), split=split)

    @property
    def _codec(self) -> tuple[CodecSpec, ...]:
        """The chain for activations."""
        if not self.bits:
            return ()
        grid = {"bits": self.bits, "signed": "auto", "granularity": "channel", "roles": ["activation"]}
        return (CodecSpec("uniform", grid), CodecSpec("entropy"))
