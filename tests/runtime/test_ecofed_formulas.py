"""The cost of split training by EcoFed's cost model (Wu et al., arXiv 2304.05495), on VGG11 and CIFAR-10's shapes.

Bytes are estimated by the virtual clock's cost model, and counted on the packets of real runs.

Of n = 500 samples, E = 1 epoch, A = 8192 activations behind the second block, |W| weights, |Wd| of them on the device, |Waux|
in its head, a period of 2, without labels, headers and running statistics:

    FedAvg 8|W|    SplitFed 8|Wd| + 8EnA    local losses 8(|Wd| + |Waux|) + 4EnA    EcoFed EnA/2 (8 bit)
"""

from dataclasses import dataclass

import fedbonsai
import pytest
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.learning.parts.part import Part, linear_head, whole
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.local_loss import LocalLoss
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.plan import Plan, Split
from fedbonsai.policies.policy import chain
from fedbonsai.policies.selection.plain import All
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.resolution import workload_settings
from fedbonsai.runtime.simulation.costs import Costs

CUT, FRONT = "features.4", ("features.0", "features.4")
PLAIN_8_BIT = (CodecSpec("uniform", {"bits": 8, "signed": "auto", "roles": ["activation"]}),)
WEIGHTS, OF_DEVICE, OF_HEAD, ACTIVATIONS = 34_440_970, 76_032, 81_930, 500 * 8192
PERIOD = 2  # devices upload in every other round
BYTES = {
    "fedavg": 8 * WEIGHTS,
    "splitfed": 8 * OF_DEVICE + 8 * ACTIVATIONS,
    "local_loss": 8 * (OF_DEVICE + OF_HEAD) + 4 * ACTIVATIONS,
    "ecofed": ACTIVATIONS / PERIOD,
}
# The two blocks on the device, and a host that is quick: its layers change no packet of the device.
TWO_BLOCKS = """
from fedbonsai.learning.models.cnn import ConvNet, vgg11_bn
from torch import nn


def make(num_classes):
    whole = vgg11_bn(hidden=1)
    return ConvNet(whole.features[:8], nn.Sequential(nn.Linear(128 * 8 * 8, num_classes)))
"""


@dataclass(frozen=True)
class Plain8Bit(EcoFed):
    """The paper's code: one step for the whole tensor, and no entropy coding."""

    @property
    def _codec(self):
        return PLAIN_8_BIT


def settings_for(model, *, samples):
    """One Raspberry Pi with so many images."""
    device = {"name": "rpi4", "flop_per_s": 13e9, "memory_bytes": 2e9, "up_bytes_per_s": 1e7, "down_bytes_per_s": 1e7}
    generated = {"shape": [3, 32, 32], "classes": 10, "samples_per_device": samples, "test_samples": 1}
    return {
        "backend": "inline",
        "model": model,
        "data": {"name": "synthetic", "kwargs": generated},
        "fleet": {"classes": [device]},
        "training": {"batch_size": 10},
        "evaluation": {"where": "none"},
    }


@pytest.fixture(name="estimated", scope="module")
def estimated_fixture():
    """Bytes that one device sends and receives in a round on average, by method: estimates."""
    config = load_config(settings_for("vgg11_bn", samples=500))
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
    return found | {"ecofed": found["ecofed"] / PERIOD}


def counted(policy, model="two_blocks:make", *, samples=500, rounds=1):
    """The same in the mean of so many rounds, counted by the ledger on all packets, plans and reports of the device."""
    run = fedbonsai.run(settings_for(model, samples=samples) | {"stop": {"rounds": rounds}}, policy=policy)
    list(run)
    assert run.summary["outcomes"]["done"] == rounds
    return (run.summary["up_bytes"] + run.summary["down_bytes"]) / rounds


@pytest.mark.parametrize("method", BYTES)
def test_bytes_are_those_of_the_formula_and_little_more(estimated, method):
    assert BYTES[method] < estimated[method] < 1.002 * BYTES[method]


def test_the_published_ratios_follow(estimated):
    check_ratios(estimated)


def test_the_published_ratios_are_those_of_real_packets(tmp_path, monkeypatch):
    (tmp_path / "two_blocks.py").write_text(TWO_BLOCKS)
    monkeypatch.syspath_prepend(tmp_path)
    found = {
        "fedavg": counted(All(), "vgg11_bn", samples=10),  # its bytes do not depend on the number of samples
        "splitfed": counted(chain(All(), SplitFed(cut=CUT))),
        "local_loss": counted(chain(All(), LocalLoss(cut=CUT))),
        "ecofed": counted(chain(All(), Plain8Bit(cut=CUT, period=PERIOD)), rounds=PERIOD),
    }
    for method, num_bytes in found.items():
        assert BYTES[method] < num_bytes < 1.002 * BYTES[method]
    check_ratios(found)


def check_ratios(found):
    assert 131 < found["fedavg"] / found["ecofed"] < 135
    assert 15.9 < found["splitfed"] / found["ecofed"] < 16.4
    assert 8.5 < found["local_loss"] / found["ecofed"] < 8.7
