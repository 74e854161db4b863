"""Kernels of sparse products in whole runs: measured before the first round, and kept with the run."""

import json

import fedbonsai
import pytest
from fedbonsai.learning.spec import Sparsity
from fedbonsai.policies.policy import chain
from fedbonsai.policies.selection.plain import All
from fedbonsai.policies.sparsity.zerofl import ZeroFL
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.engine.kernel_measurement import sparsities, with_kernels
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Notice, RunStarted

AUTO = {
    "backend": "inline",
    "training": {"steps": 2, "sparsity": {}},
    "kernels": {"sparse": "auto"},
    "policy": ["all", {"name": "zerofl", "levels": [0.5, 0.9]}],
    "evaluation": {"where": "none"},
    "stop": {"rounds": 1},
}
KEYS = [f"{layer} at {share:g}, {share:g}" for layer in ("classifier.0", "features.2") for share in (0.5, 0.9)]
TABLE = {key: {"times": [0.5, 0.5, 0.5]} for key in KEYS}


@pytest.fixture(name="without_compiler")
def without_compiler_fixture(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


def test_the_configured_sparsity_and_those_of_the_policies_are_measured():
    configured = Sparsity(weights=0.9, activations=0.5, period=3)
    others = [Sparsity(weights=level, activations=level, period=3) for level in (0.5, 0.9)]
    assert sparsities(configured, chain(All(), ZeroFL(levels=(0.9, 0.5)))) == [configured, *others]
    assert sparsities(Sparsity(), chain(All(), ZeroFL(levels=(0.9,)))) == [Sparsity()]


def test_only_auto_without_a_table_measures():
    for kernels in ({"sparse": "dense"}, {"sparse": "auto", "table": TABLE}):
        config = load_config(AUTO | {"kernels": kernels})
        assert with_kernels(config, All()) == (config, [])


@pytest.mark.usefixtures("without_compiler")
def test_a_run_records_its_kernels_and_a_resumed_run_uses_them(tmp_path):
    """Without a compiler the run has the kernels that torch has, and a notice says why."""
    folder = tmp_path / "run"
    run = fedbonsai.run(AUTO, out=folder)
    events = list(run)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    written = json.loads((folder / "measured.json").read_text())
    assert written == started.measured
    assert sorted(written["kernels"]) == KEYS
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert notice.startswith("sparse products by the kernels that were measured to be the fastest: ")
    assert notice.endswith("no-such-compiler was not found (CXX names another)")

    run = fedbonsai.run(AUTO | {"stop": {"rounds": 2}}, resume=folder)
    list(run)
    assert run.summary["rounds"] == 2
    assert len([text for text in run.summary["notices"] if "sparse products" in text]) == 1  # the first part's
    assert json.loads((folder / "measured.json").read_text()) == written

    other = written["kernels"] | {KEYS[0]: {"kernels": ["csr", "csr", "csr"], "times": [0.1, 0.1, 0.1]}}
    (folder / "measured.json").write_text(json.dumps({"kernels": other}))
    with pytest.raises(ConfigError, match=r"kernels\.table, the measured kernels of sparse products, differs from"):
        list(fedbonsai.run(AUTO | {"stop": {"rounds": 3}}, resume=folder))


@pytest.mark.usefixtures("without_compiler")
def test_a_table_with_native_kernels_is_refused_where_they_cannot_be_had():
    table = {KEYS[0]: {"kernels": ["native", "dense", "dense"]}}
    with pytest.raises(ConfigError, match=r"^kernels\.table has native kernels, and the native kernels need a C\+\+ "):
        list(fedbonsai.run(AUTO | {"kernels": {"sparse": "auto", "table": table}}))


def test_auto_needs_sparse_layers():
    with pytest.raises(ConfigError, match=r"kernels\.sparse is 'auto', and training\.sparsity is null"):
        load_config({"kernels": {"sparse": "auto"}})


def test_the_clock_charges_the_measured_times():
    seconds = []
    for kernels in ({"sparse": "dense", "table": TABLE}, {"sparse": "auto", "table": TABLE}):
        run = fedbonsai.run(AUTO | {"kernels": kernels, "policy": ["all"]})
        list(run)
        seconds.append(run.summary["virtual_s"])
    assert seconds[1] < seconds[0]
