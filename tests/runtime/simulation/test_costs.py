"""The cost table: arithmetic over one dry run for each row."""

from dataclasses import replace

import msgspec
import pytest
from fedbonsai.comms.codec import ArraySpec, CodecSpec
from fedbonsai.comms.codecs.make_codec import make_codec
from fedbonsai.comms.links.predict import Residual
from fedbonsai.comms.packet import sealed_bytes
from fedbonsai.learning.costs.cost import profile
from fedbonsai.learning.costs.dry_run import DryRun
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Objective, Plan, Upload
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.simulation.costs import Costs
from fedbonsai.runtime.simulation.stream_costs import BoundedCache


@pytest.fixture(name="built", scope="module")
def built_fixture():
    """Costs over a linear model of 4 x 3 weights and 3 biases, 10 samples on each of two devices."""
    link = {"memory_bytes": 10**9, "up_bytes_per_s": 100, "down_bytes_per_s": 200}
    classes = [
        {"name": "a", "flop_per_s": 1000, "latency_s": 1} | link,
        {"name": "b", "flop_per_s": 500, "shared_link": "w", "watts": 2} | link,
    ]
    config = load_config(
        {
            "model": {"name": "torch.nn:Linear", "kwargs": {"in_features": 4, "out_features": 3}},
            "data": {"name": "synthetic", "kwargs": {"shape": [4], "classes": 3, "samples_per_device": 10}},
            "fleet": {"classes": classes, "shared_links": {"w": {"up_bytes_per_s": 50, "down_bytes_per_s": 50}}},
        }
    )
    workload = Workload(workload_settings(config, num_devices=2))
    costs = Costs(workload, config.load_fleet())

    def plan(device=0, **changes):
        values = {
            "id": 1,
            "device": device,
            "version": 0,
            "part": whole(workload.spec),
            "training": Training(),
            "seed": 0,
        }
        return Plan(**values | changes)

    return costs, plan


def test_flops_are_those_of_the_samples_processed(built):
    costs, plan = built
    per_sample = costs.row(plan().part, Training()).training_flops
    assert per_sample >= 2 * 2 * 12  # forward and the weights' gradient, a multiply-accumulate counted as two
    assert costs.flops(plan()) == 10 * per_sample
    assert costs.flops(plan(training=Training(epochs=3))) == 30 * per_sample
    assert costs.flops(plan(training=Training(steps=2, batch_size=4))) == 8 * per_sample
    assert costs.flops(plan(objective=Objective(kind="evaluate"))) == 0


def test_an_estimate_by_hand(built):
    costs, plan = built
    down, up = costs.packet_bytes(plan())
    flops = costs.flops(plan())
    found = costs.estimate(0, plan())
    assert (found.down_s, found.compute_s, found.up_s) == (1 + down / 200, flops / 1000, 1 + up / 100)
    assert found.seconds == found.down_s + found.compute_s + found.up_s
    assert (found.down_bytes, found.up_bytes, found.flops, found.energy_j) == (down, up, flops, 0.0)


def test_a_shared_link_that_is_slower_than_the_devices_own_decides(built):
    costs, plan = built
    found = costs.estimate(1, plan(1))
    assert (found.down_s, found.up_s) == (found.down_bytes / 50, found.up_bytes / 50)
    assert found.energy_j == 2 * found.compute_s


def test_a_plan_that_only_evaluates_sends_no_packet_up(built):
    costs, plan = built
    found = costs.estimate(0, plan(objective=Objective(kind="evaluate")))
    assert (found.up_bytes, found.up_s, found.compute_s, found.flops) == (0, 0.0, 0.0, 0)
    assert found.down_s > 1


def test_packets_hold_fifteen_numbers_and_little_else(built):
    costs, plan = built
    down, up = costs.packet_bytes(plan())
    assert down == up
    assert 60 < down < 60 + 100


HALF = (CodecSpec("topk", {"density": 0.5}), CodecSpec("ternary"), CodecSpec("entropy"))


def test_a_packet_of_varying_size_is_estimated_below_its_bound_and_then_at_the_observed_size(built):
    costs, plan = built
    halved = plan(codec_up=HALF, link_up=Residual(rule="delta"))
    weight, bias = ArraySpec("weight", (3, 4), "<f4", role="weight"), ArraySpec("bias", (3,), "<f4", role="vector")
    bound, exact = sealed_bytes(make_codec(HALF), (weight, bias))
    down, up = costs.packet_bytes(halved)
    # Frame and header 64; 3 biases 12 and 2 levels 8 as they are; coded, 6 of 12 entries and their signs: some 13 bytes.
    assert not exact
    assert 64 + 20 < up < 64 + 20 + 40 < bound
    assert down == costs.packet_bytes(plan())[0]
    costs.observe(halved, "down", 7)  # dense: exact, whatever was observed
    costs.observe(halved, "up", 99)
    assert costs.packet_bytes(halved) == (down, 99)
    # The same by another rule, or none; not so another density, or integers in place of floats.
    assert costs.packet_bytes(plan(codec_up=HALF, link_up=Residual(rule="half_step")))[1] == 99
    assert costs.packet_bytes(plan(codec_up=HALF))[1] == 99
    fewer = (CodecSpec("topk", {"density": 0.2}), *HALF[1:])
    assert costs.packet_bytes(plan(codec_up=fewer))[1] < up


def test_a_selection_by_a_reference_is_estimated_with_random_weights(built):
    costs, plan = built
    by = {"density": 0.5, "by": "reference"}
    half, other = (CodecSpec("topk", by), *HALF[1:]), HALF
    up, sent = (costs.packet_bytes(plan(codec_up=codecs))[1] for codecs in (half, other))
    assert abs(up - sent) <= 4  # other entries, as many of them


def test_bit_patterns_are_estimated_at_their_bound(built):
    costs, plan = built
    found = plan(codec_up=(CodecSpec("lz4"),), link_up=Residual(rule="delta", arithmetic="bits"))
    dense = costs.packet_bytes(plan())[1]
    assert dense < costs.packet_bytes(found)[1] < dense + 64


def test_statistics_that_stay_cost_nothing(built):
    costs, plan = built
    assert costs.packet_bytes(plan(upload=Upload(statistics=False))) == costs.packet_bytes(plan())  # it has none


def test_rows_are_shared_where_nothing_that_costs_differs(built):
    costs, plan = built
    row = costs.row(plan().part, Training())
    assert costs.row(plan().part, Training(optimiser=Optimiser(learning_rate=0.9), epochs=7)) is row
    for other in (
        Training(batch_size=8),
        Training(accumulation=2),
        Training(optimiser=Optimiser(name="adam")),
        Training(optimiser=Optimiser(proximal=0.1)),
        Training(precision="bf16"),
    ):
        assert costs.row(plan().part, other) is not row


def test_an_optimiser_with_more_state_needs_more_memory(built):
    costs, plan = built
    plain, adam = (
        costs.row(plan().part, Training(optimiser=optimiser)).peak_memory_bytes
        for optimiser in (Optimiser(momentum=0.0), Optimiser(name="adam"))
    )
    assert adam == plain + 2 * 15 * 4


def test_the_estimate_of_another_device_takes_that_devices_samples(built):
    costs, plan = built
    assert costs.flops(plan(0), device=1) == costs.flops(msgspec.structs.replace(plan(0), device=1))


def test_a_bounded_cache_drops_the_entry_that_was_inserted_first():
    recent = BoundedCache(2)
    recent["a"], recent["b"], recent["a"] = 1, 2, 3
    assert dict(recent) == {"a": 3, "b": 2}
    recent["c"] = 4
    assert dict(recent) == {"b": 2, "c": 4}


def test_a_proxy_costs_the_same_without_its_weights():
    config = load_config({"model": "digits_cnn", "data": {"name": "digits"}})
    workload = Workload(workload_settings(config, num_devices=8))
    names = workload.spec.block_names
    name = f"proxy@{names[2]}..{names[-1]}"
    part = Part(blocks=names[:2], trained=names[:2], auxiliaries=(name,))
    found = Costs(workload, config.load_fleet()).row(part, Training())
    run = DryRun(workload.submodel(part), workload.example(), Training(), make_loss(Training().loss))
    run = replace(run, proxies={name: workload.architecture(part).new_auxiliary(name)})
    assert found == profile(run).cost(Training())
