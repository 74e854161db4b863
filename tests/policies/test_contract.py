"""The contract of policies, tested for every one of them. A new policy is a row."""

import copy
import pickle
import sys
from pathlib import Path

import msgspec
import pytest
from fedbonsai.policies.aggregation.distillation import Distillation
from fedbonsai.policies.compression.residuals import Residuals
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.local_loss import LocalLoss
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.policy import Identity, Policy, chain
from fedbonsai.policies.progressive.profl import ProFL
from fedbonsai.policies.pruning.common_width import AllSmall
from fedbonsai.policies.pruning.width import Width
from fedbonsai.policies.resolve_policy import BUILT_IN, make_policy
from fedbonsai.policies.scheduling.asynchronous import Asynchronous
from fedbonsai.policies.scheduling.closing import Closing
from fedbonsai.policies.selection.deadline import ByDeadline
from fedbonsai.policies.selection.oort import Oort
from fedbonsai.policies.selection.plain import All, Fastest, RandomCohort
from fedbonsai.policies.selection.power_of_choice import PowerOfChoice
from fedbonsai.policies.sparsity.zerofl import ZeroFL
from fedbonsai.policies.tasks import Distil, Restore

EXAMPLES = Path(__file__).parents[2] / "examples"

SELECTIONS = [
    All(),
    RandomCohort(cohort=2),
    RandomCohort(cohort=0.5),
    Fastest(cohort=2),
    ByDeadline(deadline_s=3.0),
    ByDeadline(deadline_s=3.0, cohort=2),
    PowerOfChoice(cohort=2, candidates=3),
    Oort(cohort=2),
    Oort(cohort=2, exploration=0.0, pacer_step_s=1.0, pacer_window=1),
    chain(ByDeadline(deadline_s=3.0), RandomCohort(cohort=2)),
]
POLICIES = [
    Identity(),
    Residuals(),
    SplitFed(cut="conv"),
    LocalLoss(),
    chain(All(), LocalLoss(cut="conv", window=1, bits=8)),
    chain(All(), LocalLoss(cut="auto", first="conv")),
    chain(All(), SplitFed()),
    chain(All(), SplitFed(cut="auto", first="conv", whole=True)),
    chain(All(), SplitFed(head="shared")),
    Asynchronous(),
    chain(Asynchronous(concurrency=3, buffer=2), SplitFed()),
    EcoFed(),
    Closing(after_s=4.0),
    chain(All(), Closing(at=0.5, after_s=4.0, partial=True)),
    chain(All(), EcoFed(cut="auto", depth="conv")),
    chain(All(), EcoFed(uploads="views", refresh=2)),
    chain(All(), EcoFed(depth="conv", bits=0)),
    chain(All(), Residuals(up="half_step", down="none")),
    Width(),
    Distillation(),
    chain(All(), Width()),
    chain(All(), Width(levels=(), deadline_s=2.5, channels="rolling")),
    chain(All(), Width(rule="linear", unit="width", every=1)),
    chain(All(), Width(rule="fixed", widths={f"d{device}": 0.5 for device in range(6)})),
    chain(All(), SplitFed(), Width(), RandomCohort(cohort=2)),
    chain(Asynchronous(concurrency=3, buffer=2), Width(scaled=True)),
    chain(All(), Distillation(class_prior=1.0, every=3)),
    ProFL(),
    chain(All(), ProFL(shrinking=False, unaffordable="head_only"), RandomCohort(cohort=2)),
    chain(Asynchronous(concurrency=3, buffer=2), ProFL(most_groups=1)),
    AllSmall(),
    chain(All(), AllSmall(min_channels=1)),
    ZeroFL(),
    chain(All(), ZeroFL(rule="top_diff", ratios=(0.0, 0.2), levels=(0.5, 0.9), value_bits=8)),
    chain(All(), ZeroFL(rule="all", levels=(0.5, 0.9), deadline_s=2.5, down="configured"), RandomCohort(cohort=2)),
    *SELECTIONS,
]

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=repr)
every_selection = pytest.mark.parametrize("policy", SELECTIONS, ids=repr)


@pytest.fixture
def view(make_view, make_plan, make_report):
    """Six devices in round 4: two seen, one lost, one in flight, one without the memory, one without a report."""
    return make_view(
        seconds=(1, 2, 3, 1, 2, 3),
        samples=(10, 10, 10, 20, 10, 10),
        memory_mb={4: 100},
        version=3,
        in_flight={0: make_plan(0)},
        reports=[make_report(0, loss=1.0), make_report(1, loss=2.0, version=2), make_report(2, version=1)],
        participation={0: 1, 1: 2, 2: 1},
    )


def test_every_built_in_policy_is_a_row():
    assert set(BUILT_IN.values()) <= {type(policy) for policy in POLICIES}


@every_policy
def test_is_a_policy_that_prints_compares_and_pickles(policy):
    assert isinstance(policy, Policy)
    assert type(policy).__name__ in repr(policy)
    again = pickle.loads(pickle.dumps(policy))
    assert again == policy
    assert hash(again) == hash(policy)


@every_policy
def test_state_is_plain_data_before_and_after(policy, view):
    before = policy.init()
    _, after = policy.decide(view, before, Decision())
    for state in (before, after):
        assert msgspec.json.decode(msgspec.json.encode(state)) == state
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(state)) == state


@every_policy
def test_a_restored_state_gives_the_same_decision(policy, view):
    _, state = policy.decide(view, policy.init(), Decision())
    restored = msgspec.json.decode(msgspec.json.encode(state))
    assert policy.decide(view, restored, Decision()) == policy.decide(view, state, Decision())


@every_policy
def test_equal_inputs_give_equal_decisions_and_no_argument_changes(policy, view):
    state, decision = policy.init(), Decision(tasks=(Distil(),))
    state_before, decision_before = copy.deepcopy(state), copy.deepcopy(decision)
    first = policy.decide(view, state, decision)
    assert policy.decide(view, state, decision) == first
    assert (state, decision) == (state_before, decision_before)


@every_selection
def test_chooses_idle_devices_that_fit_once_each_with_a_reason(policy, view):
    decision, _ = policy.decide(view, policy.init(), Decision())
    devices = [plan.device for plan in decision.plans]
    assert devices
    assert len(set(devices)) == len(devices)
    assert set(devices) <= {1, 2, 3, 5}  # 0 is busy, 4 lacks the memory
    assert all(isinstance(device, int) and plan.reasons for device, plan in zip(devices, decision.plans, strict=True))
    assert not set(devices) & {device for device, _ in decision.left_out}
    assert msgspec.json.decode(msgspec.json.encode(decision), type=Decision) == decision


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if "Asynchronous" not in repr(policy)], ids=repr)
def test_returns_the_decision_unchanged_once_the_round_has_begun(policy, view):
    begun = msgspec.structs.replace(Decision(), close_at=2)
    later = copy.copy(view)
    object.__setattr__(later, "dispatched", 1)
    state = policy.init()
    assert policy.decide(later, state, begun) == (begun, state)


@every_selection
def test_a_selection_after_a_selection_narrows_it_and_keeps_its_plans(policy, view, make_plan):
    chosen = tuple(make_plan(device, deadline_s=9.0, reasons=("mine",)) for device in (0, 1, 2, 4))
    before = Decision(plans=chosen, left_out=((5, "battery"),), tasks=(Distil(),), close_at=3)
    after, _ = policy.decide(view, policy.init(), before)
    assert {plan.device for plan in after.plans} <= {1, 2}
    assert all(plan.deadline_s == 9.0 and plan.reasons[0] == "mine" for plan in after.plans)
    assert len(after.plans) == 2
    assert after.left_out[0] == (5, "battery")
    assert (after.tasks, after.close_at) == (before.tasks, 3)


@every_selection
def test_does_not_choose_devices_that_an_earlier_policy_left_out(policy, view):
    decision, _ = policy.decide(view, policy.init(), Decision(left_out=((1, "battery"), (3, "battery"))))
    assert {plan.device for plan in decision.plans} <= {2, 5}
    assert decision.plans


@every_selection
def test_chooses_no_device_in_a_version_that_closes_at_once(policy, view):
    before = Decision(tasks=(Restore(),), close_at=0)
    assert policy.decide(view, policy.init(), before)[0] == before


@pytest.mark.parametrize("policy", [*SELECTIONS, Asynchronous()], ids=repr)
def test_devices_that_cannot_be_reached_are_left_out_with_the_reason(policy, make_view):
    view = make_view(unreachable=frozenset({0, 2}))
    decision, _ = policy.decide(view, policy.init(), Decision())
    assert {plan.device for plan in decision.plans} <= {1, 3}
    assert decision.plans
    unreachable = [entry for entry in decision.left_out if entry[1] == "unreachable: at this time"]
    assert unreachable == [(0, "unreachable: at this time"), (2, "unreachable: at this time")]


@every_selection
def test_without_idle_devices_the_decision_is_empty(policy, make_view, make_plan):
    view = make_view(seconds=(1, 2), in_flight={0: make_plan(0), 1: make_plan(1)})
    decision, _ = policy.decide(view, policy.init(), Decision())
    assert decision.plans == ()


@every_selection
def test_where_no_device_fits_the_decision_is_empty_with_reasons_and_stays_so_in_a_chain(policy, make_view):
    view = make_view(seconds=(1, 2), memory_mb={0: 100, 1: 100})
    decision, _ = chain(policy, All()).decide(view, chain(policy, All()).init(), Decision())
    assert decision.plans == ()
    assert decision.left_out == ((0, "memory: needs 512 MB, has 100 MB"), (1, "memory: needs 512 MB, has 100 MB"))


def test_the_documented_example_keeps_the_contract(view, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    policy = make_policy([{"name": "my_policy:LeastSeen", "cohort": 2}])
    decision, state = policy.decide(view, policy.init(), Decision())
    assert [(plan.device, plan.reasons) for plan in decision.plans] == [
        (3, ("least seen: 0 plans so far",)),  # never seen, 2 s
        (5, ("least seen: 0 plans so far",)),  # never seen, 3 s
    ]
    assert decision.left_out == ((4, "memory: needs 512 MB, has 100 MB"),)
    test_returns_the_decision_unchanged_once_the_round_has_begun(policy, view)
    test_is_a_policy_that_prints_compares_and_pickles(policy)
    assert state is None
    del sys.modules["my_policy"]
