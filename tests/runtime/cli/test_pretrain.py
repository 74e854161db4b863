"""``fedbonsai pretrain``, and runs that start from its file."""

import json
from pathlib import Path
from typing import Any

import fedbonsai
import pytest
import torch
import yaml
from fedbonsai.learning.store import model_hash
from fedbonsai.learning.training.pretraining import Recipe
from fedbonsai.runtime.cli.pretrain import pretrain
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.errors import ConfigError, RunError
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

SHORT = Recipe(epochs=1, learning_rate=0.05)


def synthetic(num_classes: int, size: int = 8) -> dict[str, Any]:
    return {"name": "synthetic", "kwargs": {"shape": [1, size, size], "classes": num_classes, "samples_per_device": 20}}


@pytest.fixture
def public(tmp_path: Path, digits: Any) -> Path:
    """A file pretrained on a tenth of digits."""
    path = tmp_path / "public.safetensors"
    pretrain(load_config(digits(data={"public_share": 0.1})), out=path, recipe=SHORT)
    return path


def test_the_file_has_its_provenance(public: Path) -> None:
    with safe_open(public, framework="pt") as opened:
        metadata = opened.metadata()
    assert {
        name: metadata[name] for name in ("model", "model_kwargs", "blocks", "data", "public_share", "public_seed")
    } == {
        "model": "digits_cnn",
        "model_kwargs": "{}",
        "blocks": "features.0,features.2,classifier.0,classifier.2",
        "data": "digits",
        "public_share": "0.1",
        "public_seed": "0",
    }
    assert (metadata["samples"], metadata["seed"], metadata["epochs"], metadata["best_epoch"]) == ("144", "3", "1", "1")
    assert (metadata["fedbonsai"], metadata["hash"]) == (fedbonsai.__version__, model_hash(load_file(public)))
    assert json.loads(metadata["recipe"])["learning_rate"] == 0.05
    assert 0 < float(metadata["accuracy"]) <= 1
    assert {"loss", "test_accuracy", "test_loss", "data_digest"} <= metadata.keys()
    assert [path.name for path in public.parent.iterdir() if "public.safetensors" in path.name] == [
        "public.safetensors"
    ]


def test_a_run_starts_from_it_and_its_summary_says_so(public: Path, digits: Any) -> None:
    init = {"mode": "partial", "weights": str(public), "trunk": "features.2"}
    config = digits(data={"public_share": 0.1}, init=init, stop={"rounds": 0})
    run = fedbonsai.run(config)
    for _ in run:
        pass
    expected_init = {"mode": "partial", "weights": "public.safetensors", "hash": model_hash(load_file(public))}
    assert run.summary["init"] == expected_init | {"trunk": "features.2"}
    assert run.summary["notices"] == []
    public.unlink()  # the model of a finished run does not need it
    model, initial = run.model().state_dict(), fedbonsai.run(config | {"init": {}})
    for _ in initial:
        pass
    assert initial.summary["init"] == {"mode": "random"}
    same = {name for name, tensor in initial.model().state_dict().items() if torch.equal(tensor, model[name])}
    assert {name for name in model if not name.startswith("features.")} <= same
    assert not {"features.0.weight", "features.2.weight"} & same


def test_precision_and_layout_are_measured_where_they_are_left_open(
    tmp_path: Path, digits: Any, monkeypatch: Any
) -> None:
    """The file is that of the same command with the values set."""
    monkeypatch.setattr("fedbonsai.runtime.cli.pretrain.emulating_here", list)
    monkeypatch.setattr("fedbonsai.runtime.cli.pretrain.step_times", lambda steps, now: [0.4, 0.3, 0.3, 0.2])
    hashes = {}
    for precision, layout in (("auto", "auto"), ("bf16", "channels_last"), ("float32", "contiguous")):
        config = load_config(digits(data={"public_share": 0.1}, training={"precision": precision, "layout": layout}))
        hashes[precision] = pretrain(config, out=tmp_path / precision, recipe=SHORT)["hash"]
    assert hashes["auto"] == hashes["bf16"] != hashes["float32"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"cut": "features.2"}, ["features.2"]),
        ({"cut": "auto", "depth": "classifier.0"}, ["features.2, classifier.0"]),
    ],
    ids=str,
)
def test_blocks_of_a_frozen_trunk_without_given_weights_have_a_notice(
    fields: dict[str, Any], expected: list[str], public: Path, digits: Any
) -> None:
    init = {"mode": "partial", "weights": str(public), "trunk": "features.0"}
    policy = [{"name": "random", "cohort": 1.0}, {"name": "ecofed", **fields}]
    run = fedbonsai.run(digits(data={"public_share": 0.1}, init=init, stop={"rounds": 0}, policy=policy))
    for _ in run:
        pass
    random = [text for text in run.summary["notices"] if "random weights" in text]
    assert [text.partition(" of the frozen trunk")[0] for text in random] == expected


def test_a_run_whose_devices_hold_pretraining_samples_has_a_notice(public: Path, digits: Any) -> None:
    init = {"mode": "holistic", "weights": str(public)}
    for data, expected in (({}, 1), ({"public_share": 0.2}, 0), ({"public_share": 0.1, "public_seed": 1}, 1)):
        run = fedbonsai.run(digits(data=data, init=init, stop={"rounds": 0}))
        for _ in run:
            pass
        assert run.summary["num_notices"] == expected, data
        if expected:
            assert "trained on 0.1 of these very data (public_seed 0)" in run.summary["notices"][0]


def test_other_data_size_the_classifier_which_a_run_leaves_random(tmp_path: Path, digits: Any) -> None:
    section = tmp_path / "public.yaml"
    section.write_text(yaml.safe_dump(synthetic(4)))
    out = tmp_path / "w.safetensors"
    metadata = pretrain(load_config(digits()), out=out, data=str(section), recipe=SHORT)
    assert (metadata["data"], metadata["public_share"], metadata["samples"]) == ("synthetic", "1", "20")
    assert load_file(out)["classifier.2.weight"].shape == (4, 64)
    run = fedbonsai.run(digits(init={"mode": "holistic", "weights": str(out)}, stop={"rounds": 0}))
    for _ in run:
        pass
    assert run.summary["init"]["random"] == "classifier.2.weight, classifier.2.bias"


@pytest.mark.parametrize("preset", ["fedavg", "resfed", "splitfed"])
def test_every_method_may_start_from_it(preset: str, public: Path, digits: Any) -> None:
    config = digits(init={"mode": "holistic", "weights": str(public)}, stop={"rounds": 1})
    run = fedbonsai.run(config, preset=preset)
    for _ in run:
        pass
    assert run.summary["outcomes"]["done"] == 3
    assert run.summary["resyncs"] == 0  # where devices build the first model themselves, it is the server's


def test_mistakes_are_one_sentence(public: Path, tmp_path: Path, digits: Any) -> None:
    shared, plain = (load_config(digits(data=data)) for data in ({"public_share": 0.1}, {}))
    out = tmp_path / "new.safetensors"
    (tmp_path / "file").touch()
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(synthetic(4) | {"public_share": 0.5}))
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(synthetic(4, size=16)))
    for config, where, data, sentence in (
        (plain, out, None, r"data.public_share is 0; pretraining needs a share that no device has \(--share 0.1\)"),
        (shared, public, None, r"--out is '.*', which exists already; name a new file"),
        (shared, tmp_path / "file" / "w", None, r"--out is '.*', which cannot be written: "),
        (shared, out, "nothing", r"data.name is 'nothing'; allowed: digits, "),
        (shared, out, "digits", r"--data is 'digits', which is what the devices have"),
        (shared, out, "nowhere.yaml", r"--data is 'nowhere.yaml', which cannot be read: "),
        (shared, out, str(tmp_path / "bad.yaml"), r"which sets test_share or public_share; all its samples are public"),
        (shared, out, str(tmp_path / "large.yaml"), r"model"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            pretrain(config, out=where, data=data, recipe=SHORT)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("new")]


def test_no_other_file_is_replaced_or_removed_and_a_mistake_leaves_none(tmp_path: Path, digits: Any) -> None:
    out = tmp_path / "new" / "public.safetensors"
    out.parent.mkdir()
    out.with_name("public.safetensors.partial").write_text("the user's own")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^data\.public_share"):
            pretrain(load_config(digits()), out=out)
        assert [path.name for path in out.parent.iterdir()] == ["public.safetensors.partial"]
    out.write_text("the user's own")
    with pytest.raises(ConfigError, match=r"public\.safetensors', which exists already; name a new file$"):
        pretrain(load_config(digits(data={"public_share": 0.1})), out=out)
    assert {path.read_text() for path in out.parent.iterdir()} == {"the user's own"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"which cannot be written: "):
        pretrain(load_config(digits(data={"public_share": 0.1})), out=tmp_path / "file" / "out")


def test_training_that_fails_ends_the_command(tmp_path: Path, digits: Any) -> None:
    out = tmp_path / "w.safetensors"
    config = load_config(digits(data={"public_share": 0.1}))
    with pytest.raises(RunError, match="no epoch has a finite loss; lower the learning rate"):
        pretrain(config, out=out, recipe=Recipe(epochs=1, learning_rate=1e30))
    few = load_config(digits(data={"public_share": 0.1}, model={"name": "digits_cnn", "kwargs": {"num_classes": 5}}))
    with pytest.raises(ConfigError, match=r"^data: the target of training sample \d+ is \d; the model gives 5 scores"):
        pretrain(few, out=out, recipe=SHORT)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def experiment(tmp_path: Path, digits: Any) -> Path:
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(digits()))
    return path


def command(*arguments: object) -> Any:
    from fedbonsai.runtime.cli.main import app

    return CliRunner().invoke(app, ["pretrain", *map(str, arguments)])


def test_the_command_trains_reports_and_saves(experiment: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "w.safetensors"
    found = command(experiment, "--out", out, "--share", 0.1, "--epochs", 2, "--learning-rate", 0.05, "--seed", 9)
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["epoch 1", "epoch 2"]
    assert lines[2].startswith(f"{out}: epoch ")
    assert lines[3].endswith("--set data.public_share=0.1 --set data.public_seed=0")
    with safe_open(out, framework="pt") as opened:
        assert opened.metadata()["seed"] == "9"


def test_the_command_prints_json_last(experiment: Path, tmp_path: Path) -> None:
    found = command(experiment, "--out", tmp_path / "w", "--set", "data.public_share=0.1", "--epochs", 1, "--json")
    assert json.loads(found.stdout)["samples"] == "144"
    assert "epoch 1: " in found.stderr


def test_mistakes_on_the_command_line_exit_with_two(experiment: Path, tmp_path: Path) -> None:
    for arguments, sentence in (
        (["--share", 0.1, "--data", "mnist"], "--share is 0.1 and --data is 'mnist'; only one of them"),
        (["--epochs", 0, "--share", 0.1], "epochs is 0; it must be"),
        (["--share", 1.5], "data.public_share is 1.5; it must be"),
    ):
        found = command(experiment, "--out", tmp_path / "w", *arguments)
        assert isinstance(found.exception, ConfigError)
        assert found.exception.exit_code == 2
        assert str(found.exception).startswith(sentence)


def test_a_file_beside_the_configuration_is_found_and_named_in_full(public: Path, experiment: Path) -> None:
    written = yaml.safe_load(experiment.read_text())
    experiment.write_text(yaml.safe_dump(written | {"init": {"mode": "holistic", "weights": "public.safetensors"}}))
    assert load_config(experiment).init.weights == str(public)
    config = load_config(experiment)
    assert load_config(config) == config
    assert load_config(experiment, settings=["init={}"]).init.weights == str(public)
