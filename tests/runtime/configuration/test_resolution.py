"""What a configuration resolves to: settings that are measured once and kept with the run, and the list that names a policy."""

import sys
from dataclasses import dataclass
from typing import Any

import pytest
from fedbonsai.learning.spec import MeasuredForm
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.policy import Identity, chain
from fedbonsai.policies.resolve_policy import make_policy
from fedbonsai.policies.selection.deadline import ByDeadline
from fedbonsai.policies.selection.oort import Oort
from fedbonsai.policies.selection.plain import All, RandomCohort
from fedbonsai.policies.view import View
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.resolution import (
    MachineMeasurements,
    apply_measurements,
    describe_policy,
    in_form,
    is_open,
    workload_settings,
)

FORM = MeasuredForm(precision="bf16", layout="channels_last", step_s={"bf16, channels_last": 0.1})


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({"precision": "auto", "layout": "auto"}, ("bf16", "channels_last")),
        ({"precision": "auto"}, ("bf16", "contiguous")),
        ({"layout": "auto"}, ("float32", "channels_last")),
        ({"precision": "float32", "layout": "contiguous"}, ("float32", "contiguous")),
    ],
)
def test_a_measurement_sets_what_is_left_open_and_nothing_else(given, resolved):
    config = load_config({"training": given})
    assert is_open(config.training) == ("auto" in given.values())
    training = apply_measurements(config, MachineMeasurements(training=FORM)).training
    assert (training.precision, training.layout) == resolved
    assert not is_open(training)
    assert apply_measurements(config, MachineMeasurements()) == config
    plain = in_form(config).training
    assert (plain.precision, plain.layout) == ("float32", "contiguous")


def test_a_table_of_kernels_counts_only_where_kernels_are_chosen_by_it():
    table = {"features.2 at 0.9, 0.9": {"kernels": ["native", "native", "dense"], "times": [0.5, 0.5, 1.0]}}
    found = {}
    for chosen in ("auto", "dense"):
        sparse = {"training": {"sparsity": {}}, "kernels": {"sparse": chosen, "table": table}}
        found[chosen] = workload_settings(load_config(sparse), num_devices=8).kernels
    assert (list(found["auto"]), found["dense"]) == (list(table), {})


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
def test_a_description_reads_back_to_an_equal_policy(policy):
    assert make_policy(describe_policy(policy)) == policy


def test_only_fields_that_differ_from_their_defaults_are_described():
    assert describe_policy(RandomCohort(cohort=4)) == ({"name": "random", "cohort": 4},)
    assert describe_policy(All()) == ({"name": "all"},)


def test_a_users_policy_is_named_by_its_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "someones_policies", sys.modules[__name__])
    monkeypatch.setattr(Own, "__module__", "someones_policies")
    described = describe_policy(Own(shares=(0.5, 0.25)))
    assert described == ({"name": "someones_policies:Own", "shares": (0.5, 0.25)},)
    assert make_policy(described) == Own(shares=(0.5, 0.25))


def test_a_value_that_yaml_cannot_hold_is_described_by_its_repr():
    @dataclass(frozen=True)
    class Odd:
        function: Any

    assert describe_policy(Odd(function=len))[0]["function"] == "<built-in function len>"
