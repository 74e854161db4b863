"""The Python API: iterate a run, then read its summary and model."""

import json

import fedbonsai
import numpy as np
import pytest
import torch
from fedbonsai.learning.data.vision import load_digits
from fedbonsai.learning.store import model_hash
from fedbonsai.policies.selection.plain import Fastest
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import PlanEnded, RunEnded, RunStarted, VersionClosed
from fedbonsai.runtime.execution.inline_session import InlineSession
from fedbonsai.runtime.storage.run_folder import RunFolder


def accuracy_of(model):
    """Accuracy on the bundled digits' test images, without our own evaluation."""
    test = load_digits().test
    samples = test.take(np.arange(len(test)))
    with torch.no_grad():
        return float((model(samples.x - 0).argmax(1) == samples.y).float().mean())


def test_a_run_is_iterated_for_its_events(digits):
    run = fedbonsai.run(digits())
    events = list(run)
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunEnded)
    assert run.summary["status"] == "finished"
    assert sorted(run.reports) == [0, 1, 2]
    assert all(isinstance(event, PlanEnded) for event in run.reports.values())
    assert list(run) == []


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", ({"name": "all"},)),
        ({"name": "random", "cohort": 2}, ({"name": "random", "cohort": 2},)),
        ([{"name": "random", "cohort": np.int64(2)}], ({"name": "random", "cohort": 2},)),
        (("all", {"name": "fastest", "cohort": 0.5}), ({"name": "all"}, {"name": "fastest", "cohort": 0.5})),
        (Fastest(cohort=1), ({"name": "fastest", "cohort": 1},)),
    ],
)
def test_the_policy_is_an_object_or_the_setting(digits, policy, expected):
    with fedbonsai.run(digits(), policy=policy) as run:
        assert run.config.policy == expected
        assert isinstance(next(run), RunStarted)


def test_settings_may_be_paths_and_numbers_of_numpy(digits, tmp_path):
    numbers = {"seed": np.int64(4), "workers": np.uint8(1), "stop": {"rounds": np.int32(1)}}
    numbers |= {"training": {"optimiser": {"learning_rate": np.float32(0.5), "nesterov": np.bool_(True)}}}
    sections = {"checkpoint": {"to": tmp_path / "to"}, "evaluation": {"every": np.int64(2)}}
    run = fedbonsai.run(digits() | numbers, out=tmp_path / "run", **sections)
    assert (run.config.seed, run.config.stop.rounds, run.config.evaluation.every) == (4, 1, 2)
    assert (run.config.training.optimiser.learning_rate, run.config.training.optimiser.nesterov) == (0.5, True)
    assert run.config.checkpoint.to == str(tmp_path / "to")
    assert isinstance(list(run)[-1], RunEnded)
    assert fedbonsai.load_config({"out": tmp_path}).out == str(tmp_path)
    assert fedbonsai.run(digits(), seed=np.int64(4)).config.seed == 4


def test_the_summary_can_be_read_during_the_run(digits):
    run = fedbonsai.run(digits())
    rounds = [run.summary["rounds"] for event in run if isinstance(event, VersionClosed)]
    assert rounds == [1, 2]


def test_the_model_has_the_accuracy_of_the_summary(digits):
    run = fedbonsai.run(digits(stop={"rounds": 3}))
    for _ in run:
        pass
    model = run.model()
    assert not model.training
    assert model_hash(model.state_dict()) == run.summary["model_hash"]
    # The digits are normalised before they enter the model; evaluation's transform is the data's
    from fedbonsai.learning.workload import Workload
    from fedbonsai.runtime.configuration.resolution import workload_settings

    data = Workload(workload_settings(run.config, num_devices=3)).data
    samples = data.server_test()
    with torch.no_grad():
        output = model(data.test_transform(samples.x, torch.Generator()))
    assert float((output.argmax(1) == samples.y).float().mean()) == pytest.approx(run.summary["accuracy"])


def test_the_best_is_not_always_the_last(digits):
    # Round 2 has a learning rate that makes the model worse.
    config = digits(schedule={"name": "step", "gamma": 1.0, "milestones": []}, stop={"rounds": 3})
    config["training"] = {"batch_size": 64, "optimiser": {"learning_rate": 3.0, "momentum": 0.0, "clip_norm": 1.0}}
    run = fedbonsai.run(config)
    for _ in run:
        pass
    summary = run.summary
    best, final = run.weights("best"), run.weights("final")
    assert model_hash(final) == summary["model_hash"]
    assert (model_hash(best) == model_hash(final)) == (summary["best_round"] == summary["rounds"])
    assert summary["best_accuracy"] >= summary["accuracy"]
    assert isinstance(run.model("best"), torch.nn.Module)


def test_a_model_exists_only_at_the_end(digits):
    run = fedbonsai.run(digits())
    with pytest.raises(RuntimeError, match=r"^the run has no 'final' weights yet; iterate it to its end first$"):
        run.model()
    run.close()


def test_a_policy_object_acts_in_place_of_the_configured_chain(digits):
    run = fedbonsai.run(digits(policy=[{"name": "all"}]), policy=Fastest(cohort=1))
    devices = [event.report.plan.device for event in run if isinstance(event, PlanEnded)]
    assert devices == [0, 0]
    assert run.config.policy == ({"name": "fastest", "cohort": 1},)


def test_settings_and_overrides(digits):
    run = fedbonsai.run(digits(), settings=["stop.rounds=1", "seed=8"], seed=9, workers=None)
    assert (run.config.stop.rounds, run.config.seed, run.config.workers) == (1, 9, None)
    with pytest.raises(ConfigError, match=r"^sead is not a setting \(did you mean 'seed'\?\)"):
        fedbonsai.run(digits(), sead=1)


def test_without_a_folder_nothing_is_written(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in fedbonsai.run(digits(stop={"rounds": 1})):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leave", ["close", "with"])
def test_leaving_early_leaves_a_readable_folder(digits, tmp_path, leave):
    run = fedbonsai.run(digits(stop={"rounds": 50}), out=tmp_path / "run")
    if leave == "close":
        for event in run:
            if isinstance(event, VersionClosed):
                break
        run.close()
    else:
        with run:
            next(event for event in run if isinstance(event, VersionClosed))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["rounds"]) == ("interrupted", "interrupted", 1)
    assert summary == run.summary
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["type"] == "VersionClosed"
    assert (tmp_path / "run" / "final.safetensors").exists()
    assert isinstance(run.model(), torch.nn.Module)
    run.close()  # has no effect


def test_a_run_that_never_began_leaves_nothing(digits, tmp_path):
    with fedbonsai.run(digits(), out=tmp_path / "a" / "b") as run:
        assert (tmp_path / "a" / "b" / "config.yaml").exists()
    assert list(tmp_path.iterdir()) == []
    assert (run.summary["status"], run.summary["rounds"]) == ("interrupted", 0)


def test_a_run_that_fails_leaves_a_readable_folder_with_the_reason(digits, tmp_path):
    run = fedbonsai.run(digits(policy=[{"name": "deadline", "deadline_s": 1e-9}]), out=tmp_path / "run")
    with pytest.raises(RunError) as caught:
        list(run)
    assert (caught.value.round, caught.value.stage) == (0, "decide")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", str(caught.value))
    assert "deadline" in summary["reason"]


def test_a_mistake_detected_while_building_is_a_configuration_error(digits, tmp_path):
    run = fedbonsai.run(digits(model="nonsense"), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^model.name is 'nonsense'"):
        next(run)
    assert run.summary["status"] == "failed"
    corrected = fedbonsai.run(digits(stop={"rounds": 1}), out=tmp_path / "run")  # the name is free again
    assert isinstance(list(corrected)[-1], RunEnded)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_a_run_that_never_began_removes_only_what_it_has_created(digits, tmp_path):
    """A folder that existed before is kept, also one with a file of somebody else, and the folder of checkpoints."""
    for name in ("empty", "filled"):
        (tmp_path / name).mkdir()
    for name in ("empty", "filled", "new"):
        to = {"checkpoint": {"to": str(tmp_path / f"{name} to")}}
        run = fedbonsai.run(digits(model="nonsense") | to, out=tmp_path / name)
        assert (tmp_path / f"{name} to" / "fedbonsai.json").exists()
        if name == "filled":
            (tmp_path / name / "mine.txt").write_text("mine")
            (tmp_path / f"{name} to" / "mine.data").write_text("mine")
        with pytest.raises(ConfigError, match=r"^model.name is 'nonsense'"):
            next(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "filled", "filled to"]
    assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "filled" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "filled to" / "mine.data").read_text() == "mine"


def test_of_two_commands_that_race_for_a_folder_the_second_is_refused_and_changes_nothing(digits, tmp_path):
    first = fedbonsai.run(digits(stop={"rounds": 1}), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"which is not empty; name a new folder$"):
        fedbonsai.run(digits(), out=tmp_path / "run")
    assert isinstance(list(first)[-1], RunEnded)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("end", ["finished", "closed", "failed"])
def test_torchs_number_of_threads_is_restored(digits, end):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run = fedbonsai.run(digits(model="nonsense") if end == "failed" else digits())
        if end == "failed":
            with pytest.raises(ConfigError):
                next(run)
        else:
            next(run)
            assert torch.get_num_threads() == 3  # between two steps the process has the caller's setting
            _ = run.close() if end == "closed" else list(run)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_torchs_global_generator_is_not_touched(digits):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    np_before = np.random.get_state()[1].copy()
    list(fedbonsai.run(digits()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == np_before).all()


def test_a_loop_that_is_left_ends_the_run_at_once(digits, tmp_path):
    threads = torch.get_num_threads()
    for _ in fedbonsai.run(digits(), out=tmp_path / "run"):
        break
    assert torch.get_num_threads() == threads
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


def test_folders_are_checked_at_once(digits, tmp_path):
    RunFolder(tmp_path / "run", fedbonsai.load_config(digits())).close()
    with pytest.raises(ConfigError, match="which is not empty"):
        fedbonsai.run(digits(), out=tmp_path / "run")


def test_a_run_needs_no_settings_beyond_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fedbonsai.run(backend="inline", settings=["stop.rounds=1"])
    list(run)
    assert run.summary["name"] == "run"
    assert 0 < run.summary["accuracy"] <= 1


def test_an_interrupt_does_not_wait_for_weights_that_never_arrive(digits, tmp_path, monkeypatch):
    waited = []

    def busy(session, which, metadata, *, timeout_s):
        waited.append(timeout_s)
        raise RunError("the server did not hand out the weights")

    monkeypatch.setattr(InlineSession, "weights", busy)
    run = fedbonsai.run(digits(), out=tmp_path / "run")
    next(run)
    run.close()
    assert waited == [10.0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    with pytest.raises(RunError, match="did not hand out"):
        list(fedbonsai.run(digits()))
    assert waited == [10.0, 120.0]
