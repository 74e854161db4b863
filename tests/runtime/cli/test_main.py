"""The command line: in process through its entry point, and as a real process."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from fedbonsai.clusters.fleet import names as fleet_names
from fedbonsai.policies.presets import PRESETS
from fedbonsai.runtime.cli import main as cli

from ..processes import LIMIT_S, command, has_closed_a_version, heed_interrupts, wait_until


@pytest.fixture(name="call")
def call_fixture(monkeypatch, capsys):
    """``call("run", path)``: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedbonsai", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return call


@pytest.fixture(name="experiment")
def experiment_fixture(tmp_path, digits):
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(digits(stop={"rounds": 1})))
    return path


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "fedbonsai", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        **options,
    )


def test_a_run_prints_a_table_and_names_its_folder(call, experiment, tmp_path):
    code, out, err = call("run", experiment, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("test: fedavg on 3 devices (1 classes), 38,282 parameters")
    assert lines[1].startswith("round 1/1: loss ")
    assert [line.split()[:4] for line in lines[4:7]] == [[device, "board", "38.3k", "done"] for device in "012"]
    assert lines[-1] == f"run folder: {tmp_path / 'run'}"


def test_json_is_the_last_and_only_line(call, experiment, tmp_path):
    code, out, err = call("run", experiment, "--json", "--out", tmp_path / "run", "--seed", "11")
    assert code == 0
    assert out.count("\n") == 1
    assert json.loads(out) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads(out)["seed"] == 11
    assert "round 1/1" in err


def test_flags_win_over_the_file(call, experiment, tmp_path):
    code, out, _ = call(
        "run", experiment, "--preset", "fastest", "--rounds", "2", "--backend", "inline", "--workers", "1",
        "--set", "policy.0.cohort=1", "--set", "name=mine", "--json", "--out", tmp_path / "run",
    )  # fmt: skip
    summary = json.loads(out)
    assert code == 0
    assert (summary["preset"], summary["name"], summary["rounds"], summary["outcomes"]["done"]) == (
        "fastest",
        "mine",
        2,
        2,
    )


def test_without_out_a_folder_is_made_under_runs(call, experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("run", experiment)
    assert code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("test-")
    assert out.splitlines()[-1] == f"run folder: {folder.relative_to(tmp_path)}"


def test_lists(call):
    code, out, _ = call("presets")
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, rows[0], [row[0] for row in rows[1:]]) == (0, ["preset", "what it does", "source"], list(PRESETS))
    code, out, _ = call("fleets")
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, [row[0] for row in rows[1:]]) == (0, list(fleet_names()))
    assert {row[0]: row[2] for row in rows}["laptop"] == "1 desktop, 2 notebook, 2 tablet, 2 phone, 1 board"
    code, out, _ = call("models")
    names = [line.split("\t")[0] for line in out.splitlines()]
    assert code == 0
    assert {"digits_cnn", "resfed_cnn", "vgg11_bn", "vgg16_bn", "resnet18", "torchvision/mobilenet_v3_small"} <= set(
        names
    )


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["probe", "--help"]])
def test_help(call, arguments):
    code, out, _ = call(*arguments)
    assert code == 0
    assert "Usage:" in out


def test_every_command_and_option_is_documented(call):
    out = call("--help")[1]
    assert all(command in out for command in ("run", "advise", "presets", "fleets", "models", "probe"))
    out = call("run", "--help")[1]
    for option in ("--preset", "--set", "--seed", "--rounds", "--out", "--backend", "--workers", "--json"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run"], "missing argument 'config'"),
        (["run", "e.yaml", "--seed", "x"], "invalid value for '--seed'"),
        (["run", "e.yaml", "--sed", "1"], "no such option: --sed"),
        (["rum"], "no such command 'rum'"),
        (["probe", "--seconds", "0"], "--seconds is 0; it must be above 0"),
        (["probe", "--threads", "0"], "--threads is 0; it must be 1 or more"),
    ],
)
def test_a_wrong_command_line_exits_with_two(call, arguments, sentence):
    code, _, err = call(*arguments)
    assert code == 2
    assert sentence in err.lower()
    assert "Traceback" not in err


def test_a_failed_run_exits_with_one_and_no_traceback(call, experiment, tmp_path):
    setting = "policy=[{name: deadline, deadline_s: 1.0e-9}]"
    code, _, err = call("run", experiment, "--set", setting, "--out", tmp_path / "run")
    assert code == 1
    assert err.startswith("error: round 0, stage decide: the policy chose no device while none is in flight")
    assert err.count("\n") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_real_process_runs_an_experiment(experiment, tmp_path):
    found = process("run", experiment, "--json", "--out", tmp_path / "run")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["status"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--set", "codecs.up=[lz4, entropy]"],
            "error: codecs.up: 'features.0.weight' has no fixed shape; entropy must",
        ),
        (["--set", "training.epoch=1"], "error: training.epoch is not a setting (did you mean 'epochs'?)"),
        (
            ["--set", "model=digits_cnm"],
            "error: model.name is 'digits_cnm', which is unknown; did you mean digits_cnn?",
        ),
        (["--out", "/proc/nothing/run"], "error: out is '/proc/nothing/run', which cannot be written: "),
    ],
)
def test_a_real_process_refuses_bad_input_on_one_line(experiment, tmp_path, arguments, sentence):
    found = process("run", experiment, *arguments, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(sentence)
    assert found.stderr.count("\n") == 1


def test_the_handler_of_sigterm_is_restored(call):
    before = signal.getsignal(signal.SIGTERM)
    call("presets")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_and_leaves_a_readable_folder(experiment, tmp_path, number, code):
    folder = tmp_path / "run"
    arguments = [sys.executable, "-m", "fedbonsai", "run", str(experiment), "--rounds", "100000", "--out", str(folder)]
    arguments += ["--set", "checkpoint.every=100000"]
    with command(arguments, preexec_fn=heed_interrupts) as running:
        wait_until(lambda: running.poll() is not None or has_closed_a_version(folder))
        os.kill(running.pid, number)
        _, err = running.communicate(timeout=LIMIT_S)
    assert running.returncode == code
    assert err == "interrupted\n"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["rounds"] >= 1
    assert (folder / "final.safetensors").exists()
    for line in (folder / "events.jsonl").read_text().splitlines():
        json.loads(line)
    if number == signal.SIGTERM:  # within the grace period its round ended and a checkpoint was written
        assert (folder / "checkpoints" / f"{summary['rounds']:08d}.checkpoint").exists()
        rounds = str(summary["rounds"] + 1)
        again = process("run", experiment, "--resume", folder, "--rounds", rounds, cwd=tmp_path)
        assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--set=policy=[]"],
            "policy is empty, so that no device would be chosen; allowed: a list such as [{name: all}]",
        ),
        (["--set=checkpoint.to=file"], "checkpoint.to is 'file', which cannot be used: Not a directory"),
        (
            ["--set=checkpoint.to=mine"],
            "checkpoint.to is 'mine', which is not empty, and holds no checkpoints of fedbonsai (ring.data);",
        ),
        (["--set=model=nonsense"], "model.name is 'nonsense', which is unknown"),
        (
            ["--set=fleet=twice.yaml"],
            "fleet 'twice.yaml' cannot be read as YAML: key 'name' occurs twice (line 1, column 11)",
        ),
        (
            ["--set=model.kwargs=!!timestamp foo"],
            "--set is 'model.kwargs=!!timestamp foo', whose value is not YAML: tag '!!timestamp'",
        ),
    ],
)
def test_a_mistake_that_is_detected_late_is_a_sentence_and_leaves_no_folder(
    arguments, sentence, digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ring.data").write_text("mine")
    (tmp_path / "twice.yaml").write_text("{name: a, name: b}")
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(digits(stop={"rounds": 1})))
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["fedbonsai", "run", "e.yaml", *arguments, "--out", "deep/run"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {sentence}")
    assert stderr.count("\n") == 1
    assert caught.value.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "mine" / "ring.data").read_text() == "mine"
