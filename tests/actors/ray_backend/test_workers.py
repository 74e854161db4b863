"""How long a worker may take over one plan, and how often one is placed again."""

import time

import pytest
from fedbonsai.actors.pool import Task
from fedbonsai.actors.ray_backend.ray_place import ActorPlacement
from fedbonsai.actors.ray_backend.workers import HangTimeout, RetryBudget, RunningPlan, WorkerHandle, free_worker
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Training
from fedbonsai.policies.plan import Plan

PART = Part(blocks=("all",), trained=("all",))


def plan(number):
    return Plan(id=number, device=0, version=0, part=PART, training=Training(), seed=1)


def seat(*numbers, for_s=0.0, group=""):
    """A worker that has been at the first of its plans for so long."""
    made = WorkerHandle(ActorPlacement(name="bundle 1", group=group), None, "node")
    for number in numbers:
        made.give(RunningPlan(plan(number), [], None))
    made.since -= for_s
    return made


def test_who_takes_too_long_is_lost_and_who_has_nothing_to_do_is_not():
    slow, quick, idle = seat(1, for_s=100.0), seat(2), seat(for_s=1000.0)
    assert HangTimeout(60.0).lost_with([slow, quick, idle]) == [slow]
    assert HangTimeout(None).lost_with([slow, quick, idle]) == []


def test_patience_waits_until_the_first_has_taken_too_long():
    waiting = [seat(1, for_s=20.0), seat(2)]
    assert HangTimeout(60.0).left_s(waiting, None) == pytest.approx(40.0, abs=5.0)
    assert HangTimeout(60.0).left_s(waiting, 3.0) == 3.0
    assert HangTimeout(None).left_s(waiting, None) is None
    assert HangTimeout(10.0).left_s(waiting, 3.0) == 0.0


def test_the_next_plan_has_its_own_time():
    worker = seat(1, 2, for_s=100.0)
    worker.take(1)
    assert HangTimeout(60.0).lost_with([worker]) == []
    assert time.monotonic() - worker.since < 60.0


def test_only_deaths_under_a_plan_use_up_its_attempts():
    attempts, task = RetryBudget(2), Task(plan=plan(1), packets=())
    task = attempts.next(task, at_it=False)
    task = attempts.next(task, at_it=True)
    assert task.plan.attempt == 2
    assert attempts.next(task, at_it=True) is None
    attempts.forget(1)
    assert attempts.next(task, at_it=True).plan.attempt == 3


def test_the_least_loaded_of_the_group_is_next_and_two_plans_are_enough():
    busy, half, other = seat(1, 2), seat(3), seat(group="board")
    assert free_worker([busy, half, other], "") is half
    assert free_worker([busy, half, other], "board") is other
    assert free_worker([busy], "") is None
