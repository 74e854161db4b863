"""What a configuration resolves to: settings that are measured once and kept with the run, and the list that names a policy."""

import json
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import fedbonsai
import pytest
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
    measure,
    measurement_notices,
    workload_settings,
)
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Notice, PlanEnded, RunStarted

AUTO = {"backend": "inline", "stop": {"rounds": 1}, "training": {"precision": "auto"}}


def config(precision):
    return load_config({"training": {"precision": precision}})


@pytest.mark.parametrize(("gain", "precision"), [(0.06, "float32"), (1.0, "float32"), (1.09, "float32"), (1.1, "bf16")])
def test_auto_takes_bf16_where_it_is_a_tenth_faster(gain, precision):
    assert apply_measurements(config("auto"), MachineMeasurements(bf16_gain=gain)).training.precision == precision
    for given in ("float32", "bf16"):
        assert apply_measurements(config(given), MachineMeasurements(bf16_gain=gain)) == config(given)


def test_only_open_or_possibly_slow_settings_are_measured():
    assert measure(config("float32")) == MachineMeasurements()
    for precision in ("auto", "bf16"):
        gain = measure(config(precision)).bf16_gain
        assert gain is not None
        assert 1e-3 < gain < 1e3


def test_emulated_bf16_gives_a_notice_with_its_slowdown():
    (notice,) = measurement_notices(config("bf16"), MachineMeasurements(bf16_gain=0.0625))
    assert notice.startswith(
        "training.precision is 'bf16', which this processor emulates: a training step takes about 16 times"
    )
    assert (
        measurement_notices(config("bf16"), MachineMeasurements(bf16_gain=1.7))
        == measurement_notices(config("float32"), MachineMeasurements())
        == []
    )


def test_a_run_records_what_it_measured_and_a_resumed_run_uses_that(tmp_path):
    folder = tmp_path / "run"
    with fedbonsai.run(AUTO, out=folder) as run:
        events = list(run)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    written = json.loads((folder / "measured.json").read_text())
    assert written == started.measured
    chosen = "bf16" if written["bf16_gain"] >= 1.1 else "float32"
    plans = {event.report.plan.training.precision for event in events if isinstance(event, PlanEnded)}
    assert plans == {chosen}
    # As if the run had begun on another machine: its measurement decides.
    other = {"bf16": 0.1, "float32": 2.0}[chosen]
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "measured.json").write_text(json.dumps({"bf16_gain": other}))
    with (
        pytest.raises(
            ConfigError, match=r"training.precision is 'auto', which is \w+ here; the run that is resumed trained"
        ),
        fedbonsai.run(AUTO | {"stop": {"rounds": 2}}, resume=again) as run,
    ):
        list(run)
    (folder / "measured.json").write_text("{")
    with (
        pytest.raises(ConfigError, match=r"measured\.json' cannot be read"),
        fedbonsai.run(AUTO | {"stop": {"rounds": 2}}, resume=folder) as run,
    ):
        list(run)
    (folder / "measured.json").write_text(json.dumps(written))
    with fedbonsai.run(AUTO | {"stop": {"rounds": 2}}, resume=folder) as run:
        assert not [event for event in run if isinstance(event, Notice) and "emulates" in event.text]
    assert run.summary["rounds"] == 2


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
