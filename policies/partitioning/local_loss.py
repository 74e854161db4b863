"""Split learning by local losses: devices train their blocks through an auxiliary head, without gradients from the host.

The activations at the cut go to a partition host, which trains the other blocks on them; no gradient comes back. The device's
blocks are trained by the loss of an auxiliary head at the cut, one fully connected layer, which is averaged over the devices
and sent to them again, as their blocks are (Han et al. 2021; as in EcoFed's code, Wu et al., IEEE TPDS 2024, arXiv 2304.05495).
There activations are sent as float32; here ``bits`` may code them.

It changes the plans of the policies before it in a chain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from msgspec.structs import replace

from ...learning.parts.part import linear_head
from ...learning.spec import Count
from ..checks.fields import check_fields
from ..decision import Decision
from ..plan import Plan, Split
from ..policy import NEEDS_PLANS, State
from ..view import View
from .cuts import AUTO, ONE_CUT, WHOLE_GRADIENT, Bits, activation_codec, allowed_cuts, check_bits, choose_cuts

_ONE_WIDTH = {"part.width": "whose heads at the cut have the size of whole blocks; allowed: one of the two"}


@dataclass(frozen=True)
class LocalLoss:
    """A cut behind block ``cut`` of the model ("": the shallowest allowed one), or "auto": for each device the fastest.

    ``first``: last block of the shallowest cut allowed ("": the model's first block). Every cut has a head of its own, averaged
    over the devices with that cut: unlike with SplitFed, the cut changes the model. ``window``: packets in flight. ``bits``: of
    the code of activations (0: float32, not coded).
    """

    cut: str = ""
    first: str = ""
    window: Count = 8
    bits: Bits = 0

    writes: ClassVar[tuple[str, ...]] = ("part", "split")
    needs: ClassVar[Mapping[str, str]] = NEEDS_PLANS
    forbids_before: ClassVar[Mapping[str, str]] = ONE_CUT | _ONE_WIDTH
    forbids_behind: ClassVar[Mapping[str, str]] = ONE_CUT | _ONE_WIDTH
    forbids_settings: ClassVar[Mapping[str, str]] = WHOLE_GRADIENT
    fits_plans: ClassVar[bool] = True
    needs_kinds: ClassVar[tuple[str, ...]] = ("activations", "labels", "weights")

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fields(self)
        check_bits(self.bits)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Blocks behind which it may cut, checked against the model before the run."""
        return tuple(name for name in (self.first, self.cut) if name and name != AUTO)

    @property
    def needs_codecs(self) -> tuple[str, ...]:
        """Codecs that every device must run."""
        return tuple(spec.name for spec in activation_codec(self.bits))

    def auxiliaries(self, blocks: Sequence[str]) -> tuple[str, ...]:
        """Names of the heads behind all cuts that it may choose in a model of these blocks."""
        return tuple(linear_head(cut) for cut in allowed_cuts(blocks, self.cut, first=self.first))

    def init(self) -> State:
        """No state."""
        return None

    def decide(self, view: View, state: State, decision: Decision) -> tuple[Decision, State]:
        """Cut the plans."""
        return choose_cuts(view, decision, lambda plan: self._alternatives(plan, view.hosts)), state

    def _alternatives(self, plan: Plan, hosts: int) -> list[Plan]:
        """The plans that a device may get: one for each cut."""
        return [self._cut(plan, cut, hosts) for cut in allowed_cuts(plan.part.blocks, self.cut, first=self.first)]

    def _cut(self, plan: Plan, cut: str, hosts: int) -> Plan:
        """One plan, cut."""
        names = plan.part.blocks
        front = names[: names.index(cut) + 1]
        head = linear_head(cut)
        return plan.with_(
            f"local_loss: cut behind {cut}",
            part=replace(plan.part, blocks=front, trained=front, head=head, auxiliaries=(head,)),
            split=Split(
                cut=cut,
                host=plan.device % hosts,
                mode="local_loss",
                window=self.window,
                codec_up=activation_codec(self.bits),
            ),
        )
