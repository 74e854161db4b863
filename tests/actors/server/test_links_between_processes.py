"""Links with memory whose two ends are in two processes, which exchange nothing but bytes, of which any may be lost."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

import msgspec
import numpy as np
import pytest
from fedbonsai.actors.enforcement.frames import read_frame, write_frame
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import Array
from fedbonsai.comms.links.predict import ANCHORED, Residual, hash_arrays
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Answer, Outcome, Report

from ..steps import IMAGES, make_server
from .test_links import BRIEF, SPARSE, linked

# The devices' process: each device keeps its end of the link. It is asked for hashes of what a device holds once it knows which
# plan was folded last.
DEVICES = """
import sys

import msgspec
import torch
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.device.device_with_memory import DeviceWithMemory
from fedbonsai.actors.enforcement.frames import read_frame, write_frame
from fedbonsai.comms.links.state import from_state
from fedbonsai.comms.links.predict import hash_arrays
from fedbonsai.learning.workload_settings import WorkloadSettings
from fedbonsai.learning.workload import Workload

torch.set_num_threads(1)
requests, answers = sys.stdin.buffer, sys.stdout.buffer
while True:
    try:
        request, packets = read_frame(requests)
    except EOFError:
        break
    if request["do"] == "start":
        sys.path[:] = request["path"]
        trainer = Device(Workload(msgspec.convert(request["settings"], WorkloadSettings)), whole_states=True)
        devices = {}
    elif request["do"] == "restart":
        del devices[request["device"]]
    elif request["do"] == "run":
        device = devices.setdefault(request["device"], DeviceWithMemory(trainer))
        report, update, state = device.run(request["plan"], packets)
        assert state is None
        write_frame(answers, {"report": report}, [] if update is None else [update])
    else:
        end = from_state(devices[request["device"]]._state)
        end.acknowledge(request["folded"])
        models = [(model.version, hash_arrays(model.arrays)) for model in end.memory.models]
        sent = [(hash_arrays(each.base), hash_arrays(each.local)) for each in end.memory.sent]
        write_frame(answers, {"models": models, "sent": sent})
"""


FATES = ["all arrives", "not folded", "plan lost", "answer lost", "restart"]


class DevicesProcess:
    """The other process, and the pipes to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", DEVICES], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stdin, self._stdout = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)

    def tell(self, do: str, *, packets: Sequence[Array] = (), **fields: Any) -> None:
        write_frame(self._stdin, {"do": do, **fields}, packets)

    def run(self, plan: Plan, packets: Sequence[Array]) -> tuple[Report, Array | None]:
        self.tell("run", device=plan.device, plan=plan_message(plan), packets=packets)
        header, updates = read_frame(self._stdout)
        return Report.of(plan, msgspec.msgpack.decode(header["report"], type=Answer)), updates[0] if updates else None

    def hashes(self, device: int, *, folded: int) -> tuple[list[list[int]], list[list[int]]]:
        """Versions and hashes of the models that a device holds, and hashes of the pairs that it has sent."""
        self.tell("hash", device=device, folded=folded)
        header, _ = read_frame(self._stdout)
        return header["models"], header["sent"]

    def close(self) -> None:
        self._stdin.close()
        self._stdout.close()
        assert self._process.wait() == 0


@pytest.fixture(name="devices", scope="module")
def devices_fixture() -> Iterator[DevicesProcess]:
    process = DevicesProcess()
    yield process
    process.close()


def hashes_at_server(server: Server, device: int) -> tuple[list[list[int]], list[list[int]]]:
    """What ``DevicesProcess.hashes`` returns, of the server's end. (Before the version closes.)"""
    peer = server.links.peers.get(device)
    assert peer is not None
    held = peer.memory.models or [server.links.downlinks._broadcasts[peer.stream].held]
    models = [[model.version, hash_arrays(model.arrays)] for model in held]
    return models, [[hash_arrays(each.base), hash_arrays(each.local)] for each in peer.memory.sent]


# Every rule of each direction. With a downlink that needs what the device has sent, both ends keep that for ``delta`` too.
@pytest.mark.parametrize(
    ("up", "down"),
    [
        ("delta", "half_step"),
        ("drift", "second_order"),
        ("stationary", "stationary"),
        ("half_step", "half_step"),
        ("second_order", "stationary"),
    ],
)
def test_two_processes_hold_the_same_bits_over_200_rounds_with_random_losses(
    devices: DevicesProcess, up: str, down: str
) -> None:
    rng = np.random.default_rng(7)
    server = make_server(IMAGES)
    devices.tell("start", settings=msgspec.to_builtins(IMAGES), path=[entry or os.getcwd() for entry in sys.path])
    links = {"link_down": Residual(rule=down), "link_up": Residual(rule=up, feedback=up in ANCHORED)}
    seen: dict[str, int] = dict.fromkeys(("same", "with pairs", "resync", "refused"), 0)
    strayed: set[int] = set()  # devices that hold something else than in the server's record
    for number in range(1, 201):
        device = number % 3
        sent = server.send(linked(server, device, number, **links, codec_up=SPARSE, codec_down=SPARSE, training=BRIEF))
        resync = any(message.kind == "resync" for message in sent.messages)
        seen["resync"] += resync
        happens = rng.choice(FATES, p=[0.7, 0.1, 0.1, 0.05, 0.05])
        if happens == "restart" and number > 3:
            devices.tell("restart", device=device)
        if happens == "plan lost":
            server.ended(sent.plan, Report(plan=sent.plan, outcome=Outcome.LOST), None)
            continue
        report, update = devices.run(sent.plan, sent.packets)
        if happens == "answer lost":
            server.ended(sent.plan, Report(plan=sent.plan, outcome=Outcome.LOST), None)
            strayed.add(device)
            continue
        if report.outcome == Outcome.DONE and happens != "not folded":
            assert update is not None
            server.fold(sent.plan, server.open(sent.plan, update), weight=report.samples)
        server.ended(sent.plan, report, None)
        if report.outcome == Outcome.DONE:
            peer = server.links.peers.get(device)
            assert peer is not None
            models, pairs = hashes_at_server(server, device)
            found, found_pairs = devices.hashes(device, folded=peer.folded)
            assert found[-1] == models[-1]
            assert found[-len(models) :] == models[-len(found) :]
            assert found_pairs[-len(pairs) :] == pairs[-len(found_pairs) :]
            seen["same"] += 1
            seen["with pairs"] += bool(pairs)
            strayed.discard(device)
        else:  # before anything is built on what differs
            assert report.out_of_sync, report.error
            assert happens == "restart" or device in strayed
            seen["refused"] += 1
        if number % 2 == 0:
            server.close_version(in_flight=())
    assert seen["same"] > 130
    assert seen["with pairs"] > 120
    assert seen["resync"] >= seen["refused"] > 5
