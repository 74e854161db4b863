"""The sequence of stages, what ends one, roll-back, and devices that a stage does not fit; memory as in ``network.py``."""

import msgspec
import pytest
from fedbonsai.learning.parts.part import Part
from fedbonsai.policies.checks.answer import check_answer
from fedbonsai.policies.checks.statements import chain_fault, statements_of
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.plan import Objective
from fedbonsai.policies.policy import chain
from fedbonsai.policies.progressive.profl import ProFL
from fedbonsai.policies.progressive.stages import collect_part, imitate_part, shrunk_path, train_part
from fedbonsai.policies.resolve_policy import make_policy
from fedbonsai.policies.selection.plain import All, RandomCohort
from fedbonsai.policies.tasks import Distil, Restore, Snapshot, TrackMovement
from msgspec.structs import replace

from .network import NAMES, make_view

GROUPS = (("a",), ("b",), ("c",))
SHORT = {"blocks": ("a", "b"), "shrink_rounds": 2, "imitate_rounds": 1, "grow_rounds": 2, "min_rounds": 1}


class Played:
    """A run of a policy: decisions of consecutive versions, between which its state is written and read."""

    def __init__(self, policy, **view):
        self.policy, self.state, self.version, self.view = policy, policy.init(), 0, view

    def decide(self, decision=None, **view):
        """The decision on the current version; by default on a plan for each device."""
        seen = make_view(version=self.version, **self.view | view)
        if decision is None:
            decision = Decision(plans=tuple(seen.new_plan(device) for device in seen.devices))
        answer, state = self.policy.decide(seen, self.state, decision)
        check_answer((answer, state), who="the policy")
        for written, read in (
            (msgspec.json.encode, msgspec.json.decode),
            (msgspec.msgpack.encode, msgspec.msgpack.decode),
        ):
            assert read(written(state)) == state
            answer = read(written(answer), type=Decision)
            state = read(written(state))
        self.state = state
        return answer

    def next(self, **view):
        decision = self.decide(**view)
        self.version += 1
        return decision


def phase(decision):
    """Phase and stage of a decision, counted from 1."""
    own = [reason for plan in decision.plans for reason in plan.reasons if reason.startswith("profl: ")]
    words = {reason.removeprefix("profl: ").partition(" of ")[0] for reason in own}
    return words.pop() if len(words) == 1 else words


def phases(played, versions, **view):
    return [phase(played.next(**view)) for _ in range(versions)]


def test_the_model_shrinks_from_back_to_front_and_grows_from_front_to_back():
    played = Played(ProFL(**SHORT), statistics=frozenset({"b"}))
    assert phases(played, 13) == [
        "collect 3",
        "shrink 3", "shrink 3", "imitate 3",
        "shrink 2", "shrink 2", "imitate 2",
        "grow 1", "grow 1", "grow 2", "grow 2", "grow 3", "grow 3",
    ]  # fmt: skip
    assert phases(played, 100) == ["grow 3"] * 100  # until the run ends


def test_each_phase_has_its_part_objective_and_path():
    played, seen = Played(ProFL(**SHORT | {"shrink_rounds": 1, "grow_rounds": 1}), statistics=frozenset({"a"})), {}
    for _ in range(8):
        decision = played.next()
        (plan, other) = decision.plans
        assert (plan.part, plan.objective) == (other.part, other.objective)
        seen[phase(decision)] = plan.part, plan.objective.kind, decision.path
    trained = [train_part(GROUPS, "head", stage) for stage in (0, 1, 2)]
    assert seen == {
        "collect 3": (collect_part(GROUPS), "collect", trained[2]),
        "shrink 3": (trained[2], "train", trained[2]),
        "imitate 3": (imitate_part(GROUPS, 2), "imitate", shrunk_path(GROUPS, "head", 2)),
        "shrink 2": (trained[1], "train", trained[1]),
        "imitate 2": (imitate_part(GROUPS, 1), "imitate", shrunk_path(GROUPS, "head", 1)),
        "grow 1": (trained[0], "train", trained[0]),
        "grow 2": (trained[1], "train", trained[1]),
        "grow 3": (trained[2], "train", trained[2]),
    }


@pytest.mark.parametrize(
    ("view", "changes", "first"),
    [
        ({"statistics": frozenset()}, {}, "shrink 3"),
        ({"statistics": frozenset({"c", "head"})}, {}, "shrink 3"),  # of blocks that are trained first
        ({"statistics": frozenset({"b"})}, {}, "collect 3"),
        ({"statistics": frozenset({"b"})}, {"shrinking": False}, "grow 1"),
    ],
)
def test_how_it_begins(view, changes, first):
    assert phase(Played(ProFL(**SHORT | changes), **view).next()) == first


def test_statistics_are_not_collected_where_they_are_not_sent():
    played = Played(ProFL(**SHORT), statistics=frozenset({"b"}))
    view = make_view()
    plans = tuple(replace(view.new_plan(0), upload=replace(view.new_plan(0).upload, statistics=False)) for _ in "x")
    assert phase(played.decide(Decision(plans=plans))) == "shrink 3"


def test_a_collection_is_one_pass_without_links():
    view = make_view()
    plan = replace(view.new_plan(0), training=replace(view.new_plan(0).training, epochs=5, steps=7))
    played = Played(ProFL(**SHORT), statistics=frozenset({"a"}))
    (found,) = played.decide(Decision(plans=(plan,))).plans
    assert (found.training.epochs, found.training.steps, found.link_down, found.link_up) == (1, None, None, None)


# The end of a stage.

CALM = {"fitted": 2, "window": 4, "slope": 0.01, "patience": 2, "shrink_rounds": 50, "grow_rounds": 50}


def moved(label, value):
    return {"movement": {label: value}}


def test_a_stage_ends_when_its_blocks_were_calm_for_some_rounds():
    played = Played(ProFL(**SHORT | CALM))
    assert phases(played, 1) == ["shrink 3"]
    assert phases(played, 4, **moved("shrink 3", 1.0)) == ["shrink 3"] * 4
    # 0.5 is the noise floor of a window of four. The line through 1.0 and 0.5 falls; then there are two flat ones.
    assert phases(played, 3, **moved("shrink 3", 0.5)) == ["shrink 3", "shrink 3", "imitate 3"]
    # The movement of another stage does not count.
    assert phases(played, 4, **moved("shrink 3", 0.5)) == ["shrink 2"] * 4


def test_calm_rounds_must_be_consecutive():
    played = Played(ProFL(**SHORT | CALM | {"fitted": 1}))
    values = [0.5, 0.5, 1.0, 0.5]  # the first one was seen before the stage's first round, and does not count
    assert [phase(played.next(**moved("shrink 3", value))) for value in values] == ["shrink 3"] * 4
    assert phase(played.next(**moved("shrink 3", 0.5))) == "imitate 3"


def test_a_stage_has_a_least_and_a_greatest_number_of_rounds():
    played = Played(ProFL(**SHORT | CALM | {"fitted": 1, "patience": 1, "min_rounds": 4}))
    assert phases(played, 5, **moved("shrink 3", 0.5)) == ["shrink 3"] * 4 + ["imitate 3"]
    played = Played(ProFL(**SHORT | CALM | {"shrink_rounds": 6}))
    assert phases(played, 7, **moved("shrink 3", 1.0)) == ["shrink 3"] * 6 + ["imitate 3"]


def test_each_version_has_its_task_once():
    played = Played(ProFL(**SHORT))
    first = played.decide()
    assert first.tasks == (TrackMovement(label="shrink 3", blocks=("c",), window=10),)
    for _ in range(2):  # later decisions on the same version
        assert played.decide(Decision()).tasks == ()
        assert played.decide().tasks == ()
    played.version = 1
    assert played.decide().tasks == first.tasks
    played.version = 2
    assert (phase(decision := played.decide()), decision.tasks) == ("imitate 3", ())
    played.version = 5
    assert [task.label for task in played.decide().tasks] == ["shrink 2"]


def test_tasks_and_devices_of_the_policies_before_are_kept():
    played, view = Played(ProFL(**SHORT)), make_view()
    before = Decision(
        plans=(view.new_plan(1).with_("mine"),), left_out=((0, "battery"),), tasks=(Distil(),), close_at=1
    )
    after = played.decide(before)
    assert (after.left_out, after.tasks[0], after.close_at) == (before.left_out, Distil(), 1)
    assert after.plans[0].reasons == ("mine", "profl: shrink 3 of 3")


def test_plans_that_evaluate_are_not_changed():
    played, view = Played(ProFL(**SHORT)), make_view()
    plan = replace(view.new_plan(0), objective=Objective(kind="evaluate"))
    assert played.decide(Decision(plans=(plan, view.new_plan(1)))).plans[0] == plan


# Roll-back.

GROWING = SHORT | {"shrinking": False, "grow_rounds": 3}


def accuracy(value):
    return {"evaluation": {"accuracy": value}}


def test_a_snapshot_is_kept_when_the_evaluation_improved():
    played = Played(ProFL(**GROWING | {"grow_rounds": 9}))
    found = []
    for value in (None, 0.5, 0.4, 0.5, 0.6):
        decision = played.next(**({} if value is None else accuracy(value)))
        found.append([task for task in decision.tasks if isinstance(task, Snapshot)])
    snapshot = Snapshot(blocks=("a", "head"), auxiliaries=("proxy@b..b", "proxy@c..c"))
    assert found == [[], [snapshot], [], [], [snapshot]]


def test_a_stage_that_ends_worse_returns_to_its_best_weights():
    played = Played(ProFL(**GROWING))
    assert phases(played, 1) == ["grow 1"]
    assert phases(played, 1, **accuracy(0.8)) == ["grow 1"]
    assert phases(played, 1, **accuracy(0.7)) == ["grow 1"]
    decision = played.next(**accuracy(0.7))
    assert (decision.plans, decision.tasks, decision.close_at) == ((), (Restore(),), 0)
    # The version that was restored is evaluated like any other, and the next stage begins from it.
    decision = played.next(**accuracy(0.8))
    assert (phase(decision), decision.close_at) == ("grow 2", None)
    assert [type(task) for task in decision.tasks] == [TrackMovement]
    assert phases(played, 2, **accuracy(0.8)) == ["grow 2", "grow 2"]


def test_it_returns_once_even_if_the_evaluation_is_older_than_the_restored_version():
    played = Played(ProFL(**GROWING))
    phases(played, 1)
    phases(played, 2, **accuracy(0.8))
    assert played.next(**accuracy(0.1)).close_at == 0
    assert phases(played, 3, **accuracy(0.1)) == ["grow 2"] * 3


@pytest.mark.parametrize(
    ("last", "tolerance", "restores"),
    [(0.75, 0.1, False), (0.69, 0.1, True), (0.8, 0.0, False), (0.79, 0.0, True), (0.9, 0.0, False)],
)
def test_how_much_worse_the_end_of_a_stage_may_be(last, tolerance, restores):
    played = Played(ProFL(**GROWING | {"tolerance": tolerance}))
    phases(played, 1)
    phases(played, 2, **accuracy(0.8))
    assert (played.next(**accuracy(last)).close_at == 0) is restores


def test_the_loss_counts_where_there_is_no_accuracy():
    played = Played(ProFL(**GROWING))
    phases(played, 1)
    assert any(isinstance(task, Snapshot) for task in played.next(evaluation={"loss": 1.0}).tasks)
    assert not any(isinstance(task, Snapshot) for task in played.next(evaluation={"loss": 2.0}).tasks)
    assert played.next(evaluation={"loss": 2.0}).close_at == 0


def test_without_evaluations_there_is_neither_snapshot_nor_roll_back():
    played = Played(ProFL(**GROWING))
    for _ in range(6):
        decision = played.next()
        assert decision.close_at is None
        assert [type(task) for task in decision.tasks] == [TrackMovement]


def test_a_stage_that_shrinks_does_not_roll_back():
    played = Played(ProFL(**SHORT))
    phases(played, 1)
    found = [played.next(**accuracy(value)) for value in (0.9, 0.1, 0.9, 0.1)]
    assert [decision.close_at for decision in found] == [None] * 4
    assert not any(isinstance(task, Snapshot | Restore) for decision in found for task in decision.tasks)


def test_in_a_chain_a_version_that_only_restores_has_no_plans():
    policy = chain(All(), ProFL(**GROWING), RandomCohort(cohort=1.0))
    played = Played(policy)
    for value in (0.1, 0.8, 0.8):
        assert phase(played.decide(Decision(), **accuracy(value))) == "grow 1"
        played.version += 1
    decision = played.decide(Decision(), **accuracy(0.2))
    assert (decision.plans, decision.close_at) == ((), 0)


# Devices with little memory. The first stage while growing takes 44 MB, the second 28, the last 20.


def test_devices_that_do_not_fit_sit_out():
    played = Played(ProFL(**GROWING), memory_mb=(100, 44, 43))
    decision = played.next()
    assert [plan.device for plan in decision.plans] == [0, 1]
    assert decision.left_out == ((2, "memory: needs 44 MB, has 43 MB"),)
    played.version = 3
    assert [plan.device for plan in played.next().plans] == [0, 1, 2]


def test_devices_that_do_not_fit_train_the_head_alone():
    # 4 MB are held; the head takes 8.
    played = Played(ProFL(**GROWING, unaffordable="head_only"), memory_mb=(44, 12, 11))
    decision = played.next()
    assert [plan.part.trained for plan in decision.plans] == [("a", "head"), ("head",)]
    assert decision.plans[1].part.untrained == ("proxy@b..b", "proxy@c..c")
    assert decision.plans[1].reasons == ("profl: grow 1 of 3, head only",)
    assert decision.left_out == ((2, "memory: needs at least 12 MB, has 11 MB"),)


def test_devices_that_do_not_fit_split_their_batches():
    # 4 + 40 / n: 24 with two micro-batches, 14 with four, 9 with eight and 6.5 with 16 of two samples.
    played = Played(ProFL(**GROWING, unaffordable="smaller_batch"), memory_mb=(44, 24, 10, 6.5, 6))
    decision = played.next()
    assert [plan.training.accumulation for plan in decision.plans] == [1, 2, 8, 16]
    assert [plan.reasons[-1].rpartition(", ")[2] for plan in decision.plans[1:]] == [
        "16 at a time",
        "4 at a time",
        "2 at a time",
    ]
    assert decision.left_out == ((4, "memory: needs at least 6.5 MB, has 6 MB"),)


def test_devices_that_do_not_fit_compute_activations_again():
    played = Played(ProFL(**GROWING, unaffordable="checkpointing"), memory_mb=(44, 24, 23))
    decision = played.next()
    assert [plan.training.checkpointing for plan in decision.plans] == [False, True]
    assert decision.plans[1].reasons == ("profl: grow 1 of 3, checkpointing",)
    assert decision.left_out == ((2, "memory: needs at least 24 MB, has 23 MB"),)


def test_while_a_proxy_is_taught_no_head_is_trained_instead():
    played = Played(ProFL(**SHORT | {"shrink_rounds": 1}, unaffordable="head_only"), memory_mb=(100, 7))
    phases(played, 1)
    decision = played.next()  # 4 MB held, and 4 to learn
    assert (phase(decision), decision.left_out) == ("imitate 3", ((1, "memory: needs 8 MB, has 7 MB"),))


def test_memory_is_asked_for_once_for_equal_plans():
    played = Played(ProFL(**GROWING), memory_mb=(100,) * 20)
    view = make_view(memory_mb=(100,) * 20)
    played.decide(Decision(plans=tuple(view.new_plan(device) for device in view.devices)), estimator=view.estimator)
    assert len(view.estimator.calls) == 1


def test_in_a_stage_that_fits_no_device_the_decision_is_empty():
    played = Played(ProFL(**GROWING), memory_mb=(43, 30))
    decision = played.next()
    assert decision.plans == ()
    assert [device for device, _ in decision.left_out] == [0, 1]


def test_or_the_next_stage_begins():
    played = Played(ProFL(**GROWING, none_fits="next"), memory_mb=(43, 30))
    decision = played.next()
    assert phase(decision) == "grow 2"
    assert [task.label for task in decision.tasks] == ["grow 2"]
    assert decision.left_out == ()
    other = Played(ProFL(**GROWING, none_fits="next"), memory_mb=(43, 30))
    plans = tuple(make_view(memory_mb=(43, 30)).new_plan(device) for device in (0, 1))
    assert other.decide(Decision(plans=plans, tasks=(Distil(),))).tasks == (Distil(), *decision.tasks)
    assert phases(played, 3) == ["grow 2", "grow 2", "grow 3"]


def test_the_last_stage_is_not_left():
    played = Played(ProFL(**GROWING, none_fits="next"), memory_mb=(5, 5))
    decision = played.next()
    assert (decision.plans, len(decision.left_out)) == ((), 2)
    assert played.state["stage"] == 2


def test_a_stage_is_not_left_while_a_device_is_at_work():
    view = make_view(memory_mb=(43, 30))
    played = Played(ProFL(**GROWING, none_fits="next"), memory_mb=(43, 30))
    decision = played.decide(Decision(plans=(view.new_plan(0),)), in_flight={1: view.new_plan(1)})
    assert (decision.plans, played.state["stage"]) == ((), 0)
    assert played.decide(Decision()).plans == ()
    assert played.state["stage"] == 0


# Groups.


def test_groups_are_chosen_by_memory():
    # One group takes 68; a | b c takes 3 + 40 and 4 + 32; three groups take 44 at worst, for one more proxy.
    played = Played(ProFL(shrinking=False))
    assert phase(played.next()) == "grow 1"
    assert played.state["groups"] == [["a"], ["b", "c"]]
    assert Played(ProFL(shrinking=False, blocks=("b",))).next().path.blocks == ("a", "b", "head")


def test_one_group_leaves_the_decision_unchanged():
    for policy in (ProFL(most_groups=1), ProFL(blocks=())):
        played, view = Played(policy), make_view(memory_mb=(1, 1))
        before = Decision(plans=(view.new_plan(0), view.new_plan(1)), close_at=1)
        assert played.decide(before) == before
        played.version = 7
        assert played.decide(Decision()) == Decision()


def test_without_plans_nothing_begins():
    played = Played(ProFL(**SHORT))
    assert played.decide(Decision()) == Decision()
    assert played.state == ProFL().init()


# Configuration.


def test_the_proxies_that_it_needs_are_known_before_the_run():
    assert ProFL(blocks=("a", "b")).auxiliaries(NAMES) == ("proxy@b..b", "proxy@c..c")
    assert ProFL(blocks=("a",)).auxiliaries(NAMES) == ("proxy@b..c",)
    assert ProFL(blocks=()).auxiliaries(NAMES) == ()
    assert ProFL().auxiliaries(NAMES) == ("proxy@b..b", "proxy@c..c")
    assert ProFL(most_groups=1).auxiliaries(NAMES) == ()
    assert (ProFL(blocks=("a", "b")).cuts, ProFL().cuts) == (("a", "b"), ())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"most_groups": 0}, "most_groups is 0: expected `int` >= 1"),
        ({"blocks": "all"}, "blocks is 'all'"),
        ({"window": 0}, "window is 0: expected `int` >= 1"),
        ({"slope": 0.0}, "slope is 0.0: expected `float` > 0.0"),
        ({"tolerance": -0.1}, "tolerance is -0.1: expected `float` >= 0.0"),
        ({"unaffordable": "wait"}, "unaffordable is 'wait'"),
        ({"none_fits": "wait"}, "none_fits is 'wait'"),
    ],
)
def test_fields_are_checked(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ProFL(**fields)


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ([ProFL()], "only changes plans"),
        ([All(), ProFL(), ProFL()], "allowed: one such policy"),
        ([All(), make_policy([{"name": "splitfed"}]), ProFL()], "one of the two"),
        ([All(), ProFL(), make_policy([{"name": "splitfed"}])], "one of the two"),
        ([All(), make_policy([{"name": "distillation"}]), ProFL()], "gives the server a task"),
    ],
)
def test_chains_that_cannot_be(links, words):
    chain = [(f"policy[{position}]", statements_of(link)) for position, link in enumerate(links)]
    assert words in chain_fault(chain)


def test_a_part_is_plain_data():
    part = train_part(GROUPS, "head", 1)
    assert msgspec.json.decode(msgspec.json.encode(part), type=Part) == part
