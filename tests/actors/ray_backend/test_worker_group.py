"""Which worker is sent the next plan, and how long one may take over it."""

import pytest
from fedbonsai.actors.ray_backend.actor_placement import ActorPlacement
from fedbonsai.actors.ray_backend.device_registry import DeviceRegistry
from fedbonsai.actors.ray_backend.worker_group import Assignment, Worker, WorkerGroup, least_loaded
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Training
from fedbonsai.policies.plan import Plan

PART = Part(blocks=("all",), trained=("all",))


def assignment(number):
    plan = Plan(id=number, device=0, version=0, part=PART, training=Training(), seed=1)
    return Assignment(plan, [], None)


def worker(*numbers, group=""):
    placement = ActorPlacement(name="worker of bundle 1", group=group)
    return Worker(placement, None, "node", {number: assignment(number) for number in numbers})


def test_the_least_loaded_of_the_group_is_next_and_two_plans_are_enough():
    busy, half, other = worker(1, 2), worker(3), worker(group="board")
    assert least_loaded([busy, half, other], "") is half
    assert least_loaded([busy, half, other], "board") is other
    assert least_loaded([busy], "") is None


@pytest.mark.usefixtures("cluster")
def test_a_worker_hangs_that_is_at_one_plan_for_too_long_and_the_next_plan_has_its_own_time():
    now = [100.0]
    group = WorkerGroup(
        None, [], DeviceRegistry(), placement_timeout_s=0, stuck_after_s=60, report=[].append, now=lambda: now[0]
    )
    slow = worker()
    group.assign(slow, assignment(1))
    now[0] += 40.0
    group.assign(slow, assignment(2))
    assert group.left_s() == 20.0
    now[0] += 20.0
    assert group.hung() == [(slow, "stuck: it ran one plan for more than 60 s")]
    assert group.hung(ignoring=[slow]) == []
    assert group.release(slow, 1).plan.id == 1
    assert (group.hung(), group.left_s()) == ([], 60.0)
    group.release(slow, 2)
    assert group.left_s() is None
