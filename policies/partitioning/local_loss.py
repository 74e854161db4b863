"""Split learning by local losses: devices train their blocks through a head of their own, and wait for nobody.

What leaves the device's blocks goes to a partition host, which trains the others on it; but no gradient comes back. The
device's blocks are trained by the loss of an auxiliary head at the cut, one fully connected layer, which is averaged over the
devices and sent to them again, as their blocks are (Han et al. 2021; as EcoFed's code has it, Wu et al., IEEE TPDS 2024,
arXiv 2304.05495). There activations travel as float32; here ``bits`` may code them.

Acts on the plans of the policies before it in a chain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...learning.parts.part import Part, linear_head
from ...learning.spec import Count
from ..checks.fields import check_fields
from ..decision import Decision
from ..plan import Plan, Split
from ..policy import NEEDS_PLANS, State
from ..view import View
from .activation_codec import Bits, activation_codec, check_bits
from .cheapest_cut import AUTO, ONE_CUT, WHOLE_GRADIENT, allowed_cuts, choose_cuts


@dataclass(frozen=True)
class LocalLoss:
    """Behind block ``cut`` of the model ("" for the shallowest allowed), or "auto": each device where it is fastest.

    ``first``: last block of the shallowest cut allowed ("": the model's first block). Every cut has a head of its own, averaged
    over the devices that are cut there: unlike SplitFed's, cuts change what is trained.
    ``window``: packets that may be under way. ``bits``: of a code (0: float32, and not coded at all).
    """

    cut: str = ""
    first: str = ""
    window: Count = 8
    bits: Bits = 0

    writes: ClassVar[tuple[str, ...]] = ("part", "split")
    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    forbids_before: ClassVar[Mapping[str, str]] = ONE_CUT
    forbids_behind: ClassVar[Mapping[str, str]] = ONE_CUT
    forbids_settings: ClassVar[Mapping[str, str]] = WHOLE_GRADIENT
    fits_plans: ClassVar[bool] = True
    needs_kinds: ClassVar[tuple[str, ...]] = ("activations", "labels", "weights")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        check_bits(self.bits)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Where it may cut, so that a cut that is not clean is found before the run."""
        return tuple(name for name in (self.first, self.cut) if name and name != AUTO)

    @property
    def needs_codecs(self) -> tuple[str, ...]:
        """What every device must run."""
        return tuple(spec.name for spec in activation_codec(self.bits))

    def auxiliaries(self, blocks: Sequence[str]) -> tuple[str, ...]:
        """Heads behind all cuts that it may choose in a model of these blocks."""
        return tuple(linear_head(cut) for cut in allowed_cuts(blocks, self.cut, first=self.first))

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Cut the plans."""
        return choose_cuts(view, decision, lambda plan: self._alternatives(plan, view.hosts)), state

    def _alternatives(self, plan: Plan, hosts: int) -> list[Plan]:
        """What a device may get: one for each cut."""
        return [self._cut(plan, cut, hosts) for cut in allowed_cuts(plan.part.blocks, self.cut, first=self.first)]

    def _cut(self, plan: Plan, cut: str, hosts: int) -> Plan:
        """One plan, cut."""
        names = plan.part.blocks
        front = names[: names.index(cut) + 1]
        head = linear_head(cut)
        return plan.with_(
            f"local_loss: cut behind {cut}",
            part=Part(blocks=front, trained=front, head=head, auxiliaries=(head,)),
            split=Split(
                cut=cut,
                host=plan.device % hosts,
                mode="local_loss",
                window=self.window,
                codec_up=activation_codec(self.bits),
            ),
        )
