"""Devices that cannot be reached now are no candidates, and the reason says so."""

import dataclasses

import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.policy import chain
from fedbonsai.policies.rhythm.asynchronous import Asynchronous
from fedbonsai.policies.selection.deadline import ByDeadline
from fedbonsai.policies.selection.oort import Oort
from fedbonsai.policies.selection.plain import All, Fastest, RandomCohort
from fedbonsai.policies.selection.power_of_choice import PowerOfChoice

SELECTIONS = [
    All(),
    RandomCohort(cohort=3),
    Fastest(cohort=3),
    ByDeadline(deadline_s=10.0),
    PowerOfChoice(cohort=3, candidates=4),
    Oort(cohort=3),
    Asynchronous(),
    chain(All(), Fastest(cohort=2)),
]


@pytest.mark.parametrize("policy", SELECTIONS, ids=lambda policy: type(policy).__name__)
def test_every_selection_leaves_them_out(make_view, policy):
    view = dataclasses.replace(make_view(), unreachable=frozenset({0, 2}))
    decision, _ = policy.decide(view, policy.init(), Decision())
    assert {plan.device for plan in decision.plans} <= {1, 3}
    assert decision.plans
    assert [entry for entry in decision.left_out if entry[1] == "unreachable: at this time"] == [
        (0, "unreachable: at this time"),
        (2, "unreachable: at this time"),
    ]
