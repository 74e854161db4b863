"""The maps that a device has received. The model has one group of four channels."""

import msgspec
import numpy as np
import pytest
from fedbonsai.actors.device import held_maps
from fedbonsai.actors.device.held_maps import HeldMaps
from fedbonsai.actors.messages.index_map import seal_map
from fedbonsai.comms.codec import Array
from fedbonsai.comms.errors import MismatchedPacket, OutOfSync, PacketError
from fedbonsai.learning.parts.channels import map_hash
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload import Workload

from ..steps import IMAGES, weights_packet

SMALL = msgspec.structs.replace(IMAGES, model=Call("my_models:Small"))
FIRST, LAST = np.array([1, 1, 0, 0], bool), np.array([0, 0, 1, 1], bool)
WEIGHTS = weights_packet(0, {"w": np.zeros(1, "<f4")})


def packet(kept: Array) -> Array:
    return seal_map(kept, map_hash(kept))


def part(kept: Array | None) -> Part:
    return Part(blocks=(), trained=(), width=0.5, index_map="" if kept is None else map_hash(kept))


@pytest.fixture(name="workload")
def workload_fixture() -> Workload:
    return Workload(SMALL)


@pytest.fixture(name="held")
def held_fixture(workload: Workload) -> HeldMaps:
    return HeldMaps(workload)


def test_a_map_is_kept_and_the_other_packets_are_passed_on(held: HeldMaps, workload: Workload) -> None:
    assert held.take(part(FIRST), [packet(FIRST), WEIGHTS])[0] is WEIGHTS
    assert workload.channels(part(FIRST)).tolist() == FIRST.tolist()
    assert held.take(part(FIRST), [WEIGHTS])[0] is WEIGHTS  # it has it already
    assert held.take(part(FIRST), [packet(FIRST), WEIGHTS])[0] is WEIGHTS  # a simulated device reads it again
    assert held.take(part(None), []) == []


def test_a_missing_map_is_out_of_sync(held: HeldMaps) -> None:
    held.take(part(FIRST), [packet(FIRST)])
    with pytest.raises(OutOfSync, match=f"the device does not have the index map {map_hash(LAST)}"):
        held.take(part(LAST), [WEIGHTS])


@pytest.mark.parametrize("named", [LAST, None])
def test_another_map_than_the_plans_is_refused(held: HeldMaps, workload: Workload, named: Array | None) -> None:
    with pytest.raises(PacketError):
        held.take(part(named), [packet(FIRST)])
    with pytest.raises(ValueError, match="a map that this process does not have"):
        workload.channels(part(FIRST))


def test_a_map_of_another_content_than_its_name_is_refused(held: HeldMaps) -> None:
    with pytest.raises(MismatchedPacket, match="content"):
        held.take(part(FIRST), [seal_map(LAST, map_hash(FIRST))])


def test_the_maps_used_longest_ago_are_dropped(
    held: HeldMaps, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_maps, "MAX_MAPS", 2)
    middle = np.array([0, 1, 1, 0], bool)
    held.take(part(FIRST), [packet(FIRST)])
    held.take(part(LAST), [packet(LAST)])
    held.take(part(FIRST), [])
    held.take(part(middle), [packet(middle)])
    assert workload.channels(part(FIRST)).tolist() == FIRST.tolist()
    with pytest.raises(OutOfSync):
        held.take(part(LAST), [])
    with pytest.raises(ValueError, match="a map that this process does not have"):
        workload.channels(part(LAST))
