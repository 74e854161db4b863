"""The cost of split training by EcoFed's cost model (Wu et al., arXiv 2304.05495), on VGG11 and CIFAR-10's shapes.

Of n = 500 samples, E = 1 epoch, A = 8192 activations behind the second block, |W| weights, |Wd| of them on the device, |Waux|
in its head, a period of 2, without labels, headers and running statistics:

    FedAvg 8|W|    SplitFed 8|Wd| + 8EnA    local losses 8(|Wd| + |Waux|) + 4EnA    EcoFed EnA/2 (8 bit)
"""

import pytest
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.learning.parts.part import Part, linear_head, whole
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan, Split
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.simulation.costs import Costs

CUT, FRONT = "features.4", ("features.0", "features.4")
PLAIN_8_BIT = (CodecSpec("uniform", {"bits": 8, "signed": "auto", "roles": ["activation"]}),)
WEIGHTS, OF_DEVICE, OF_HEAD, ACTIVATIONS = 34_440_970, 76_032, 81_930, 500 * 8192


@pytest.fixture(name="mb", scope="module")
def mb_fixture():
    """Bytes that one device sends and receives in a round, by method."""
    device = {"name": "rpi4", "flop_per_s": 13e9, "memory_bytes": 2e9, "up_bytes_per_s": 1e7, "down_bytes_per_s": 1e7}
    generated = {"shape": [3, 32, 32], "classes": 10, "samples_per_device": 500, "test_samples": 1}
    config = load_config(
        {
            "model": "vgg11_bn",
            "data": {"name": "synthetic", "kwargs": generated},
            "fleet": {"classes": [device]},
            "training": {"batch_size": 10},
        }
    )
    workload = Workload(workload_settings(config, num_devices=1))
    costs, head = Costs(workload, config.load_fleet()), linear_head(CUT)
    front = Part(blocks=FRONT, trained=FRONT)
    cases = {
        "fedavg": (whole(workload.spec), None),
        "splitfed": (front, Split(cut=CUT)),
        "local_loss": (
            Part(blocks=FRONT, trained=FRONT, head=head, auxiliaries=(head,)),
            Split(cut=CUT, mode="local_loss"),
        ),
        "ecofed": (Part(blocks=FRONT, trained=()), Split(cut=CUT, depth=CUT, mode="ecofed", codec_up=PLAIN_8_BIT)),
    }
    found = {}
    for name, (part, split) in cases.items():
        plan = Plan(id=0, device=0, version=0, part=part, training=config.training, seed=0, split=split)
        estimate = costs.estimate(0, plan)
        found[name] = estimate.up_bytes + estimate.down_bytes
    return found


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        ("fedavg", 8 * WEIGHTS),
        ("splitfed", 8 * OF_DEVICE + 8 * ACTIVATIONS),
        ("local_loss", 8 * (OF_DEVICE + OF_HEAD) + 4 * ACTIVATIONS),
        ("ecofed", ACTIVATIONS),
    ],
)
def test_bytes_are_those_of_the_formula_and_little_more(mb, method, formula):
    assert formula < mb[method] < 1.002 * formula


def test_the_published_ratios_follow(mb):
    period = 2
    assert 131 < mb["fedavg"] / (mb["ecofed"] / period) < 135
    assert 15.9 < mb["splitfed"] / (mb["ecofed"] / period) < 16.4
    assert 8.5 < mb["local_loss"] / (mb["ecofed"] / period) < 8.7
