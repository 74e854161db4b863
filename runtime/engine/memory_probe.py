"""Measures before the first round what memory plans need: those of the first decision, and each model as a whole.

Each part is measured under one training setting by ``actors.enforcement.probe``, in a child process on the machine of the
server, in the order in which it is found. A plan that is split cannot run alone, and keeps its prediction; so does one that
fails for another reason than memory, which a notice reports.
"""

from collections.abc import Iterable
from functools import partial

import msgspec

from ...actors.enforcement.child_process import ChildDied
from ...actors.enforcement.enforced_device import EnforcedDevice
from ...actors.enforcement.probe import smallest_limit
from ...actors.messages.plan_message import plan_message
from ...learning.workload_settings import WorkloadSettings
from ...policies.plan import Plan
from ..simulation.costs import Costs
from ..simulation.process_memory import key

_MOST_PARTS = 16  # a policy that gives every device another part is measured on the first of them


def probe_memory(plans: Iterable[Plan], costs: Costs, settings: WorkloadSettings) -> tuple[dict[str, int], list[str]]:
    """Bytes above an idle trainer by ``process_memory.key``, and notices of what could not be measured."""
    distinct = {key(plan): plan for plan in plans if plan.split is None and plan.objective.kind == "train"}
    found: dict[str, int] = {}
    notices: list[str] = []
    device = EnforcedDevice(settings)
    try:
        for name, plan in list(distinct.items())[:_MOST_PARTS]:
            row = costs.row(plan.part, plan.training)
            plain = msgspec.structs.replace(plan, codec_up=())
            message = plan_message(plain)
            try:
                found[name] = smallest_limit(partial(device.try_limit, message), guess=row.process_memory_bytes)
            except (RuntimeError, ValueError, ChildDied) as error:
                notices.append(f"the memory of a plan ({name}) could not be measured, and is predicted: {error}")
    finally:
        device.close()
    if len(distinct) > _MOST_PARTS:
        left = len(distinct) - _MOST_PARTS
        notices.append(f"memory was measured for {_MOST_PARTS} different plans; {left} more are predicted")
    return found, notices
