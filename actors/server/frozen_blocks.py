"""Frozen blocks behind which plans train: packets of their own, sent to a device once and named by hash from then on.

A block is named by the hash of its content. Blocks of the initial model are not sent: every process builds them from the
settings. A block that was frozen later (ProFL's blocks, once trained) is a packet that is counted in the ledger as ``block``.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from msgspec.structs import replace
from torch import Tensor

from ...comms.channel import Channel
from ...comms.links.state import LinkState
from ...learning.workload import Workload
from ...policies.plan import Plan
from ...policies.report import Report
from ..messages.block_packet import MAX_BLOCKS, block_bytes, seal_block
from ..messages.messages import Dispatch, Message
from ..messages.trunk import BlockHashes, Trunk
from ..plan_listener import PlanListener


class FrozenBlocks(PlanListener):
    """Which device holds which frozen blocks, and their packets."""

    SAVED: ClassVar = {  # by a checkpoint
        "_messages": OrderedDict[str, Message],
        "_held": dict[int, tuple[str, ...]],
        "_sent": dict[int, tuple[str, ...]],
    }
    SAVED_AS: ClassVar = SAVED
    NOT_SAVED = ("_channel", "_workload", "_tensors", "_hashes")

    def __init__(
        self, channel: Channel, workload: Workload, tensors: Mapping[str, Tensor], hashes: BlockHashes
    ) -> None:
        """``tensors``, ``hashes``: of the global model in its current version, which changes in place."""
        self._channel, self._workload, self._tensors, self._hashes = channel, workload, tensors, hashes
        self._messages: OrderedDict[str, Message] = OrderedDict()  # by hash; the most recently used last
        self._held: dict[int, tuple[str, ...]] = {}  # by device, the blocks that it has acknowledged, the newest last
        self._sent: dict[int, tuple[str, ...]] = {}  # by plan in flight, its blocks

    @cached_property
    def _initial(self) -> BlockHashes:
        """The blocks of the initial model."""
        return Trunk(self._workload).hashes

    def num_bytes(self, plan: Plan) -> int:
        """Bytes of the frozen blocks that a plan would take to its device now."""
        if not _has_frozen(plan):
            return 0
        held = self._held.get(plan.device, ())
        return sum(
            block_bytes(block, self._workload.spec)
            for block, name in self._hashes.cached(plan.part).cached
            if name not in held and name != self._initial.block(block)
        )

    def named(self, plan: Plan) -> Plan:
        """The plan with its frozen blocks named by hash."""
        if not _has_frozen(plan):
            return plan
        return replace(plan, part=self._hashes.cached(plan.part))

    def attached(self, dispatch: Dispatch) -> Dispatch:
        """A dispatch with the packets of its frozen blocks: among its messages, unless the device has them already."""
        plan = dispatch.plan
        if not _has_frozen(plan):
            return dispatch
        names = {name: block for block, name in plan.part.cached if name != self._initial.block(block)}
        if not names:
            return dispatch
        self._sent[plan.id] = tuple(names)
        held, messages = self._held.get(plan.device, ()), {}
        for name, block in names.items():
            if name not in self._messages:
                packet = seal_block(self._tensors, block, name, self._workload.spec)
                self._messages[name] = Message(self._channel.put(packet), packet.nbytes, "block", typical=False)
            self._messages.move_to_end(name)
            messages[name] = self._messages[name]
        in_flight = {name for sent in self._sent.values() for name in sent}
        for name in [name for name in self._messages if name not in in_flight][: len(self._messages) - MAX_BLOCKS]:
            del self._messages[name]
        new = tuple(message for name, message in messages.items() if name not in held)
        known = tuple(message for name, message in messages.items() if name in held)
        return dataclasses.replace(dispatch, messages=(*new, *dispatch.messages), held=(*dispatch.held, *known))

    def ended(self, plan: Plan, report: Report, state: LinkState | None) -> None:
        """The device has the plan's blocks now; one that misses a block has none for certain."""
        names = self._sent.pop(plan.id, ())
        if report.out_of_sync:
            self._held.pop(plan.device, None)
        elif names and report.stage != "open":
            others = tuple(name for name in self._held.get(plan.device, ()) if name not in names)
            self._held[plan.device] = (*others, *names)[-MAX_BLOCKS:]

    def released(self, plan: Plan) -> None:
        """It is not known whether the device has the blocks."""
        self._sent.pop(plan.id, None)

    def device_reset(self, device: int) -> None:
        """A device that comes back has no block."""
        self._held.pop(device, None)

    def view_fields(self, version: int) -> Mapping[str, Any]:
        """``cached``: by device, the hashes of the blocks that it has acknowledged."""
        return {"cached": {device: frozenset(names) for device, names in self._held.items()}}

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {name: getattr(self, name) for name in self.SAVED}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        for name in self.SAVED:
            setattr(self, name, saved[name])


def with_cached(plan: Plan) -> Plan:
    """The plan with its frozen blocks named as those that are not sent with every version; without their hashes."""
    if not _has_frozen(plan) or plan.part.cached:
        return plan
    frozen = tuple((name, "") for name in plan.part.blocks if name not in plan.part.trained)
    return replace(plan, part=replace(plan.part, cached=frozen))


def _has_frozen(plan: Plan) -> bool:
    """Whether a plan's device holds blocks that the plan does not train, outside a split."""
    return plan.split is None and plan.part.trained != plan.part.blocks
