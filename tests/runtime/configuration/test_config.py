"""The configuration: layers, shorthands and refusals, from YAML, from Python and from ``--set``."""

# ruff: noqa: E501  (tables of sentences: one row a line)

import json
import os
import re
import sys
from pathlib import Path

import pytest
from fedbonsai.clusters.fleet import names as fleet_names
from fedbonsai.comms.codecs.make_codec import BUILT_IN as CODECS
from fedbonsai.policies.presets import PRESETS
from fedbonsai.policies.resolve_policy import BUILT_IN
from fedbonsai.runtime.api import run
from fedbonsai.runtime.cli import main as cli
from fedbonsai.runtime.configuration.config import Config, load_config
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.storage.run_folder import resolved

SECTIONS = ", ".join(Config.__struct_fields__)


@pytest.fixture(name="write")
def write_fixture(tmp_path):
    def write(text, name="e.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_the_defaults_are_fedavg_on_the_bundled_digits():
    config = load_config()
    assert (config.preset, config.model.name, config.data.name, config.fleet) == (
        "fedavg",
        "digits_cnn",
        "digits",
        "laptop",
    )
    assert config.policy == ({"name": "random", "cohort": 1.0},)


def test_later_layers_win(write):
    # proximal: default 0, the YAML's preset 0.01; learning_rate: the YAML, --set, Python's own
    text = "preset: fedprox\ntraining: {optimiser: {learning_rate: 0.5}}"
    loaded = load_config(write(text))
    assert loaded.training.optimiser.proximal == 0.01
    assert loaded.training.optimiser.learning_rate == 0.5
    assert load_config(write(text + "\nseed: 4")).seed == 4
    own = load_config(write("preset: fedprox\ntraining: {optimiser: {proximal: 0.3}}"))
    assert own.training.optimiser.proximal == 0.3
    setting = ["training.optimiser.learning_rate=0.25", "seed=5"]
    assert load_config(write(text), settings=setting).training.optimiser.learning_rate == 0.25
    assert load_config(write(text), settings=setting, overrides={"seed": 6}).seed == 6


def test_a_preset_of_the_command_line_wins_over_the_yaml_and_loses_to_set(write):
    path = write("preset: oort\npolicy: [{name: all}]\ntraining: {optimiser: {proximal: 0.5}}")
    assert load_config(path).policy == ({"name": "all"},)
    over = load_config(path, preset="fedprox")
    assert (over.preset, over.policy, over.training.optimiser.proximal) == (
        "fedprox",
        ({"name": "random", "cohort": 1.0},),
        0.01,
    )
    assert load_config(path, preset="fedprox", settings=["policy.0.cohort=0.5"]).policy[0]["cohort"] == 0.5
    assert load_config(path, settings=["preset=fedprox"]) == over


def test_an_entry_of_a_list_is_set_by_its_number():
    chain = [{"name": "deadline", "deadline_s": 9}, {"name": "random", "cohort": 2}]
    raw = {"policy": chain, "evaluation": {"metrics": ["accuracy"]}}
    config = load_config(raw, settings=["policy.1.cohort=4", "evaluation.metrics.0.name=squared_error"])
    assert config.policy == ({"name": "deadline", "deadline_s": 9}, {"name": "random", "cohort": 4})
    assert [metric.name for metric in config.evaluation.metrics] == ["squared_error"]


def test_another_model_or_partition_does_not_inherit_arguments():
    raw = {
        "model": {"name": "resnet18", "kwargs": {"stem": "cifar"}},
        "data": {"partition": {"name": "dirichlet", "alpha": 1}},
    }
    assert load_config(raw, settings=["model.kwargs.num_classes=5"]).model.kwargs == {"stem": "cifar", "num_classes": 5}
    assert load_config(raw, settings=["model=small"]).model.kwargs == {}
    assert load_config(raw, settings=["model.name=small"]).model.kwargs == {}
    assert load_config(raw, settings=["data.partition.alpha=0.1"]).data.partition.alpha == 0.1
    shards = load_config(raw, settings=["data.partition={name: shards, shards_per_device: 3}"]).data.partition
    assert shards.shards_per_device == 3
    raw = {"server": {"public": {"name": "cifar100", "root": "/data"}}}
    assert load_config(raw, settings=["server.public.download=true"]).server.public.root == "/data"
    assert load_config(raw, settings=["server.public=mnist"]).server.public.root is None


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"model": "small"}, {"model": {"name": "small", "kwargs": {}}}),
        ({"policy": "all"}, {"policy": [{"name": "all"}]}),
        ({"policy": {"name": "random", "cohort": 3}}, {"policy": [{"name": "random", "cohort": 3}]}),
        ({"policy": ["all", {"name": "random", "cohort": 3}]}, {"policy": [{"name": "all"}, {"name": "random", "cohort": 3}]}),
        ({"training": {"loss": "mse"}}, {"training": {"loss": {"name": "mse"}}}),
        ({"data": {"partition": "iid"}}, {"data": {"partition": {"name": "iid"}}}),
        ({"data": {"train_transforms": ["normalize"]}}, {"data": {"train_transforms": [{"name": "normalize"}]}}),
        ({"server": {"public": "cifar100"}}, {"server": {"public": {"name": "cifar100"}}}),
        (
            {"server": {"public": {"name": "cifar100", "test_transforms": "normalize"}}},
            {"server": {"public": {"name": "cifar100", "test_transforms": [{"name": "normalize"}]}}},
        ),
        ({"evaluation": {"metrics": "absolute_error"}}, {"evaluation": {"metrics": [{"name": "absolute_error"}]}}),
        ({"codecs": {"up": "lz4"}}, {"codecs": {"up": [{"name": "lz4", "options": {}}]}}),
        ({"codecs": {"up": [{"name": "lz4", "level": 3}]}}, {"codecs": {"up": [{"name": "lz4", "options": {"level": 3}}]}}),
    ],
)  # fmt: skip
def test_shorthands_mean_their_long_forms(short, long):
    assert load_config(short) == load_config(long)


def test_the_callers_mapping_is_not_changed():
    raw = {"model": "small", "policy": "all", "data": {"partition": "iid"}}
    raw["server"] = {"public": {"name": "mnist", "test_transforms": "normalize"}}
    before = json.dumps(raw)
    load_config(raw, settings=["model.kwargs.num_classes=3", "policy.0.name=all", "data.partition=iid"])
    assert json.dumps(raw) == before


def test_a_configuration_survives_a_round_trip_through_plain_data(digits):
    config = load_config(
        digits(codecs={"up": "lz4"}, stop={"accuracy": 0.5}), settings=["training.optimiser.betas=[0.8, 0.9]"]
    )
    assert load_config(json.loads(json.dumps(config.to_dict()))) == config
    assert load_config(config) == config
    full = load_config(resolved(config))
    assert full.load_fleet() == config.load_fleet()


def test_a_fleet_beside_the_yaml_is_found(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    write("classes: [{name: a, flop_per_s: 1, memory_bytes: 1, up_bytes_per_s: 1, down_bytes_per_s: 1}]", "mine.yaml")
    assert load_config(write("fleet: mine.yaml")).load_fleet().name == "mine"


def test_reading_a_configuration_changes_nothing_in_the_process(write, monkeypatch):
    path, finders = list(sys.path), list(sys.meta_path)
    load_config(write("policy: [{name: 'beside_the_yaml:Mine'}]"))
    assert (sys.path, sys.meta_path) == (path, finders)


BAD_SETTINGS = [
    (["stop.rounds=-1"], "stop.rounds is -1; it must be a whole number >= 0"),
    (["training.optimiser.learning_rate=-1"], "training.optimiser.learning_rate is -1; it must be a number >= 0"),
    (["training.optimiser.learning_rate=fast"], "training.optimiser.learning_rate is 'fast'; it must be a number"),
    (["training.epoch=3"], "training.epoch is not a setting (did you mean 'epochs'?); allowed here: loss, optimiser, epochs, "
     "steps, batch_size, accumulation, precision, frozen_precision, layout, checkpointing, sparsity"),
    (["training.optimizer.momentum=0"], "training.optimizer is not a setting (did you mean 'optimiser'?); allowed here: loss, "
     "optimiser, epochs, steps, batch_size, accumulation, precision, frozen_precision, layout, checkpointing, sparsity"),
    (["training.channels_last=true"], "training.channels_last is True; this setting is training.layout now: channels_last for "
     "true, contiguous for false, or auto"),
    (["training.layout=last"], "training.layout is 'last'; it must be one of contiguous, channels_last, auto"),
    (["roundz=3"], f"roundz is not a setting; allowed here: {SECTIONS}"),
    (["backend=gpu"], "backend is 'gpu'; it must be one of ray, inline"),
    (["clock=fast"], "clock is 'fast'; it must be one of virtual, wall"),
    (["data.test_share=1.5"], "data.test_share is 1.5; it must be a number < 1"),
    (["data.partition=zipf"], "data.partition.name is 'zipf'; it must be one of iid, dirichlet, shards, classes, groups"),
    (["data.partition=dirichlet"], "data.partition.alpha is missing; it has no default"),
    (["codecs.up.0.name=lz4"], "codecs.up.0 does not exist: codecs.up has 0 entries, counted from 0"),
    (["codecs.up=[{name: lz4, options: {}, level: 2}]"], "codecs.up[0].level is not a setting; allowed here: name, options"),
    (["seed"], "--set is 'seed'; it must have the form section.field=value"),
    (["=1"], "--set is '=1'; it must have the form section.field=value"),
    (["a..b=1"], "--set is 'a..b=1'; it must have the form section.field=value"),
    (["seed=[1"], "--set is 'seed=[1', whose value is not YAML: expected ',' or ']', but got '<stream end>' (line 1, column 3)"),
    (["policy.1.cohort=2"], "policy.1 does not exist: policy has 1 entries, counted from 0"),
    (["stop.accuracy=0.9", "evaluation.where=none"], "stop.accuracy is 0.9, which needs an evaluation; evaluation.where is 'none'"),
    (["stop.patience=2", "evaluation.where=none"], "stop.patience is 2, which needs an evaluation; evaluation.where is 'none'"),
    (["stop.accuracy=0.9", "evaluation.metrics=squared_error"],
     "stop.accuracy is 0.9, but evaluation.metrics holds squared_error, not accuracy"),
    (["preset=fedavgg"], f"preset is 'fedavgg' (did you mean 'fedavg'?); allowed: {', '.join(PRESETS)}"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "sentence"), BAD_SETTINGS)
def test_a_bad_setting_is_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config({}, settings=settings)
    assert str(caught.value) == sentence


def test_the_same_sentence_from_yaml(write):
    with pytest.raises(ConfigError, match=r"^stop.rounds is -1; it must be a whole number >= 0$"):
        load_config(write("stop: {rounds: -1}"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: [1", "is not YAML: expected ',' or ']', but got '<stream end>' (line 1, column 9)"),
        ("seed: 1\nseed: 2", "is not YAML: key 'seed' occurs twice (line 2, column 1)"),
        ("- a", "must be a mapping of settings, not a list"),
        ("just text", "must be a mapping of settings, not a str"),
    ],
)
def test_a_file_that_holds_no_configuration_is_refused(write, text, sentence):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"configuration {str(path)!r} {sentence}"


def test_an_empty_file_is_the_defaults(write):
    assert load_config(write("")) == load_config()


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml' cannot be read: No such file or directory$"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        load_config(tmp_path / "binary.yaml")


POLICIES = f"{', '.join(BUILT_IN)}, or a class of your own as 'module:Class'"
BAD_NAMES = [
    ({"model": "digits_cnm"}, "model.name is 'digits_cnm', which is unknown; did you mean digits_cnn? `fedbonsai models` lists all names"),
    ({"model": {"name": "digits_cnn", "kwargs": {"width": 3}}}, "model.kwargs of 'digits_cnn': got an unexpected keyword argument 'width'; "
     "its parameters are: num_classes, in_channels, image_size"),
    ({"fleet": "laptob"}, f"fleet is 'laptob', neither a file nor a built-in fleet; the built-in ones are: {', '.join(fleet_names())}"),
    ({"data": {"name": "digit"}}, "data.name is 'digit'; allowed: digits, mnist, fashion_mnist, cifar10, cifar100, folder, synthetic, or module:function"),
    ({"data": {"kwargs": {"size": 3}}}, "data.kwargs: the keywords of 'digits' do not fit: `size` is unknown; allowed: none"),
    ({"policy": "randon"}, f"policy[0].name is 'randon' (did you mean 'random'?); allowed: {POLICIES}"),
    ({"policy": [{"name": "random"}]}, "policy[0].cohort is missing; 'random' has no default for it"),
    ({"policy": [{"name": "random", "cohort": -1}]}, "policy[0] (random): cohort is -1; allowed: a whole number of devices, at least 1, or a share of all devices above 0 and up to 1.0"),
    ({"training": {"loss": "cross"}}, "training.loss is 'cross'; it must be one of cross_entropy, nll, mse, smooth_l1, bce_with_logits, or module:function"),
    ({"evaluation": {"metrics": ["acuracy"]}}, "evaluation.metrics is 'acuracy'; it must be one of accuracy, squared_error, absolute_error, or module:function"),
    ({"codecs": {"up": ["lz5"]}}, f"codecs.up: unknown codec 'lz5' (did you mean 'lz4'?); known are: {', '.join(sorted(CODECS))}, or module:Class"),
    ({"codecs": {"down": [{"name": "lz4", "level": 99}]}}, None),
    ({"data": {"train_transforms": ["blur"]}}, None),
    ({"fleet": {"classes": [{"name": "a", "count": 2000, "flop_per_s": 1, "memory_bytes": 1, "up_bytes_per_s": 1, "down_bytes_per_s": 1}]}}, None),
    ({"evaluation": {"where": "devices"}}, "evaluation.where is 'devices', but no device has a test set; set data.test_share above 0"),
    ({"data": {"server_test": False}}, "evaluation.where is 'server', but the server has no test set in these data; 'devices' "
     "(with data.test_share) and 'none' do without"),
    ({"model": {"name": "digits_cnn", "kwargs": {"in_channels": 3}}}, None),
]  # fmt: skip
FIELDS = [
    "model.name", "model.kwargs", "fleet", "data.name", "data.kwargs", "policy[0].name", "policy[0].cohort", "policy[0]", "training.loss",
    "evaluation.metrics", "codecs.up", "codecs.down", "data.train_transforms", "the fleet has 2000 devices", "evaluation.where",
    "evaluation.where", "the model fails on samples of shape",
]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "sentence", "field"), [(*row, field) for row, field in zip(BAD_NAMES, FIELDS, strict=True)]
)
def test_a_wrong_setting_is_refused_before_the_first_round(raw, sentence, field):
    with pytest.raises(ConfigError) as caught:
        next(run(raw, backend="inline"))
    found = str(caught.value)
    assert found.startswith(field)
    assert "\n" not in found
    if sentence is not None:
        assert found == sentence


INSIDE: dict = {}
INSIDE["model"] = INSIDE
BAD_OBJECTS = [
    ({"model": {"name": "mlp", "kwargs": {"act": print}}},
     "model.kwargs.act is <built-in function print>, a builtins.builtin_function_or_method; it must be text, a number, true, false, null, a list or a mapping"),
    ({"seed": b"1"}, "seed is b'1', a builtins.bytes; it must be text, a number, true, false, null, a list or a mapping"),
    ({"name": "\ud800"}, r"name is '\ud800', which holds half of a surrogate pair; it must be text"),
    ({"data": {"kwargs": {"\udcff": 1}}}, r"data.kwargs: a key is '\udcff', which holds half of a surrogate pair; it must be text"),
    ({"out": "a\0b"}, r"out is 'a\x00b', which holds a NUL; no file can be named so"),
    ({"checkpoint": {"to": "a\0b"}}, r"checkpoint.to is 'a\x00b', which holds a NUL; no file can be named so"),
    ({"server": {"public": {"root": "a\0b"}}}, r"server.public.root is 'a\x00b', which holds a NUL; no file can be named so"),
    ({"data": {"root": "a\0b"}}, r"data.root is 'a\x00b', which holds a NUL; no file can be named so"),
    ({"init": {"mode": "partial", "weights": "a\0b"}}, r"init.weights is 'a\x00b', which holds a NUL; no file can be named so"),
    ({"fleet": "a\0.yaml"}, r"fleet is 'a\x00.yaml', which holds a NUL; no file can be named so"),
    (3, "config is 3; it must be a YAML file, a mapping or a Config"),
    ("a\0.yaml", r"config is 'a\x00.yaml', which holds a NUL; no file can be named so"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "sentence"), BAD_OBJECTS, ids=str)
def test_a_value_that_yaml_cannot_hold_is_refused_in_one_sentence(raw, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config(raw)
    assert str(caught.value) == sentence


def test_recursive_settings_are_refused():
    with pytest.raises(ConfigError, match=r"^model\.model\..* is nested more than 100 deep$"):
        load_config(INSIDE)


def test_a_yaml_that_could_exhaust_the_process_is_refused(write):
    lines = ["a0: &a0 [1, 2, 3]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(
        ConfigError, match=r"is not YAML: aliases stand for more than 100,000 values \(line 6, column 5\)$"
    ):
        load_config(write("\n".join(lines)))
    with pytest.raises(ConfigError, match=r"whose value is not YAML: values are nested more than 100 deep"):
        load_config({}, settings=["model.kwargs=" + "[" * 1500])


def test_an_out_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        run({}, out=tmp_path / "file" / "run")
    assert str(caught.value) == f"out is {str(tmp_path / 'file' / 'run')!r}, which cannot be written: Not a directory"


def test_an_out_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        run({"out": str(tmp_path)})
    assert str(caught.value) == f"out is {str(tmp_path)!r}, which is not empty; name a new folder"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [([*(f"--set={s}" for s in settings)], sentence) for settings, sentence in BAD_SETTINGS[:12]]
    + [(["--rounds=-1"], "stop.rounds is -1; it must be a whole number >= 0"), (["--workers=0"], "workers is 0; it must be a whole number >= 1"),
       (["--seed=-1"], "seed is -1; it must be a whole number >= 0"), (["--backend=gpu"], "backend is 'gpu'; it must be one of ray, inline"),
       (["--preset=fedsgd"], f"preset is 'fedsgd' (did you mean 'fedavg'?); allowed: {', '.join(PRESETS)}")],
)  # fmt: skip
def test_the_command_line_prints_one_line_and_exits_with_two(arguments, sentence, write, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedbonsai", "run", str(write("stop: {rounds: 1}")), *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.err == f"error: {sentence}\n"
    assert output.out == ""


def test_a_refused_configuration_leaves_no_run_folder(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedbonsai", "run", str(write("seed: x"))])
    with pytest.raises(SystemExit):
        cli.main()
    assert "seed is 'x'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["e.yaml"]
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["", "a:b", "a.b", "a b", "ä"])
def test_names_of_families(name):
    expected = f"models names {name!r}; a name consists of letters, digits, '_' and '-'"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config({"models": {name: "small"}})
    assert list(load_config({"models": {"vgg-11_bn": "small"}}).models) == ["vgg-11_bn"]
