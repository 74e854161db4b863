"""Shared heads: updates of one device after another are summed at the server, as if they had trained one copy."""

import copy
from typing import Any

import msgspec
import pytest
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.host.partition_host import PartitionHost
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.server.routes import Opened
from fedbonsai.actors.server.server import Server
from fedbonsai.actors.support import PlanRefused
from fedbonsai.comms.errors import MismatchedPacket
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Call
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.split import DeviceLeg, HostLeg
from fedbonsai.learning.training.training import train
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan, Split, Upload
from fedbonsai.policies.report import Report

from ..host.test_partition_host import SAMPLES, Direct
from ..steps import IMAGES, LINE, TRAINING, make_plan, make_server

FRONT = Part(blocks=("conv",), trained=("conv",))


def shared_plan(server: Server, device: int, *, head: str = "shared", **changes: Any) -> Plan:
    split = Split(cut="conv", head=head, host=changes.pop("host", 0))  # type: ignore[arg-type]
    return make_plan(server.workload, device, part=FRONT, split=split, **changes)


def carry_out(server: Server, plan: Plan, *, fails: bool = False, weight: float = 1.0) -> tuple[Any, Any]:
    """Carry out, fold and end one plan; both updates."""
    sent = server.send(plan)
    host, device = PartitionHost(Workload(IMAGES)), Device(Workload(IMAGES))
    host.begin(plan_message(plan), SAMPLES, *(message.reference for message in sent.host_messages))
    _, front, _ = device.run(plan_message(plan), sent.packets, None, Direct(host, plan))
    _, back = host.end(plan.id, plan.attempt)
    assert front is not None
    if not fails:
        server.fold(plan, server.open(plan, front, host=back), weight=weight)
    server.ended(plan, Report(plan=plan), None)
    return front, back


def closed(server: Server) -> dict[str, torch.Tensor]:
    server.close_version(in_flight=())
    return server.weights()


@pytest.mark.parametrize("hosts", [(0,), (0, 1)])
def test_with_one_device_for_each_host_it_is_slots_bit_for_bit(hosts: tuple[int, ...]) -> None:
    found = []
    for head in ("slots", "shared"):
        server = make_server(IMAGES)
        for device, host in enumerate(hosts):
            carry_out(server, shared_plan(server, device, head=head, host=host), weight=5.0 + device)
        closed(server)
        found.append(server.model_hash())
    assert found[0] == found[1]


@pytest.mark.parametrize("payload", ["difference", "weights"])
def test_two_devices_on_one_host_train_its_blocks_one_after_the_other(payload: str) -> None:
    server = make_server(IMAGES)
    upload = Upload(payload=payload)  # type: ignore[arg-type]
    plans = [shared_plan(server, device, upload=upload) for device in (1, 0)]
    for number, plan in enumerate(plans):
        carry_out(server, plan, weight=1.0 + 2 * number)
    found = closed(server)

    workload = server.workload
    of_host, fronts = workload.new_model().state_dict(), []
    for plan in plans:  # the host's blocks continue from plan to plan; every device starts with the version's blocks
        device, host = cut(workload.new_model()), cut(workload.new_model())
        host.model.load_state_dict({**host.model.state_dict(), **of_host})
        samples = workload.data.train(plan.device)
        loss = make_loss(TRAINING.loss)
        leg = HostLeg(
            host,
            workload.submodel(FRONT).rest(),
            training=TRAINING,
            loss=loss,
            seed=plan.seed,
            num_samples=len(samples),
            crossing=workload.family("").boundary(FRONT.blocks, TRAINING),
        )
        train(
            device.model,
            samples,
            training=TRAINING,
            loss=loss,
            transform=workload.data.train_transform,
            seed=plan.seed,
            trainable=[tensor.name for tensor in workload.spec.tensors_of(FRONT.trained)],
            gradient=DeviceLeg(device, FRONT.blocks, training=TRAINING, exchange=leg.micro_batch),
        )
        of_host = copy.deepcopy(host.model.state_dict())
        fronts.append(device.model.state_dict())
    for tensor in workload.spec.tensors_of(("out",)):
        torch.testing.assert_close(found[tensor.name], of_host[tensor.name], rtol=1e-5, atol=1e-6)
    for tensor in workload.spec.tensors_of(("conv",)):
        if tensor.role != "counter":
            mean = (fronts[0][tensor.name] + 3 * fronts[1][tensor.name]) / 4
            torch.testing.assert_close(found[tensor.name], mean, rtol=1e-5, atol=1e-6)


def test_a_plan_that_fails_leaves_the_blocks_unchanged() -> None:
    found = []
    for with_failure in (False, True):
        server = make_server(IMAGES)
        carry_out(server, shared_plan(server, 0))
        if with_failure:
            carry_out(server, shared_plan(server, 2), fails=True)
        carry_out(server, shared_plan(server, 1))
        closed(server)
        found.append(server.model_hash())
    assert found[0] == found[1]


def test_an_update_is_never_added_twice() -> None:
    server = make_server(IMAGES)
    plan = shared_plan(server, 0)
    front, back = carry_out(server, plan)
    with pytest.raises(MismatchedPacket, match="plan 10 does not train the shared head of host 0 now"):
        server.fold(plan, server.open(plan, front, host=back), weight=1.0)
    assert server.folded == 1


def test_an_update_cannot_be_added_after_its_version_has_closed() -> None:
    server, other = make_server(IMAGES), make_server(IMAGES)
    plan = shared_plan(server, 0)
    server.send(plan)
    front, back = carry_out(other, plan)
    closed(server)
    with pytest.raises(MismatchedPacket, match="does not train the shared head of host 0 now"):
        server.fold(plan, server.open(plan, front, host=back), weight=1.0)
    assert server.folded == 0


def test_hosts_enter_the_mean_with_the_samples_of_their_devices() -> None:
    # Host 0 trains with devices 0 and 1, of weight 1 and 2, host 1 with device 2, of weight 5.
    server, alone = make_server(IMAGES), [make_server(IMAGES), make_server(IMAGES)]
    start = server.weights()
    for device, host, weight in ((0, 0, 1.0), (1, 0, 2.0), (2, 1, 5.0)):
        for each in (server, alone[host]):
            carry_out(each, shared_plan(each, device, host=host), weight=weight)
    mean, first, second = closed(server), closed(alone[0]), closed(alone[1])
    for name in ("out.weight", "out.bias"):
        expected = start[name] + (3 * (first[name] - start[name]) + 5 * (second[name] - start[name])) / 8
        torch.testing.assert_close(mean[name], expected, rtol=1e-5, atol=1e-6)
    # The next version starts without a difference.
    plan = shared_plan(server, 0, version=1)
    sent = server.send(plan)
    slots = server.send(shared_plan(server, 0, version=1, head="slots"))
    (shared,), (own,) = ([message.reference.tobytes() for message in each.host_messages] for each in (sent, slots))
    assert shared == own


def test_differences_of_float16_are_summed_in_float32() -> None:
    """2048 and two ones: above 2048 float16 has even numbers only."""
    server = make_server(msgspec.structs.replace(LINE, model=Call("my_models:HalfLayers")))
    part, split = Part(blocks=("0",), trained=("0",)), Split(cut="0", head="shared")
    for number, difference in enumerate((2048.0, 1.0, 1.0)):
        plan = make_plan(server.workload, 0, id=10 + number, part=part, split=split)
        server.send(plan)
        update = {name: torch.tensor([[difference]], dtype=torch.float16) for name in ("0.weight", "1.weight")}
        server.fold(plan, Opened(update), weight=1.0)
        server.ended(plan, Report(plan=plan), None)
    assert closed(server)["1.weight"].item() == 2050.0


def test_a_plan_is_refused_while_another_of_its_version_has_the_shared_blocks() -> None:
    server = make_server(IMAGES)
    first, second = shared_plan(server, 0), shared_plan(server, 1)
    with pytest.raises(
        PlanRefused, match=r"^the policy chose device 1 while another device trains the shared head of host 0"
    ):
        server.check(second, [first])
    server.check(second, [])
    server.check(shared_plan(server, 1, host=1), [first])
    server.check(msgspec.structs.replace(second, version=1), [first])
    server.check(second, [msgspec.structs.replace(first, split=None)])
    server.check(shared_plan(server, 1, head="slots"), [first])
