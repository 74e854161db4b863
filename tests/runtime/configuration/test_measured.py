"""Settings that are left open: measured once, kept with the run, and told where they cost time."""

import json
import shutil

import fedbonsai
import pytest
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.measured import MachineMeasurements, advise, measure, settle
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Notice, PlanEnded, RunStarted

AUTO = {"backend": "inline", "stop": {"rounds": 1}, "training": {"precision": "auto"}}


def config(precision):
    return load_config({"training": {"precision": precision}})


@pytest.mark.parametrize(("gain", "precision"), [(0.06, "float32"), (1.0, "float32"), (1.09, "float32"), (1.1, "bf16")])
def test_auto_takes_bf16_where_it_is_a_tenth_faster(gain, precision):
    assert settle(config("auto"), MachineMeasurements(bf16_gain=gain)).training.precision == precision
    for given in ("float32", "bf16"):
        assert settle(config(given), MachineMeasurements(bf16_gain=gain)) == config(given)


def test_only_what_is_open_or_may_be_slow_is_measured():
    assert measure(config("float32")) == MachineMeasurements()
    for precision in ("auto", "bf16"):
        gain = measure(config(precision)).bf16_gain
        assert gain is not None
        assert 1e-3 < gain < 1e3


def test_emulated_bf16_is_told_with_how_slow_it_is():
    (told,) = advise(config("bf16"), MachineMeasurements(bf16_gain=0.0625))
    assert told.startswith(
        "training.precision is 'bf16', which this processor emulates: a training step takes about 16 times"
    )
    assert (
        advise(config("bf16"), MachineMeasurements(bf16_gain=1.7))
        == advise(config("float32"), MachineMeasurements())
        == []
    )


def test_a_run_says_what_it_measured_and_one_that_goes_on_takes_it_from_its_folder(tmp_path):
    folder = tmp_path / "run"
    with fedbonsai.run(AUTO, out=folder) as run:
        events = list(run)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    written = json.loads((folder / "measured.json").read_text())
    assert written == started.measured
    chosen = "bf16" if written["bf16_gain"] >= 1.1 else "float32"
    plans = {event.report.plan.training.precision for event in events if isinstance(event, PlanEnded)}
    assert plans == {chosen}
    # As if another machine had begun the run: what it measured decides, not this one.
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
