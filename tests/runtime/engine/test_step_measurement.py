"""Precision and layout in whole runs: measured before the first round, kept with the run, and equal to the same values set."""

import json
import shutil
import sys

import fedbonsai
import pytest
from fedbonsai.actors.inline_pool import InlinePool
from fedbonsai.learning.spec import Training
from fedbonsai.learning.workload import Workload
from fedbonsai.runtime.cli.advise import advise
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.engine import engine
from fedbonsai.runtime.engine.step_measurement import measure_form
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Notice, PlanEnded, RunStarted
from torch import nn

from ..resuming import started

BOTH = {"precision": "auto", "layout": "auto"}
BASE = {"backend": "inline", "evaluation": {"where": "none"}, "stop": {"rounds": 1}}
CHANNELS_LAST = {"float32, contiguous": 0.4, "float32, channels_last": 0.3}
FASTEST_LAST = [0.4, 0.3, 0.3, 0.2]


def config(training=BOTH, **changes):
    return BASE | {"training": {"batch_size": 16, "steps": 2, **training}} | changes


def texts(events):
    return [event.text for event in events if isinstance(event, Notice)]


@pytest.fixture(name="timings")
def timings_fixture(monkeypatch):
    """These seconds in place of a measurement, of which the plans are noted; the processor has bf16 instructions."""
    found = {"seconds": FASTEST_LAST, "calls": []}

    def time_steps(pool, plans):
        found["calls"].append(plans)
        return found["seconds"][: len(plans)]

    monkeypatch.setattr(InlinePool, "time_steps", time_steps)
    monkeypatch.setattr(engine, "emulating_here", list)
    return found


def test_a_run_records_what_it_measured_and_a_resumed_run_uses_that(tmp_path, timings):
    folder = tmp_path / "run"
    timings["seconds"] = [0.4, 0.3]
    run = fedbonsai.run(config({"layout": "auto"}), out=folder)
    events = list(run)
    (first,) = [event for event in events if isinstance(event, RunStarted)]
    written = json.loads((folder / "measured.json").read_text())
    assert written == first.measured
    assert written == {"training": {"precision": "float32", "layout": "channels_last", "step_s": CHANNELS_LAST}}
    assert {event.report.plan.training.layout for event in events if isinstance(event, PlanEnded)} == {"channels_last"}
    (notice,) = texts(events)
    assert notice == (
        "training in float32, channels_last, by measured steps: float32, contiguous 400 ms; float32, channels_last 300 ms"
    )
    (plans,) = timings["calls"]
    assert [plan.training.batch_size for plan in plans] == [16, 16]
    assert all(plan.part.trained == plan.part.blocks for plan in plans)

    # Nothing is measured again, whatever would be found now.
    longer = config({"layout": "auto"}, stop={"rounds": 2})
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    run = fedbonsai.run(longer, resume=folder)
    layouts = {event.report.plan.training.layout for event in run if isinstance(event, PlanEnded)}
    assert layouts == {"channels_last"}
    assert len(timings["calls"]) == 1
    assert json.loads((folder / "measured.json").read_text()) == written

    # Without the record the run is measured, and what the checkpoint says must come out.
    (again / "measured.json").unlink()
    timings["seconds"] = [0.3, 0.3]
    with pytest.raises(
        ConfigError,
        match=r"training.layout is 'auto', which is contiguous here; the run that is resumed .*channels_last",
    ):
        list(fedbonsai.run(longer, resume=again))
    (again / "measured.json").write_text("{")
    with pytest.raises(ConfigError, match=r"measured\.json' cannot be read"):
        list(fedbonsai.run(longer, resume=again))


def test_a_run_that_died_before_its_first_checkpoint_keeps_its_record(tmp_path, timings):
    """Also where something else is written again: a table of kernels that the configuration gives."""
    given = config(kernels={"table": {"features.2 at 0.9, 0.9": {"times": [0.5, 0.5, 0.5]}}})
    started(given, tmp_path / "run", stops=0)
    written = json.loads((tmp_path / "run" / "measured.json").read_text())
    timings["seconds"] = [0.3] * 4
    run = fedbonsai.run(given, resume=tmp_path / "run")
    plans = [event.report.plan.training for event in run if isinstance(event, PlanEnded)]
    assert {(plan.precision, plan.layout) for plan in plans} == {("bf16", "channels_last")}
    assert json.loads((tmp_path / "run" / "measured.json").read_text()) == written
    assert sorted(written) == ["kernels", "training"]
    assert len(timings["calls"]) == 1


@pytest.mark.parametrize(
    ("seconds", "form"), [(FASTEST_LAST, ("bf16", "channels_last")), ([0.3] * 4, ("float32", "contiguous"))]
)
def test_the_run_has_the_bits_of_the_same_run_with_the_values_set(timings, seconds, form):
    timings["seconds"] = seconds
    hashes = []
    for training in (BOTH, dict(zip(("precision", "layout"), form, strict=True))):
        run = fedbonsai.run(config(training))
        list(run)
        hashes.append((run.summary["model_hash"], run.summary["virtual_s"], run.summary["up_bytes"]))
    assert len(timings["calls"]) == 1
    assert hashes[0] == hashes[1]


def test_steps_are_really_measured_and_leave_no_trace():
    """In every alternative that this processor has; the run equals one with the values that were chosen."""
    run = fedbonsai.run(config())
    (first,) = [event for event in run if isinstance(event, RunStarted)]
    found = first.measured["training"]
    assert {"float32, contiguous", "float32, channels_last"} <= found["step_s"].keys()
    assert all(0 < seconds < 60 for seconds in found["step_s"].values())
    chosen = fedbonsai.run(config({name: found[name] for name in BOTH}))
    list(chosen)
    assert chosen.summary["model_hash"] == run.summary["model_hash"]


class Refusing:
    """A pool that is not to be asked."""

    def ready(self):
        raise AssertionError("nothing is to be measured")


@pytest.mark.parametrize(
    ("settings", "emulating", "chosen"),
    [
        ({}, [], None),
        ({"precision": "bf16", "layout": "channels_last"}, [], None),
        ({"precision": "auto"}, ["10.0.0.2"], ("float32", "contiguous")),
        ({"precision": "auto", "layout": "channels_last"}, ["10.0.0.2"], ("float32", "channels_last")),
    ],
)
def test_nothing_is_measured_where_nothing_is_to_choose(settings, emulating, chosen):
    given = load_config(config(settings))
    workload = Workload(workload_settings(given, num_devices=8))
    form, notices = measure_form(given, Refusing(), workload, emulating=emulating)
    assert (form and (form.precision, form.layout)) == chosen
    assert form is None or form.step_s == {}
    expected = "training.precision is 'auto', which is float32: 10.0.0.2 lacks bf16 instructions"
    assert notices == ([expected] if emulating else [])


def flat(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def test_a_model_without_convolutions_has_no_layouts(monkeypatch):
    monkeypatch.setitem(sys.modules, "flat_models", sys.modules[__name__])
    given = load_config(config({"layout": "auto"}, model="flat_models:flat"))
    workload = Workload(workload_settings(given, num_devices=8))
    form, notices = measure_form(given, Refusing(), workload, emulating=[])
    assert form is not None
    assert (form.layout, notices) == ("contiguous", [])


def test_steps_that_fail_give_the_plain_form_and_a_notice(timings):
    timings["seconds"] = [None] * 4
    run = fedbonsai.run(config())
    events = list(run)
    assert texts(events) == ["training in float32, contiguous: its steps failed when they were to be measured"]
    plans = [event.report.plan.training for event in events if isinstance(event, PlanEnded)]
    assert {(plan.precision, plan.layout) for plan in plans} == {("float32", "contiguous")}


def test_emulated_bf16_gives_a_notice():
    given = load_config(config({"precision": "bf16"}))
    workload = Workload(workload_settings(given, num_devices=8))
    _, (notice,) = measure_form(given, Refusing(), workload, emulating=["10.0.0.2", "10.0.0.3"])
    assert notice.startswith(
        "training.precision is 'bf16', and 10.0.0.2, 10.0.0.3 lack its instructions: it is emulated"
    )


def test_advice_counts_the_plain_form(timings):
    assert advise(load_config(config())) == advise(load_config(config({})))
    assert timings["calls"] == []


def test_kernels_are_measured_in_one_precision_and_layout():
    sparse = {"training": {"sparsity": {}, "layout": "auto"}, "kernels": {"sparse": "auto"}}
    with pytest.raises(
        ConfigError, match=r"training.layout is 'auto', and kernels.sparse is 'auto', measured in one layout; allowed"
    ):
        load_config(sparse)


@pytest.mark.usefixtures("cluster")
def test_a_worker_on_ray_measures_and_all_train_as_in_process(tmp_path):
    """Also after a resume in process, which takes the record."""
    checked = config(checkpoint={"share": None}, backend="ray", workers=2)
    run = fedbonsai.run(checked, out=tmp_path / "run")
    events = list(run)
    found = json.loads((tmp_path / "run" / "measured.json").read_text())["training"]
    assert {"float32, contiguous", "float32, channels_last"} <= found["step_s"].keys()
    assert len([text for text in texts(events) if text.startswith("training in ")]) == 1
    chosen = {name: found[name] for name in BOTH}
    same = fedbonsai.run(config(chosen, stop={"rounds": 2}))
    list(same)
    resumed = fedbonsai.run(config(checkpoint={"share": None}, stop={"rounds": 2}), resume=tmp_path / "run")
    plans = [event.report.plan.training for event in resumed if isinstance(event, PlanEnded)]
    assert {(plan.precision, plan.layout) for plan in plans} == {tuple(chosen.values())}
    assert resumed.summary["model_hash"] == same.summary["model_hash"]


def test_the_defaults_are_the_plain_form():
    assert (Training().precision, Training().layout) == ("float32", "contiguous")
