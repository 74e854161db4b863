"""Updates of narrow parts and of families by hand, and the model of a device after its update."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.dense_packets import seal_update
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.server.prepare_plan import plan_for_host
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.links.predict import Residual
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan, Split

from ..steps import IMAGES, make_plan, make_server

SMALL = msgspec.structs.replace(IMAGES, model=Call("my_models:Small"), models={"other": Call("my_models:Small")})


def part_of(server: Server, *, family: str = "", **fields: Any) -> Part:
    return msgspec.structs.replace(whole(server.workload.family(family).spec, model=family), **fields)


def update_of(server: Server, plan: Plan, value: float, *, leg: int = 0) -> Any:
    """The packet of an update that adds ``value`` everywhere."""
    submodel = server.workload.submodel(plan.part)
    base = {t.name: torch.zeros(t.shape) for t in submodel.down}
    return seal_update({n: t + value for n, t in base.items()}, base, plan, submodel=submodel, leg=leg)


def fold(server: Server, part: Part, value: float, *, weight: float, scale: float = 1.0, device: int = 0) -> None:
    plan = server.send(make_plan(server.workload, device, part=part, version=server.version)).plan
    server.fold(plan, server.open(plan, update_of(server, plan, value)), weight=weight, scale=scale)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], name: str) -> list[float]:
    return (after[name] - before[name]).tolist()


def test_narrow_updates_by_hand() -> None:
    """Channels 0, 1 with weight 1 and difference 1; channels 1, 2 with weight 3 and difference 5; no part has channel 3."""
    server = make_server(SMALL)
    for tensor in server.tensors.values():
        tensor.zero_()
    before = server.weights()
    before["norm.weight"][3] = server.tensors["norm.weight"][3] = -0.0
    before["conv.weight"][3] = server.tensors["conv.weight"][3] = 1e-45
    fold(server, part_of(server, width=0.5, channels="rolling", turn=0), 1.0, weight=1)
    fold(server, part_of(server, width=0.5, channels="rolling", turn=1), 5.0, weight=3, device=1)
    server.close_version(in_flight=())
    after = server.weights()
    assert moved(before, after, "norm.weight")[:3] == [1.0, (1 + 15) / 4, 5.0]
    for name in ("norm.weight", "conv.weight", "norm.running_mean", "conv.bias"):
        assert after[name][3].numpy().tobytes() == before[name][3].numpy().tobytes(), name
    assert after["out.weight"][0].reshape(4, 16)[:, 0].tolist() == [1.0, 4.0, 5.0, 0.0]
    assert after["out.bias"].tolist() == [(1 + 15) / 4] * 3  # both hold it whole
    assert server.version == 1


def test_a_stale_narrow_update_is_scaled_and_counts_in_full() -> None:
    server = make_server(SMALL)
    before = server.weights()
    server.tensors["norm.weight"].zero_()
    before["norm.weight"].zero_()
    fold(server, part_of(server, width=0.5), 4.0, weight=1, scale=0.5)
    fold(server, part_of(server, width=0.25), 4.0, weight=3, device=1)
    server.close_version(in_flight=())
    assert moved(before, server.weights(), "norm.weight") == [(0.5 * 4 + 3 * 4) / 4, 0.5 * 4, 0.0, 0.0]


def test_families_are_averaged_apart() -> None:
    server = make_server(SMALL)
    for name in ("out.bias", "other:out.bias"):
        server.tensors[name].zero_()
    fold(server, part_of(server), 1.0, weight=1)
    fold(server, part_of(server, family="other"), 10.0, weight=1, device=1)
    fold(server, part_of(server, family="other", width=0.5), 30.0, weight=3, device=2)
    hashed = server.model_hash()
    server.close_version(in_flight=())
    assert server.weights()["out.bias"].tolist() == [1.0] * 3
    assert server.weights()["other:out.bias"].tolist() == [(10 + 90) / 4] * 3
    assert server.model_hash() != hashed


def test_the_hash_covers_the_models_of_families() -> None:
    server, plain = make_server(SMALL), make_server(msgspec.structs.replace(SMALL, models={}))
    first = server.model_hash()
    assert first != plain.model_hash()
    server.tensors["other:out.bias"].add_(1)
    assert server.model_hash() != first


def test_refined_tensors_replace_those_of_the_mean() -> None:
    server = make_server(SMALL)
    fold(server, part_of(server), 1.0, weight=1)
    seen: list[torch.Tensor] = []

    def refine() -> dict[str, torch.Tensor]:
        seen.append(server.weights()["out.bias"])
        return {"out.bias": torch.full((3,), 7.0), "other:out.bias": torch.full((3,), 8.0)}

    before = server.weights()
    server.close_version(in_flight=(), refine=refine)
    after = server.weights()
    torch.testing.assert_close(seen[0], before["out.bias"] + 1)
    assert (after["out.bias"].tolist(), after["other:out.bias"].tolist()) == ([7.0] * 3, [8.0] * 3)
    torch.testing.assert_close(after["norm.weight"], before["norm.weight"] + 1)
    assert server.evaluate(make_plan(server.workload).training, batch_size=20, family="other")["loss"] > 0


def check_trained(server: Server, plan: Plan, update: Any, expected: dict[str, Any]) -> None:
    submodel, tensors = server.trained_model(plan, update)
    assert submodel.part.blocks == submodel.part.trained == server.workload.family(plan.part.model).spec.block_names
    assert list(tensors) == [t.name for t in submodel.down]
    assert all(tuple(tensors[t.name].shape) == t.shape for t in submodel.down)
    for name, value in expected.items():
        np.testing.assert_allclose(tensors[name].numpy(), value, rtol=1e-6)


@pytest.mark.parametrize("payload", ["difference", "weights"])
def test_the_trained_model_of_a_dense_plan(payload: str) -> None:
    """From what was sent, although the server's version has changed since; of its own channels."""
    server = make_server(SMALL)
    start = server.weights()
    part = part_of(server, family="other", width=0.5, channels="rolling", turn=1)
    plan = make_plan(server.workload, part=part)
    plan = msgspec.structs.replace(plan, upload=msgspec.structs.replace(plan.upload, payload=payload))
    sent = server.send(plan)
    answer, packet, _ = Device(Workload(SMALL)).run(plan_message(sent.plan), sent.packets)
    assert packet is not None, answer
    for tensor in server.tensors.values():
        tensor.add_(100)
    update = server.open(sent.plan, packet)
    expected = {
        name: server.workload.submodel(part).gather({n: t for n, t in start.items() if n.startswith("other:")},
            [t for t in server.workload.submodel(part).down if t.name == name])[name] + difference
        for name, difference in update.differences.items()
    }  # fmt: skip
    check_trained(server, sent.plan, update, expected)


def test_the_trained_model_holds_blocks_that_the_plan_does_not_train() -> None:
    server = make_server(SMALL)
    names = server.workload.spec.block_names
    part = Part(blocks=names, trained=names[-1:])
    sent = server.send(make_plan(server.workload, part=part))
    update = server.open(sent.plan, update_of(server, sent.plan, 2.0))
    start = server.weights()
    check_trained(server, sent.plan, update, {"out.bias": start["out.bias"] + 2, "conv.weight": start["conv.weight"]})


def test_the_trained_model_of_a_plan_over_links_with_memory() -> None:
    server, device = make_server(SMALL), Device(Workload(SMALL))
    rule = Residual(rule="stationary")
    plan = make_plan(server.workload, link_down=rule, link_up=rule, codec_up=(CodecSpec("topk", {"density": 0.5}),))
    sent = server.send(plan)
    server.sent(sent.plan)
    answer, packet, _ = device.run(plan_message(sent.plan), sent.packets_for(simulated=True), sent.state)
    assert packet is not None, answer
    update = server.open(sent.plan, packet)
    start = server.weights()
    changed = update.differences["out.bias"]
    assert changed.any()
    check_trained(server, sent.plan, update, {"out.bias": start["out.bias"] + changed})


@pytest.mark.parametrize("head", ["slots", "shared"])
def test_the_trained_model_of_a_cut_plan_is_of_both_legs(head: str) -> None:
    server = make_server(SMALL)
    start, names = server.weights(), server.workload.spec.block_names
    first = names[:1]

    def of(device: int) -> Plan:
        part, split = Part(blocks=first, trained=first), Split(cut=first[0], head=head)  # type: ignore[arg-type]
        return server.send(make_plan(server.workload, device, part=part, split=split)).plan

    def opened(plan: Plan, value: float) -> Any:
        submodel = server.workload.submodel(plan.part)
        for_host = plan_for_host(plan, submodel, server._hashes)
        host = update_of(server, for_host, 10 * value, leg=1)
        return server.open(plan, update_of(server, plan, value), host=host)

    plan = of(0)
    update = opened(plan, 1.0)
    check_trained(server, plan, update, {"conv.weight": start["conv.weight"] + 1, "out.bias": start["out.bias"] + 10})
    server.fold(plan, update, weight=1)
    second = of(1)
    update = opened(second, 2.0)
    # With a shared head, the second device continues from the host's blocks as the first one left them.
    begins = start["out.bias"] + (10 if head == "shared" else 0)
    check_trained(server, second, update, {"conv.weight": start["conv.weight"] + 2, "out.bias": begins + 20})
    server.fold(second, update, weight=1)
