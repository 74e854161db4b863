"""Results that a refactoring must not change: the model and every byte of each preset, three rounds, two seeds (the second
one in ``make soak``).

``python -m fedbonsai.tests.runtime.test_golden`` records them for this kind of processor and these builds of torch and numpy
(``golden.json``); on another kind bits differ, and only figures that are equal everywhere are compared.
"""

import json
from pathlib import Path

import fedbonsai
import pytest
from fedbonsai.clusters.processor import numerics_here
from fedbonsai.policies.presets import PRESETS

RECORD = Path(__file__).with_name("golden.json")
SEEDS = (1, 2)
CONFIG = {
    "backend": "inline",
    "fleet": "laptop",
    "data": {"partition": {"name": "dirichlet", "alpha": 1.0}, "test_share": 0.2},
    "training": {"batch_size": 16, "optimiser": {"learning_rate": 0.05, "momentum": 0.9}},
    "evaluation": {"where": "both", "every": 3},
    "stop": {"rounds": 3},
}


def kind():
    """The versions and the kind of processor that bits depend on."""
    return ", ".join(f"{name} {value}" for name, value in numerics_here().items())


def figures(preset, seed):
    """Hash of the model, bytes by direction and kind, simulated seconds and outcomes."""
    run = fedbonsai.run(CONFIG | {"preset": preset, "seed": seed})
    for _ in run:
        pass
    names = ("model_hash", "up_by_kind", "down_by_kind", "host_bytes", "evaluation_bytes", "virtual_s", "outcomes")
    return {name: run.summary[name] for name in names}


@pytest.mark.parametrize("seed", [SEEDS[0], *(pytest.param(seed, marks=pytest.mark.soak) for seed in SEEDS[1:])])
@pytest.mark.parametrize("preset", PRESETS)
def test_model_and_bytes_of_a_preset(preset, seed):
    recorded = json.loads(RECORD.read_text())
    found = figures(preset, seed)
    if (here := recorded.get(kind())) is not None:
        assert found == here[preset][str(seed)]
        return
    expected = next(iter(recorded.values()))[preset][str(seed)]
    assert found["outcomes"] == expected["outcomes"]
    assert found["virtual_s"] == pytest.approx(expected["virtual_s"], rel=0.05)  # coded packets differ in size
    for direction in ("up_by_kind", "down_by_kind"):
        assert found[direction].keys() == expected[direction].keys()
        assert sum(found[direction].values()) == pytest.approx(sum(expected[direction].values()), rel=0.05)


if __name__ == "__main__":
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known[kind()] = {preset: {str(seed): figures(preset, seed) for seed in SEEDS} for preset in PRESETS}
    RECORD.write_text(json.dumps(known, indent=1) + "\n")
