"""Heads that are shared: what the devices of a version have made of each host's blocks so far, one after another.

SplitFed's second version (Thapa et al., AAAI 2022, arXiv 2004.12088). Nothing is kept at a host between two devices: the server
adds up, for each host, the differences that the turns of the version have made, and sends the next one the model with them.
So a turn that fails leaves the blocks as they were, and a host that dies takes nothing along. When the version closes, a
host's blocks enter the mean once, with the samples of all devices that trained them.
"""

from collections.abc import Collection, Mapping
from typing import ClassVar

from torch import Tensor

from ...comms.channel import Channel
from ...comms.errors import MismatchedPacket
from ...learning.aggregation import Fold
from ...learning.parts.part import up_tensors
from ...learning.parts.structure import ModelSpec
from ...learning.tensors import widened
from ...policies.plan import Plan
from ..messages.messages import Message
from ..support import PlanRefused
from .dense_downlink import opened, sealed


class SharedHeads:
    """By host, what its turns have added to each tensor, and their weight."""

    # By a checkpoint.
    SAVED: ClassVar = {"_sent": dict[int, Message], "_added": dict[int, dict[str, tuple[Tensor, float]]]}
    NOT_SAVED = ("_channel", "_spec", "_model")

    def __init__(self, channel: Channel, spec: ModelSpec, model: Mapping[str, Tensor]) -> None:
        """No device has trained one. ``model``: tensors of the current version, always."""
        self._channel, self._spec, self._model = channel, spec, model
        self._sent: dict[int, Message] = {}  # by plan
        self._added: dict[int, dict[str, tuple[Tensor, float]]] = {}

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Raise ``PlanRefused`` where another plan of its version has the host's blocks."""
        if any(
            other.shares_head and other.version == plan.version and _host(other) == _host(plan) for other in in_flight
        ):
            raise PlanRefused(
                f"the policy chose device {plan.device} out of turn: another one has its host's shared blocks"
            )

    def send(self, of_host: Plan) -> tuple[Message, ...]:
        """The packet that the next device of a host starts from; ``of_host``: the plan as its host has it."""
        added = self._added.get(_host(of_host), {})
        start = {name: (self._model[name] + sum_).to(self._model[name].dtype) for name, (sum_, _) in added.items()}
        self._sent[of_host.id] = sealed(of_host, {**self._model, **start}, self._channel, self._spec)
        return (self._sent[of_host.id],)

    def sent(self, plan: Plan) -> dict[str, Tensor]:
        """The tensors that a turn which is not over started from; raises ``MismatchedPacket`` when there is none."""
        self.check_open(plan)
        return opened(self._sent[plan.id], plan, self._channel, self._spec)

    def add(self, plan: Plan, update: Mapping[str, Tensor], *, weight: float) -> dict[str, Tensor]:
        """Add what a turn made of its host's blocks; what it made of the device's is given back. The turn is over.

        Raises ``MismatchedPacket`` for a plan whose turn was over already, and adds nothing.
        """
        self.check_open(plan)
        self.ended(plan)
        own = {t.name for t in up_tensors(self._spec, plan.part, statistics=plan.upload.statistics)}
        added = self._added.setdefault(_host(plan), {})
        for name, difference in update.items():
            if name in own:
                continue
            before, known = added.get(name, (None, 0.0))
            # Sums are float32 at least, as in the fold.
            added[name] = widened(difference).clone() if before is None else before.add_(difference), known + weight
        return {name: difference for name, difference in update.items() if name in own}

    def ended(self, plan: Plan) -> None:
        """A turn is over, well or not; of other plans there is nothing to forget."""
        self._sent.pop(plan.id, None)

    def close(self, fold: Fold) -> None:
        """Fold what the turns of each host came to, in the order of their first. Turns that are still out are over."""
        for added in self._added.values():
            for name, (difference, weight) in added.items():
                fold.add({name: difference}, weight=weight)
        self._added, self._sent = {}, {}

    def check_open(self, plan: Plan) -> None:
        """Raise ``MismatchedPacket`` for a plan that has no turn, or whose turn is over."""
        if plan.id not in self._sent:
            raise MismatchedPacket(f"plan {plan.id} has no turn at host {_host(plan)}, or it is over")


def _host(plan: Plan) -> int:
    assert plan.split is not None
    return plan.split.host
