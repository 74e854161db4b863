"""Turns: the plan that uses the shared blocks of a host next."""

import json
from types import MappingProxyType

import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.partitioning.splitfed import SplitFed

POLICY = SplitFed(head="shared")


@pytest.fixture(name="asked")
def asked_fixture(make_view, make_plan):
    """``asked(state, out=plans in flight, cohort=devices of the policy before)``: devices that are sent, keep_open, state."""

    def ask(state, *, out=(), cohort=(), seed=7, version=0, hosts=1, **decided):
        flying = MappingProxyType({plan.device: plan for plan in out})
        view = make_view(seconds=(1,) * 6, hosts=hosts, in_flight=flying, seed=seed, version=version)
        plans = tuple(make_plan(device, version=version, reasons=("mine",)) for device in cohort)
        decision, state = POLICY.decide(view, state, Decision(plans=plans, **decided))
        return decision.plans, decision.keep_open, json.loads(json.dumps(state))

    return ask


def whole_round(asked, *, cohort, seed=7, hosts=1):
    """The devices in the order in which they are sent, each ending before the next decision."""
    found, open_, state = asked(None, cohort=cohort, seed=seed, hosts=hosts)
    order = [plan.device for plan in found]
    while open_:
        found, open_, state = asked(state, hosts=hosts)
        order += [plan.device for plan in found]
    assert state is None
    return order


def test_one_after_another_each_once_in_an_order_of_the_seed(asked):
    orders = [whole_round(asked, cohort=range(6), seed=seed) for seed in range(20)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    assert orders[3] == whole_round(asked, cohort=range(6), seed=3)


def test_plans_are_sent_as_the_policies_before_made_them(asked):
    (first,), _, state = asked(None, cohort=(0, 1))
    (second,), open_, _ = asked(state)
    assert {first.device, second.device} == {0, 1}
    assert not open_
    for plan in (first, second):
        assert plan.reasons == ("mine", "splitfed: cut behind conv")
        assert (plan.seed, plan.split.head) == (1000 + plan.device, "shared")


def test_hosts_work_in_parallel(asked):
    first, _, state = asked(None, cohort=range(4), hosts=2)
    assert {plan.split.host for plan in first} == {0, 1}
    slow, quick = sorted(first, key=lambda plan: plan.split.host)
    nobody, open_, same = asked(state, out=first, hosts=2)
    assert (nobody, open_, same) == ((), True, state)
    (next_,), open_, state = asked(state, out=[slow], hosts=2)
    assert (next_.split.host, open_) == (1, True)
    assert next_.device != quick.device
    assert asked(state, out=[slow, next_], hosts=2)[0] == ()
    (last,), open_, _ = asked(state, out=[], hosts=2)
    assert (last.split.host, open_) == (0, False)


def test_plans_that_wait_for_a_version_that_has_closed_are_dropped(asked):
    (late,), _, state = asked(None, cohort=(0, 1))
    assert asked(state, version=1, out=[late]) == ((), False, None)
    # A late plan of an earlier version blocks the turn of its device only.
    others = [device for device in (0, 1) if device != late.device]
    (plan,), open_, _ = asked(state, version=1, out=[late], cohort=others)
    assert (plan.device, open_) == (others[0], False)


def test_a_device_is_not_queued_twice(asked):
    first, _, state = asked(None, cohort=(0, 1, 2))
    waiting = {0, 1, 2} - {first[0].device}
    _, _, state = asked(state, out=first, cohort=sorted(waiting))
    assert sorted(plan["device"] for plan in state["waiting"]["0"]) == sorted(waiting)


def test_of_the_waiting_plans_only_the_one_that_is_sent_is_decoded(asked):
    """Otherwise a round of n turns would decode n times n plans."""
    _, _, state = asked(None, cohort=range(4))
    next_, *others = state["waiting"]["0"]
    unread = [{"device": plan["device"]} for plan in others]
    (sent,), _, state = asked(state | {"waiting": {"0": [next_, *unread]}})
    assert sent.device == next_["device"]
    assert state["waiting"]["0"] == unread


def test_a_version_that_another_policy_keeps_open_stays_so(asked):
    assert asked(None, keep_open=True)[1]
