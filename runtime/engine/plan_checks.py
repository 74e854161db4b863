"""Whether a plan that a policy made can be sent now: to which device, from which version, to which host."""

from collections.abc import Mapping, Sequence

from ...actors.support import PlanRefused, check_plan
from ...clusters.profile import DeviceProfile
from ...learning.parts.structure import ModelSpec
from ...policies.plan import Plan


def check_sendable(
    plan: Plan,
    *,
    version: int,
    busy: Mapping[int, Plan],
    profiles: Sequence[DeviceProfile],
    hosts: int,
    spec: ModelSpec,
) -> None:
    """Raise ``PlanRefused`` where it cannot. ``busy``: plans in flight, by device; ``profiles``: of all devices."""
    if plan.device not in range(len(profiles)):
        raise PlanRefused(f"the policy chose device {plan.device}; devices are 0 to {len(profiles) - 1}")
    if plan.device in busy:
        raise PlanRefused(f"the policy chose device {plan.device}, which still has a plan in flight")
    if plan.version != version:
        raise PlanRefused(
            f"a plan for device {plan.device} starts at version {plan.version}; the current one is {version}"
        )
    if plan.split is not None and plan.split.host not in range(hosts):
        raise PlanRefused(f"split.host is {plan.split.host}; hosts are 0 to {hosts - 1}")
    check_plan(plan, spec=spec, profile=profiles[plan.device])
