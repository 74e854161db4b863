"""Small workloads, and the steps of one plan between server and device."""

from typing import Any

import msgspec
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.messages import Dispatch, update_stamp, weights_stamp
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.comms.codec import NO_CONTEXT, Array, Arrays, IdentityCodec
from fedbonsai.comms.links.memory import DeviceEnd
from fedbonsai.comms.links.state import from_state
from fedbonsai.comms.packet import seal
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.part import whole
from fedbonsai.learning.spec import Call, Optimiser, ServerOptimiser, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Answer, Report

IMAGES = WorkloadSettings(
    model=Call("my_models:Everything"),
    data=DataConfig(
        name="synthetic",
        kwargs={"shape": (1, 4, 4), "classes": 3, "samples_per_device": 15, "test_samples": 20},
        test_share=0.2,
    ),
    metrics=(Call("accuracy"),),
    num_devices=3,
    seed=1,
)
FOUR = msgspec.structs.replace(IMAGES, model=Call("my_models:Four"))
LINE = WorkloadSettings(
    model=Call("my_models:Line"), data=DataConfig(name="my_models:points"), metrics=(), num_devices=2, seed=1
)
# One step of rate 1 on (w x - y)^2 / 2 at x = 1 takes w to y: device 0 sends 2, device 1 sends -1.
ONE_STEP = Training(
    loss=Call("my_models:half_square"), optimiser=Optimiser(learning_rate=1.0, momentum=0.0), batch_size=4
)
TRAINING = Training(optimiser=Optimiser(learning_rate=0.1), epochs=2, batch_size=5)


def make_plan(workload: Workload, device: int = 0, *, training: Training = TRAINING, **changes: Any) -> Plan:
    fields = {"id": 10 + device, "version": 0, "part": whole(workload.spec), "seed": 100 + device} | changes
    return Plan(device=device, training=training, **fields)


def make_server(settings: WorkloadSettings, **optimiser: Any) -> Server:
    return Server(Workload(settings), channel=LocalChannel(), optimiser=ServerOptimiser(**optimiser))


def run(device: Device, plan: Plan, packet: Array) -> tuple[Report, Array | None]:
    """Run a plan on a device; its decoded report, and the update."""
    report, update, state = device.run(plan_message(plan), [packet])
    assert state is None
    return Report.of(plan, msgspec.msgpack.decode(report, type=Answer)), update


def one_round(server: Server, device: Device, plans: list[Plan]) -> None:
    for plan in plans:
        report, update = run(device, plan, server.send(plan).packets[0])
        assert update is not None, report.error
        server.fold(plan, server.open(plan, update), weight=report.samples)
    server.close_version(in_flight=())


def carry_out(device: Device, sent: Dispatch) -> tuple[Report, Array | None]:
    """Run a plan as it is dispatched to a simulated device; its decoded report, and the update."""
    answer, update, _ = device.run(plan_message(sent.plan), sent.packets_for(simulated=True))
    return Report.of(sent.plan, msgspec.msgpack.decode(answer, type=Answer)), update


def end_of(server: Server, device: int) -> DeviceEnd:
    """The end of its link that a simulated device would have with its next plan."""
    links = server.links
    return from_state(links.state(device), [message.reference for message in links.models(device)])


def pack(plan: Plan, tensors: Arrays) -> Array:
    """A packet of an update with these tensors."""
    return seal(tensors, codec=IdentityCodec(), context=NO_CONTEXT, stamp=update_stamp(plan))[0]


def weights_packet(version: int, tensors: Arrays) -> Array:
    return seal(tensors, codec=IdentityCodec(), context=NO_CONTEXT, stamp=weights_stamp(version))[0]
