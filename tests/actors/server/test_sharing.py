"""Devices in the same state of their links share what does not depend on the device: encoded, decoded and stored once."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.messages.messages import Dispatch
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.codec import Arrays, ArraySpec, CodecSpec, Context
from fedbonsai.comms.codecs.make_codec import make_codec
from fedbonsai.comms.links.predict import hash_arrays
from fedbonsai.comms.links.state import named_models, state_bytes
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.report import Outcome

from ..steps import IMAGES, end_of, make_server
from .test_links import BRIEF, SPARSE, carry_out, finish, linked

INNER = make_codec(SPARSE)
calls = Counter[tuple[str, str]]()  # (direction, "encode" or "decode")


@dataclass(frozen=True)
class Counted:
    """A sparse chain, which counts its calls by direction."""

    direction: str

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        return INNER.layout(expected)

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        calls[self.direction, "encode"] += 1
        return INNER.encode(tensors, context=context)

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        calls[self.direction, "decode"] += 1
        return INNER.decode(arrays, expected=expected, context=context)


def counted(direction: str) -> tuple[CodecSpec, ...]:
    return (CodecSpec(f"{__name__}:Counted", {"direction": direction}),)


CHANGES: dict[str, Any] = {"codec_down": counted("down"), "codec_up": counted("up"), "training": BRIEF}
MANY = 100
HUNDRED = msgspec.structs.replace(IMAGES, num_devices=MANY)


@pytest.fixture(autouse=True)
def _counts_from_zero() -> None:
    calls.clear()


def one_round(server: Server, device: Device, devices: range) -> list[Dispatch]:
    """A round of these devices: all are dispatched before the first one is carried out."""
    first = 1000 * server.version + 1
    sent = [server.send(linked(server, each, first + each, **CHANGES)) for each in devices]
    for each in sent:
        assert finish(server, each, carry_out(device, each), fold=True).outcome == Outcome.DONE
    server.close_version(in_flight=())
    return sent


def model_bytes(server: Server) -> int:
    return sum(tensor.nbytes for tensor in server.store["model"].values() if tensor.is_floating_point())


def test_a_residual_is_encoded_once_and_decoded_once_by_a_worker_for_all_devices() -> None:
    server, device = make_server(HUNDRED), Device(Workload(HUNDRED))
    for _ in range(3):
        one_round(server, device, range(MANY))
    # In the first round there is no residual yet; the third round's end begins a fourth version.
    assert calls == {("down", "encode"): 3, ("down", "decode"): 2, ("up", "encode"): 300, ("up", "decode"): 300}


def test_devices_that_missed_different_rounds_decode_each_residual_once() -> None:
    server, device = make_server(HUNDRED), Device(Workload(HUNDRED))
    one_round(server, device, range(MANY))
    for version in range(1, 3):  # a device that missed rounds returns in every second one
        one_round(server, device, range(1))
        one_round(server, device, range(90 + version, 91 + version))
    assert calls["down", "encode"] == server.version == 5
    assert calls["down", "decode"] == 4
    sent = one_round(server, device, range(80, 90))
    assert {len(each.messages) for each in sent} == {5}
    assert calls["down", "decode"] == 5
    held = {hash_arrays(end_of(server, each).memory.models[-1].arrays) for each in range(80, 90)}
    assert len(held) == 1


def test_a_device_that_keeps_its_own_states_keeps_no_models_for_others() -> None:
    server, device = make_server(HUNDRED), Device(Workload(HUNDRED), whole_states=True)
    for _ in range(3):
        one_round(server, device, range(2))
    assert calls["down", "decode"] == 2 * 2  # a residual for each device in two of the rounds


def test_another_worker_decodes_for_itself_to_the_same_bits() -> None:
    server, device = make_server(HUNDRED), Device(Workload(HUNDRED))
    one_round(server, device, range(2))
    first, second = (server.send(linked(server, each, 1001 + each, **CHANGES)) for each in range(2))
    own = carry_out(device, first)
    again, other = carry_out(device, second), carry_out(Device(Workload(HUNDRED)), second)
    assert calls["down", "decode"] == 2
    assert own[1] is not None
    assert again[1] is not None
    assert other[1] is not None
    assert other[1].tobytes() == again[1].tobytes()
    assert {name: a.tobytes() for name, a in (other[2] or {}).items()} == {
        name: a.tobytes() for name, a in (again[2] or {}).items()
    }


def test_a_model_in_memory_that_was_damaged_is_not_taken_for_the_shared_one() -> None:
    server, device = make_server(HUNDRED), Device(Workload(HUNDRED))
    one_round(server, device, range(2))
    sent = [server.send(linked(server, each, 1001 + each, **CHANGES)) for each in range(2)]
    assert carry_out(device, sent[0])[0].outcome == Outcome.DONE
    (message,) = sent[1].remembered
    damaged = np.array(message.reference)
    damaged[100] ^= 1
    report = carry_out(device, replace(sent[1], remembered=(replace(message, reference=damaged),)))[0]
    assert (report.outcome, report.stage, report.out_of_sync) == (Outcome.FAILED, "open", True)


def test_plans_in_flight_carry_one_packet_of_the_model_that_their_devices_hold() -> None:
    server, device = make_server(HUNDRED), Device(Workload(HUNDRED))
    one_round(server, device, range(MANY))
    sent = [server.send(linked(server, each, 1001 + each, **CHANGES)) for each in range(MANY)]
    packets = [each.packets_for(simulated=True) for each in sent]
    assert {len(each) for each in packets} == {2}  # the model that they hold, and the residual
    assert [len({id(each[position]) for each in packets}) for position in range(2)] == [1, 1]
    own = [state_bytes(each.state) - each.state["head"].nbytes for each in sent if each.state is not None]
    assert own == MANY * [model_bytes(server)]  # what was not sent


def test_a_record_holds_one_model_and_all_records_share_another() -> None:
    server, device = make_server(HUNDRED), Device(Workload(HUNDRED))
    for _ in range(3):
        one_round(server, device, range(MANY))
    peers = server.links.peers
    states = [server.links.state(each) for each in range(MANY)]
    assert {len(named_models(state)) for state in states} == {1}
    heads = sum(state["head"].nbytes for state in states if state is not None)
    assert peers._total == MANY * model_bytes(server) + heads
    assert peers.shared.memory_bytes < 1.2 * model_bytes(server)


def test_a_state_comes_back_without_what_the_server_has() -> None:
    server, device = make_server(HUNDRED), Device(Workload(HUNDRED))
    one_round(server, device, range(1))
    _, _, state = carry_out(device, server.send(linked(server, 0, 1001, **CHANGES)))
    assert state is not None
    assert {name.partition("/")[0] for name in state} == {"head", "pending_error"}
    assert state_bytes(state) - state["head"].nbytes == model_bytes(server)
