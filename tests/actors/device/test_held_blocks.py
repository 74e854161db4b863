"""The frozen blocks that a device has received, and those of the initial model."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from fedbonsai.actors.device import held_blocks
from fedbonsai.actors.device.held_blocks import HeldBlocks
from fedbonsai.actors.messages.block_packet import open_block, seal_block
from fedbonsai.actors.messages.trunk import BlockHashes, content_hash
from fedbonsai.comms.codec import Array
from fedbonsai.comms.errors import MismatchedPacket, OutOfSync, PacketError
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.workload import Workload
from torch import Tensor

from ..steps import FOUR, weights_packet

WEIGHTS = weights_packet(0, {"w": np.zeros(1, "<f4")})


@pytest.fixture(name="workload")
def workload_fixture() -> Workload:
    return Workload(FOUR)


@pytest.fixture(name="held")
def held_fixture(workload: Workload) -> HeldBlocks:
    return HeldBlocks(workload)


def model(workload: Workload, value: float | None = None) -> dict[str, Tensor]:
    """The model's tensors; with a value, all weights of blocks a and b have it."""
    tensors: dict[str, Tensor] = workload.new_model().state_dict()
    for name in ("a.weight", "b.weight") if value is not None else ():
        tensors[name].fill_(value or 0.0)
    return tensors


def name_of(workload: Workload, tensors: Mapping[str, Tensor], block: str) -> str:
    return BlockHashes(workload.spec, tensors).block(block)


def packet(workload: Workload, tensors: Mapping[str, Tensor], block: str) -> Array:
    return seal_block(tensors, block, name_of(workload, tensors, block), workload.spec)


def part(*cached: tuple[str, str]) -> Part:
    return Part(blocks=("a", "b", "c", "out"), trained=("out",), cached=cached)


def test_a_block_is_kept_and_the_other_packets_are_passed_on(held: HeldBlocks, workload: Workload) -> None:
    tensors = model(workload, 7.0)
    mine = part(("a", name_of(workload, tensors, "a")))
    (other,) = held.take(mine, [packet(workload, tensors, "a"), WEIGHTS])
    assert other is WEIGHTS
    for packets in ([WEIGHTS], [packet(workload, tensors, "a"), WEIGHTS]):  # simulated devices read it again
        assert held.take(mine, packets)[0] is WEIGHTS
        found = held.tensors(mine)
        assert set(found) == {"a.weight", "na.weight", "na.bias", "na.running_mean", "na.running_var"}
        assert found["a.weight"].eq(7.0).all()
    assert held.take(part(), []) == []
    assert held.tensors(part()) == {}


def test_blocks_of_the_initial_model_need_no_packet(held: HeldBlocks, workload: Workload) -> None:
    first, changed = model(workload), model(workload, 7.0)
    mine = part(("a", name_of(workload, first, "a")), ("b", name_of(workload, changed, "b")))
    held.take(mine, [packet(workload, changed, "b")])
    found = held.tensors(mine)
    assert torch.equal(found["a.weight"], first["a.weight"])
    assert found["b.weight"].eq(7.0).all()


def test_a_missing_block_is_out_of_sync(held: HeldBlocks, workload: Workload) -> None:
    name = name_of(workload, model(workload, 7.0), "a")
    with pytest.raises(OutOfSync, match=rf"^block 'a' of the trunk is \w{{16}} here, where the plan names {name}$"):
        held.tensors(part(("a", name)))


def test_a_block_that_the_plan_does_not_name_is_refused(held: HeldBlocks, workload: Workload) -> None:
    tensors = model(workload, 7.0)
    for mine in (part(), part(("b", name_of(workload, tensors, "b")))):
        with pytest.raises(PacketError):
            held.take(mine, [packet(workload, tensors, "a")])
    with pytest.raises(OutOfSync):
        held.tensors(part(("a", name_of(workload, tensors, "a"))))


def test_a_block_of_another_content_than_its_name_is_refused(held: HeldBlocks, workload: Workload) -> None:
    tensors, others = model(workload, 7.0), model(workload, 8.0)
    name = name_of(workload, tensors, "a")
    forged = seal_block(others, "a", name, workload.spec)
    sentence = f"^block 'a' with the hash {name} has the content of {name_of(workload, others, 'a')}$"
    with pytest.raises(MismatchedPacket, match=sentence):
        held.take(part(("a", name)), [forged])
    with pytest.raises(OutOfSync):  # nothing of it is kept
        held.tensors(part(("a", name)))
    with pytest.raises(PacketError):  # another block's tensors under this name
        held.take(part(("b", name)), [packet(workload, tensors, "a")])


@pytest.mark.parametrize("place", [0, 20, -20, -1])
def test_damage_is_found(held: HeldBlocks, workload: Workload, place: int) -> None:
    tensors = model(workload, 7.0)
    damaged = packet(workload, tensors, "a").copy()
    damaged[place] ^= 1
    with pytest.raises(PacketError):
        held.take(part(("a", name_of(workload, tensors, "a"))), [damaged])
    with pytest.raises(PacketError):
        held.take(part(("a", name_of(workload, tensors, "a"))), [packet(workload, tensors, "a")[:-9]])


def test_the_packet_of_a_block_is_opened_with_all_its_bits(workload: Workload) -> None:
    tensors = model(workload)
    tensors["na.running_mean"].copy_(torch.tensor([-0.0, 1e-42, 3.4e38, 1.0]))
    opened = open_block(packet(workload, tensors, "a"), "a", name_of(workload, tensors, "a"), workload.spec)
    assert content_hash(opened) == name_of(workload, tensors, "a")
    assert "na.num_batches_tracked" not in opened


def test_the_blocks_used_longest_ago_are_dropped(
    held: HeldBlocks, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_blocks, "MAX_BLOCKS", 2)
    versions = [model(workload, value) for value in (1.0, 2.0, 3.0)]
    parts = [part(("a", name_of(workload, tensors, "a"))) for tensors in versions]
    for mine, tensors in zip(parts[:2], versions, strict=False):
        held.take(mine, [packet(workload, tensors, "a")])
        held.tensors(mine)
    held.tensors(parts[0])
    held.take(parts[2], [packet(workload, versions[2], "a")])
    held.tensors(parts[2])
    assert held.tensors(parts[0])["a.weight"].eq(1.0).all()
    with pytest.raises(OutOfSync):
        held.tensors(parts[1])
