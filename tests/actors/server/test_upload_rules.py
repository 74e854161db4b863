"""ZeroFL's three rules for what an update holds, by hand and through the fold, and their identity with sending everything."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.dense_packets import seal_update
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.links.predict import Residual
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan, Upload

from ..steps import IMAGES, carry_out, make_plan, make_server, one_round

SMALL = msgspec.structs.replace(IMAGES, model=Call("my_models:Small"))
CONV = "conv.weight"  # 36 elements, of which two are sent; the first four are not zero
RULES: dict[str, tuple[str, str]] = {
    "top-k weights": ("weights", "sent"),
    "diff on top-k weights": ("difference", "reference"),
    "top-k of the diff": ("difference", "sent"),
}
rules = pytest.mark.parametrize("rule", RULES)


def by(rule: str, density: float, *after: str, scope: str = "tensor") -> dict[str, Any]:
    """The fields of a plan for a rule. ``after``: codecs after the selection."""
    payload, selection = RULES[rule]
    topk = CodecSpec("topk", {"density": density, "scope": scope, "by": selection})
    return {"upload": Upload(payload=payload), "codec_up": (topk, *map(CodecSpec, after))}


def fold(server: Server, device: int, conv: list[float], *, weight: float = 1, **changes: Any) -> None:
    """Fold the update of a device whose training left these first elements of the convolution, and all else as it was."""
    plan: Plan = server.send(make_plan(server.workload, device, version=server.version, **changes)).plan
    base = {name: tensor.clone() for name, tensor in server.tensors.items()}
    trained = {name: tensor.clone() for name, tensor in base.items()}
    trained[CONV].view(-1)[:4] = torch.tensor(conv)
    packet = seal_update(trained, base, plan, submodel=server.workload.submodel(plan.part))
    server.fold(plan, server.open(plan, packet), weight=weight)


def started() -> Server:
    server = make_server(SMALL)
    server.tensors[CONV].zero_().view(-1)[:4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    return server


@pytest.mark.parametrize("codecs", [(), ("sparse",), ("lz4",)], ids=str)
@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        # The first device sends 8 and 3, the second 6 and 2: one that only one of them sends is halved, one of neither is 0.
        ("top-k weights", [7.0, 1.5, 1.0, 0.0]),
        # The largest weights are at 0 and 1, and at 0 and 2: differences 4 and 0, and 2 and 0.
        ("diff on top-k weights", [7.0, 3.0, 2.0, 1.0]),
        # The largest differences are 4 and -2, and 2 and -2.
        ("top-k of the diff", [7.0, 2.0, 1.0, 1.0]),
    ],
)
def test_two_devices_by_hand(rule: str, wanted: list[float], codecs: tuple[str, ...]) -> None:
    server = started()
    fold(server, 0, [8.0, 3.0, 0.0, 0.5], **by(rule, 2 / 36, *codecs))
    fold(server, 1, [6.0, 1.0, 2.0, 1.0], **by(rule, 2 / 36, *codecs))
    server.close_version(in_flight=())
    assert server.weights()[CONV].reshape(-1)[:4].tolist() == wanted
    assert not server.weights()[CONV].reshape(-1)[4:].any()


@pytest.mark.parametrize("rule", ["diff on top-k weights", "top-k of the diff"])
def test_elements_that_no_device_sends_keep_every_bit(rule: str) -> None:
    server = make_server(SMALL)
    before = server.weights()
    for device, weight in enumerate((3, 7, 11)):
        trained = [float(value) for value in before[CONV].reshape(-1)[:4] + 0.1 * device + 0.3]
        fold(server, device, trained, weight=weight, **by(rule, 2 / 36, "float16", "sparse"))
    server.close_version(in_flight=())
    after = server.weights()
    moved = (after[CONV] != before[CONV]).reshape(-1)
    assert moved.any()
    assert not moved[4:].any()
    for name in before:
        if name != CONV:
            assert after[name].numpy().tobytes() == before[name].numpy().tobytes(), name


@rules
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_density_one_is_sending_everything_bit_for_bit(rule: str, scope: str) -> None:
    found = []
    for codecs in (by(rule, 1, "sparse", scope=scope), {"upload": Upload(payload=RULES[rule][0])}):
        server, device = make_server(IMAGES), Device(Workload(IMAGES))
        one_round(server, device, [make_plan(server.workload, number, **codecs) for number in range(3)])
        found.append({name: tensor.numpy().tobytes() for name, tensor in server.weights().items()})
    assert found[0] == found[1]


def test_a_link_with_memory_selects_by_the_trained_weights_too() -> None:
    """Without feedback, the residual of ``delta`` is the difference."""
    found = []
    for link in (None, Residual(rule="delta")):
        server, device = make_server(SMALL), Device(Workload(SMALL))
        plan = make_plan(server.workload, link_up=link, **by("diff on top-k weights", 0.25, "sparse"))
        sent = server.send(plan)
        report, update = carry_out(device, sent)
        assert update is not None, report.error
        found.append(server.open(sent.plan, update).differences)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    assert np.count_nonzero(found[0][CONV].numpy()) == 9
