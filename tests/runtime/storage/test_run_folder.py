"""The run folder: complete, readable, and sufficient to repeat the run."""

import json
from pathlib import Path

import fedbonsai
import pytest
import torch
import yaml
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import Notice, VersionClosed
from fedbonsai.runtime.storage.run_folder import PACKAGES, RunFolder, default_path, environment
from safetensors.torch import load_file, safe_open

FILES = [
    "best.safetensors",
    "checkpoints",
    "config.yaml",
    "environment.json",
    "events.jsonl",
    "fedbonsai.json",
    "final.safetensors",
    "summary.json",
]


@pytest.fixture(name="finished", scope="module")
def finished_fixture(tmp_path_factory):
    """A finished run's folder, and the run."""
    config = {
        "backend": "inline",
        "fleet": "uniform-10",
        "preset": "fedprox",
        "stop": {"rounds": 2},
        "codecs": {"up": "lz4"},
    }
    folder = tmp_path_factory.mktemp("runs") / "a" / "b"
    with fedbonsai.run(config, settings=["policy.0.cohort=3"], out=folder) as run:
        for _ in run:
            pass
    return folder, run


def test_it_holds_these_files(finished):
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_its_configuration_runs_to_the_same_model(finished, tmp_path):
    folder, run = finished
    again = fedbonsai.run(folder / "config.yaml", out=tmp_path / "again")
    assert again.config.load_fleet() == run.config.load_fleet()
    for _ in again:
        pass
    assert again.summary["model_hash"] == run.summary["model_hash"]
    same = ("accuracy", "loss", "virtual_s", "up_bytes", "down_bytes", "outcomes", "participation", "data")
    assert {key: again.summary[key] for key in same} == {key: run.summary[key] for key in same}
    assert (tmp_path / "again" / "config.yaml").read_text() == (folder / "config.yaml").read_text()


def test_its_configuration_needs_no_other_file(finished):
    folder, _ = finished
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert isinstance(written["fleet"], dict)  # the figures, not a name whose meaning may change
    assert written["policy"] == [{"name": "random", "cohort": 3}]
    assert set(written) == set(load_config().to_dict())


def test_a_policy_given_from_python_is_in_its_configuration(tmp_path, digits):
    from fedbonsai.policies.selection.plain import Fastest

    with fedbonsai.run(digits(stop={"rounds": 1}), policy=Fastest(cohort=1), out=tmp_path / "run") as run:
        for _ in run:
            pass
    again = fedbonsai.run(tmp_path / "run" / "config.yaml")
    for _ in again:
        pass
    assert again.config.policy == ({"name": "fastest", "cohort": 1},)
    assert again.summary["model_hash"] == run.summary["model_hash"]
    assert run.summary["outcomes"]["done"] == 1


def test_it_records_what_the_run_depended_on(finished):
    folder, run = finished
    found = json.loads((folder / "environment.json").read_text())
    assert set(found["packages"]) == set(PACKAGES)
    assert all(found["packages"][name] for name in ("torch", "numpy", "msgspec"))
    assert found["cpus"] >= 1
    assert found["python"].count(".") == 2
    assert set(run.summary["data"]) == {"data", "split"}
    assert environment()["packages"] == found["packages"]


def test_the_weights_are_those_of_the_model(finished):
    folder, run = finished
    final = load_file(folder / "final.safetensors")
    assert all((final[name] == tensor).all() for name, tensor in run.weights("final").items())
    with safe_open(folder / "final.safetensors", "pt") as file:
        assert file.metadata() == {"rounds": "2", "model": "digits_cnn", "name": "run"}
    with safe_open(folder / "best.safetensors", "pt") as file:
        assert file.metadata()["rounds"] == str(run.summary["best_round"])


def test_events_are_written_as_they_happen(tmp_path):
    folder = RunFolder(tmp_path / "run", load_config())
    folder.note(Notice(text="one"))
    assert [json.loads(line)["text"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()] == [
        "one"
    ]
    assert not folder.closed
    folder.close()
    assert folder.closed


def test_a_summary_is_replaced_atomically(tmp_path):
    folder = RunFolder(tmp_path / "run", load_config())
    folder.write_summary({"a": 1})
    folder.write_summary({"a": 2})
    folder.close()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"a": 2}
    assert not list((tmp_path / "run").glob("*.partial"))


def test_only_an_empty_folder_may_exist_already(tmp_path):
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty", load_config()).close()
    with pytest.raises(ConfigError, match=r"empty', which is not empty; name a new folder$"):
        RunFolder(tmp_path / "empty", load_config())


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = set()
    for _ in range(3):
        path = default_path(load_config({"name": "mine"}))
        assert path.parts[0] == "runs"
        assert path.name.startswith("mine-")
        path.mkdir(parents=True)
        found.add(path)
    assert len(found) == 3


def test_of_two_runs_that_find_the_folder_empty_one_succeeds(tmp_path, monkeypatch):
    RunFolder(tmp_path, load_config({"seed": 1})).close()
    monkeypatch.setattr("pathlib.Path.iterdir", lambda path: iter(()))
    with pytest.raises(ConfigError, match=r"which cannot be written: File exists$"):
        RunFolder(tmp_path, load_config({"seed": 2}))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_the_run_in_one_sentence(tmp_path, digits):
    threads = torch.get_num_threads()
    run = fedbonsai.run(digits(), out=tmp_path / "run")
    next(run)
    run.folder.log._file.close()
    run.folder.log._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(RunError, match=r"^stage write: out is '.*run', which can no longer be written: No space left"):
        list(run)
    assert run.folder.closed
    assert torch.get_num_threads() == threads  # the run's resources are released nevertheless
    assert run.summary["status"] == "failed"
    run.close()  # harmless


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_after_a_full_disk_the_run_can_be_resumed(tmp_path, digits, of_type):
    expected = fedbonsai.run(digits())
    list(expected)
    run = fedbonsai.run(digits(), out=tmp_path / "run")
    while not of_type([next(run)], VersionClosed):
        pass
    next(run)  # so that version 1 has its checkpoint
    with (tmp_path / "run" / "events.jsonl").open("a") as log:
        log.write('{"type": "PlanEn')  # the part that still fitted
    run.folder.log._file.close()
    run.folder.log._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(RunError, match=r"No space left on device; make room there, and resume the run$"):
        list(run)
    again = fedbonsai.run(digits(), resume=tmp_path / "run")
    events = list(again)
    assert [event.version for event in of_type(events, VersionClosed)] == [2]
    assert again.summary["model_hash"] == expected.summary["model_hash"]


def test_weights_that_cannot_be_written_fail_the_run(tmp_path, digits):
    run = fedbonsai.run(digits(), out=tmp_path / "run")
    next(run)
    (tmp_path / "run" / "final.safetensors.partial").mkdir()
    with pytest.raises(RunError, match=r"^stage write: out is '.*run', which can no longer be written"):
        list(run)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "can no longer be written" in summary["reason"]


@pytest.mark.parametrize("name", ["a/../../b", "nul\0", "x" * 5000, "ü" * 300, "two words"])
def test_the_default_folder_is_in_runs_whatever_the_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = default_path(load_config({"name": name}))
    path.mkdir(parents=True)
    assert [found.name for found in (tmp_path / "runs").iterdir()] == [path.name]
