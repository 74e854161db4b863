"""Presets: each row is a valid part of a configuration, and its policy chooses devices."""

import msgspec
import pytest
from fedbonsai.learning.spec import Training
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.presets import PRESETS, find_preset
from fedbonsai.policies.resolve_policy import make_policy

SECTIONS = {"policy", "training", "server", "data"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_configuration_and_chooses_devices(name, make_view):
    preset = find_preset(name)
    assert preset.description
    assert "\n" not in preset.description
    assert set(preset.overrides) <= SECTIONS
    msgspec.convert(preset.overrides.get("training", {}), Training)
    policy = make_policy(preset.overrides["policy"])
    decision, _ = policy.decide(make_view(seconds=range(1, 9)), policy.init(), Decision())
    assert decision.plans


def test_fedavg_takes_all_devices_unless_a_cohort_is_set(make_view):
    overrides = find_preset("fedavg").overrides
    view = make_view(seconds=range(1, 9))
    policy = make_policy(overrides["policy"])
    assert len(policy.decide(view, policy.init(), Decision())[0].plans) == 8
    overrides["policy"][0]["cohort"] = 3
    policy = make_policy(overrides["policy"])
    assert len(policy.decide(view, policy.init(), Decision())[0].plans) == 3
    assert find_preset("fedavg").overrides["policy"][0]["cohort"] == 1.0  # the table itself was not changed


def test_fedprox_is_fedavg_with_a_proximal_term():
    overrides = find_preset("fedprox").overrides
    assert msgspec.convert(overrides["training"], Training).optimiser.proximal > 0
    assert overrides["policy"] == find_preset("fedavg").overrides["policy"]


def test_the_methods_with_narrow_models_differ_in_levels_channels_and_distillation(make_view):
    chains = {
        name: make_policy(find_preset(name).overrides["policy"]).links for name in ("reft", "heterofl", "fedrolex")
    }
    narrow = {name: links[1] for name, links in chains.items()}
    assert {name: (each.unit, each.channels, each.scaled) for name, each in narrow.items()} == {
        "reft": ("flops", "l1", False),
        "heterofl": ("width", "prefix", True),
        "fedrolex": ("width", "rolling", True),
    }
    assert narrow["heterofl"].levels == narrow["fedrolex"].levels == (1.0, 0.5, 0.25, 0.125, 0.0625)
    assert [len(links) for links in chains.values()] == [3, 2, 2]
    assert chains["reft"][2].task.steps == 300
    assert find_preset("reft").overrides["data"] == {"public_share": 0.1}
    find_preset("heterofl").overrides["policy"][1]["levels"].append(0.01)
    assert len(find_preset("fedrolex").overrides["policy"][1]["levels"]) == 5


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"^preset is 'fedavgg' \(did you mean 'fedavg'\?\); allowed: fedavg, fedprox"):
        find_preset("fedavgg")
