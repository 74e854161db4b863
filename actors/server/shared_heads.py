"""Shared heads: each host's blocks are trained by one device at a time, in an order drawn from the seed.

SplitFed's second version (Thapa et al., AAAI 2022, arXiv 2004.12088). A host keeps nothing between two devices: for each
host the server sums the differences made in the version so far, and sends the next device the model plus that sum. So a plan
that fails leaves the blocks unchanged, and a host that dies loses no finished training. When the version closes, a host's
blocks enter the mean once, weighted by the samples of all devices that trained them.
"""

from collections.abc import Collection, Mapping
from typing import ClassVar

from torch import Tensor

from ...comms.channel import Channel
from ...comms.errors import MismatchedPacket
from ...learning.aggregation import Fold
from ...learning.tensors import at_least_float32
from ...policies.plan import Plan
from ..messages.messages import Message, update_tensors
from ..support import PlanRefused
from .dense_downlink import Compile, send_weights, sent_weights


class SharedHeads:
    """For each host, the sum of differences of each tensor in this version, and their weight."""

    # By a checkpoint.
    SAVED: ClassVar = {"_sent": dict[int, Message], "_added": dict[int, dict[str, tuple[Tensor, float]]]}
    NOT_SAVED = ("_channel", "_submodel", "_model")

    def __init__(self, channel: Channel, submodel: Compile, model: Mapping[str, Tensor]) -> None:
        """``model``: the tensors of the current version, by the server's names; they change in place."""
        self._channel, self._submodel, self._model = channel, submodel, model
        self._sent: dict[int, Message] = {}  # by plan that trains a shared head now
        self._added: dict[int, dict[str, tuple[Tensor, float]]] = {}

    def check(self, plan: Plan, in_flight: Collection[Plan]) -> None:
        """Raise ``PlanRefused`` if another plan of this version trains the same host's blocks."""
        if any(
            other.shares_head and other.version == plan.version and _host(other) == _host(plan) for other in in_flight
        ):
            raise PlanRefused(
                f"the policy chose device {plan.device} while another device trains the shared head of host {_host(plan)}"
            )

    def send(self, for_host: Plan) -> tuple[Message, ...]:
        """The packet of the host's blocks: the model plus this version's sums. ``for_host``: the plan with the host's part."""
        sums = self._added.get(_host(for_host), {})
        start = {name: (self._model[name] + total).to(self._model[name].dtype) for name, (total, _) in sums.items()}
        self._sent[for_host.id] = send_weights(
            for_host, {**self._model, **start}, self._channel, self._submodel(for_host.part)
        )
        return (self._sent[for_host.id],)

    def sent(self, plan: Plan) -> dict[str, Tensor]:
        """The tensors that the host's leg of a plan in flight started from; raises ``MismatchedPacket`` for any other plan."""
        self.check_open(plan)
        return sent_weights(self._sent[plan.id], plan, self._channel, self._submodel(plan.part))

    def add(self, plan: Plan, update: Mapping[str, Tensor], *, weight: float) -> dict[str, Tensor]:
        """Add the differences of the host's blocks to their sums, and return those of the device's blocks.

        Raises ``MismatchedPacket``, and adds nothing, for a plan that is not in flight or was added before.
        """
        self.check_open(plan)
        self.ended(plan)
        submodel = self._submodel(plan.part)
        own = {t.name for t in update_tensors(plan, submodel)}
        added = self._added.setdefault(_host(plan), {})
        others = {name: difference for name, difference in update.items() if name not in own}
        for name, difference in submodel.server_names(others).items():
            total, total_weight = added.get(name, (None, 0.0))
            # Sums are float32 at least, as in the fold.
            total = at_least_float32(difference).clone() if total is None else total.add_(difference)
            added[name] = total, total_weight + weight
        return {name: difference for name, difference in update.items() if name in own}

    def ended(self, plan: Plan) -> None:
        """The plan no longer trains a shared head, whatever its outcome; other plans are ignored."""
        self._sent.pop(plan.id, None)

    def close(self, fold: Fold) -> None:
        """Fold each host's sums, hosts in the order of their first update. Plans still in flight can add nothing afterwards."""
        for added in self._added.values():
            for name, (difference, weight) in added.items():
                fold.add({name: difference}, weight=weight)
        self._added, self._sent = {}, {}

    def check_open(self, plan: Plan) -> None:
        """Raise ``MismatchedPacket`` for a plan that does not train a shared head now."""
        if plan.id not in self._sent:
            raise MismatchedPacket(f"plan {plan.id} does not train the shared head of host {_host(plan)} now")


def _host(plan: Plan) -> int:
    assert plan.split is not None
    return plan.split.host
