"""A policy object as the list that names it: what is written reads back to an equal policy."""

import sys
from dataclasses import dataclass
from typing import Any

import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.policy import Identity, chain
from fedbonsai.policies.resolve_policy import make_policy
from fedbonsai.policies.selection.deadline import ByDeadline
from fedbonsai.policies.selection.oort import Oort
from fedbonsai.policies.selection.plain import All, RandomCohort
from fedbonsai.policies.view import View
from fedbonsai.runtime.configuration.describe_policy import describe_policy


@dataclass(frozen=True)
class Own:
    shares: tuple[float, ...]
    often: int = 2

    def init(self) -> Any:
        return None

    def decide(self, view: View, state: Any, decision: Decision) -> tuple[Decision, Any]:
        return decision, state


@pytest.mark.parametrize(
    "policy",
    [
        All(),
        RandomCohort(cohort=0.5),
        ByDeadline(deadline_s=3.0, cohort=2),
        Oort(cohort=2),
        chain(ByDeadline(deadline_s=1.0), RandomCohort(cohort=3)),
        Identity(),
    ],
)
def test_what_is_described_is_the_same_policy(policy):
    assert make_policy(describe_policy(policy)) == policy


def test_only_what_differs_from_the_defaults_is_told():
    assert describe_policy(RandomCohort(cohort=4)) == ({"name": "random", "cohort": 4},)
    assert describe_policy(All()) == ({"name": "all"},)


def test_a_users_policy_is_named_by_its_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "someones_policies", sys.modules[__name__])
    monkeypatch.setattr(Own, "__module__", "someones_policies")
    described = describe_policy(Own(shares=(0.5, 0.25)))
    assert described == ({"name": "someones_policies:Own", "shares": (0.5, 0.25)},)
    assert make_policy(described) == Own(shares=(0.5, 0.25))


def test_what_no_file_can_hold_is_told_in_words():
    @dataclass(frozen=True)
    class Odd:
        function: Any

    assert describe_policy(Odd(function=len))[0]["function"] == "<built-in function len>"
