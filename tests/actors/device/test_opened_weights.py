"""Dense models that several devices of a worker are sent are opened once."""

import weakref

import numpy as np
import pytest
import torch
from fedbonsai.actors.device.opened_weights import OpenedWeights
from fedbonsai.actors.messages.dense_packets import open_weights, seal_weights
from fedbonsai.comms.codec import Array, CodecSpec
from fedbonsai.comms.errors import CorruptPacket, PacketError
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan

from ..steps import LINE, make_plan

HALF, EIGHT = (CodecSpec("float16"),), (CodecSpec("uniform", {"bits": 8}),)


@pytest.fixture(name="workload")
def workload_fixture() -> Workload:
    return Workload(LINE)


def packet_of(plan: Plan, workload: Workload, value: float = 3.0, *, writeable: bool = False) -> Array:
    """A packet in which all weights have this value."""
    tensors = {name: torch.full_like(tensor, value) for name, tensor in workload.new_model().state_dict().items()}
    packet = seal_weights(plan, tensors, workload.submodel(plan.part))
    packet.flags.writeable = writeable
    return packet


def test_a_packet_is_opened_once_for_all_devices(workload: Workload) -> None:
    first, second = make_plan(workload, 0, codec_down=HALF), make_plan(workload, 1, codec_down=HALF)
    packet, opened = packet_of(first, workload), OpenedWeights()
    submodel = workload.submodel(first.part)
    found = opened.open(packet, first, submodel)
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in open_weights(packet, first, submodel).items()
    }
    assert opened.open(packet, second, submodel) is found
    assert opened.open(packet[:], second, submodel) is found  # a view of the same bytes, as the object store yields
    assert opened.open(packet.copy(), second, submodel) is not found
    with pytest.raises(ValueError, match="read-only"):
        next(iter(found.values()))[...] = 0


def test_a_packet_that_can_change_is_opened_each_time(workload: Workload) -> None:
    plan, opened = make_plan(workload), OpenedWeights()
    packet = packet_of(plan, workload, writeable=True)
    assert opened.open(packet, plan, workload.submodel(plan.part))["w"].max() == 3.0
    packet[-1] ^= 1
    with pytest.raises(CorruptPacket):
        opened.open(packet, plan, workload.submodel(plan.part))


def test_what_the_plan_says_of_a_packet_counts(workload: Workload) -> None:
    plan, opened = make_plan(workload, codec_down=HALF), OpenedWeights()
    packet, submodel = packet_of(plan, workload), workload.submodel(plan.part)
    found = opened.open(packet, plan, submodel)
    for changes in ({"codec_down": EIGHT}, {"version": 1, "codec_down": HALF}):
        with pytest.raises(PacketError):
            opened.open(packet, make_plan(workload, **changes), submodel)
    assert opened.open(packet, plan, submodel) is not found  # the last one that was opened is kept alone


def test_a_damaged_packet_is_refused_each_time(workload: Workload) -> None:
    plan, opened = make_plan(workload), OpenedWeights()
    damaged = packet_of(plan, workload).copy()
    damaged[-1] ^= 1
    damaged.flags.writeable = False
    for _ in range(2):
        with pytest.raises(CorruptPacket):
            opened.open(damaged, plan, workload.submodel(plan.part))


def test_one_packet_is_held(workload: Workload) -> None:
    plan, opened = make_plan(workload), OpenedWeights()
    submodel = workload.submodel(plan.part)
    packets = [packet_of(plan, workload, float(value)) for value in range(3)]
    found = [opened.open(packet, plan, submodel) for packet in packets]
    assert [np.unique(arrays["w"]).tolist() for arrays in found] == [[0.0], [1.0], [2.0]]
    assert opened.open(packets[2], plan, submodel) is found[2]
    first = weakref.ref(packets.pop(0))
    del found
    assert first() is None
