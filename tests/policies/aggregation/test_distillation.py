"""When a round has its task of distillation, what the task is, and when label counts are asked for."""

import msgspec
import pytest
from fedbonsai.policies.aggregation.distillation import Distillation
from fedbonsai.policies.checks.statements import chain_fault, statements_of
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.plan import Upload
from fedbonsai.policies.policy import chain
from fedbonsai.policies.resolve_policy import make_policy
from fedbonsai.policies.scheduling.asynchronous import Asynchronous
from fedbonsai.policies.selection.plain import All, RandomCohort
from fedbonsai.policies.tasks import Distil


def decide(policy, view):
    """The decision on a plan for each device that can be reached."""
    plans = tuple(view.new_plan(device) for device in view.devices if device not in view.unreachable)
    return policy.decide(view, policy.init(), Decision(plans=plans))[0]


def test_the_fields_are_those_of_the_task_with_its_defaults():
    assert Distillation().task == Distil()
    values = {
        "steps": 7,
        "learning_rate": 0.01,
        "batch_size": 16,
        "temperature": 2.0,
        "weighting": "samples",
        "class_prior": 0.5,
        "held_out": 0.2,
        "check_every": 5,
        "patience": 50,
    }
    assert set(values) == set(Distil.__struct_fields__)
    policy = make_policy([{"name": "distillation", **values}])
    assert msgspec.to_builtins(policy.task) == {"name": "distil", **values}


def test_the_task_comes_with_the_first_plans_of_a_version(make_view):
    policy = Distillation(steps=5)
    assert decide(policy, make_view()).tasks == (Distil(steps=5),)
    assert decide(policy, make_view(dispatched=2)).tasks == ()
    assert decide(policy, make_view(unreachable=frozenset(range(4)))).tasks == ()  # no plans, no round
    given = Decision(plans=decide(policy, make_view()).plans, tasks=(Distil(steps=1),))
    assert policy.decide(make_view(), None, given)[0].tasks == (Distil(steps=1), Distil(steps=5))


@pytest.mark.parametrize(
    ("every", "from_round", "rounds"),
    [(1, 0, [0, 1, 2, 3, 4, 5, 6, 7]), (3, 0, [0, 3, 6]), (1, 5, [5, 6, 7]), (3, 2, [2, 5])],
)
def test_rounds_with_a_task(make_view, every, from_round, rounds):
    policy = Distillation(every=every, from_round=from_round)
    assert [version for version in range(8) if decide(policy, make_view(version=version)).tasks] == rounds


def test_label_counts_only_for_a_correction_by_classes_and_then_in_all_plans(make_view):
    plain = decide(Distillation(), make_view())
    assert all(plan.upload == Upload() and not plan.reasons for plan in plain.plans)
    for changes in ({}, {"dispatched": 3}, {"version": 1}):  # with and without a task
        counted = decide(Distillation(class_prior=1.0, every=2), make_view(**changes))
        assert all(plan.upload == Upload(label_counts=True) for plan in counted.plans)
        assert {plan.reasons for plan in counted.plans} == {("distillation: label counts",)}


def test_in_asynchronous_rounds_each_version_has_one_task(make_view, make_plan):
    policy = chain(Asynchronous(concurrency=2, buffer=1), Distillation())
    state = policy.init()
    decision, state = policy.decide(make_view(), state, Decision())
    assert (len(decision.plans), decision.tasks) == (2, (Distil(),))
    first = make_plan(0, version=0)
    later, state = policy.decide(make_view(version=1, in_flight={0: first}), state, Decision())
    assert (len(later.plans), later.tasks) == (1, (Distil(),))
    again, _ = policy.decide(make_view(version=1, in_flight={0: first}, dispatched=1), state, Decision())
    assert (len(again.plans), again.tasks) == (1, ())


def fault(*policies):
    return chain_fault([(type(policy).__name__, statements_of(policy)) for policy in policies])


def test_statements():
    plain, counting = statements_of(Distillation()), statements_of(Distillation(class_prior=0.1))
    assert (tuple(plain.written), tuple(plain.needs_kinds)) == (("tasks",), ())
    assert (tuple(counting.written), tuple(counting.needs_kinds)) == (("tasks", "upload"), ("labels",))
    assert fault(Distillation()).startswith("Distillation only changes plans of the policies before it")
    assert not fault(All(), Distillation(), RandomCohort(cohort=2))
    assert fault(All(), Distillation(), Distillation(steps=1)) == (
        "Distillation gives the server a task before Distillation, which changes the model of a round too; "
        "allowed: one of the two"
    )


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": -1}, "steps is -1: expected `int` >= 0"),
        ({"temperature": 0}, "temperature is 0: expected `float` > 0.0"),
        ({"held_out": 1.0}, "held_out is 1.0: expected `float` < 1.0"),
        ({"weighting": "entropy"}, "weighting is 'entropy'"),
        ({"every": 0}, "every is 0: expected `int` >= 1"),
    ],
)
def test_fields_are_checked(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Distillation(**fields)
