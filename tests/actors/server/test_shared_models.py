"""Models that devices share: in memory while a device in memory holds them, then in a file, then gone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedbonsai.actors.server.peers import Peer, Peers
from fedbonsai.actors.server.shared_models import SharedModels
from fedbonsai.comms.channel import LocalChannel, StoredBytes
from fedbonsai.comms.errors import PacketError
from fedbonsai.comms.links.memory import DeviceEnd, HeldModel, LinkMemory
from fedbonsai.comms.links.state import from_state, to_state

ITEMS = 1000


def model(seed: int) -> HeldModel:
    return HeldModel.of(seed, {"w": np.random.default_rng(seed).standard_normal(ITEMS).astype("<f4")})


@pytest.fixture(name="shared")
def shared_fixture(tmp_path: Path) -> SharedModels:
    return SharedModels(LocalChannel(), lambda: tmp_path)


def files(folder: Path) -> int:
    return len(list(folder.rglob("model-*")))


def peer(seed: int, held: HeldModel) -> Peer:
    """A record whose state names a model, with 40 bytes of its own."""
    end = DeviceEnd(memory=LinkMemory([held]), error={"w": np.full(10, seed, "<f4")})
    return Peer(held=held.version, state=to_state(end, named=[held.name]))


def test_a_model_is_stored_once_for_all_its_holders(shared: SharedModels, tmp_path: Path) -> None:
    for _ in range(3):
        shared.add(model(1))
        shared.hold([model(1).name])
    assert shared.memory_bytes == shared.message(model(1).name).num_bytes
    assert shared.message(model(1).name) is shared.message(model(1).name)
    for _ in range(3):
        assert model(1).name in shared
        shared.release([model(1).name], in_memory=True)
    assert model(1).name not in shared
    assert (shared.memory_bytes, shared.disk_bytes, files(tmp_path)) == (0, 0, 0)


def test_it_goes_to_disk_with_the_last_of_its_holders_and_comes_back_with_the_first(
    shared: SharedModels, tmp_path: Path
) -> None:
    name = model(1).name
    shared.add(model(1))
    before = shared.message(name).reference.tobytes()
    for _ in range(2):
        shared.hold([name])
    shared.park([name])
    assert (files(tmp_path), shared.disk_bytes) == (0, 0)
    shared.park([name])
    assert (files(tmp_path), shared.memory_bytes, shared.disk_bytes) == (1, 0, len(before))
    assert shared.message(name).reference.tobytes() == before  # read for one use
    assert shared.memory_bytes == 0
    shared.unpark([name])
    assert shared.memory_bytes == len(before)
    shared.release([name], in_memory=True)
    assert (files(tmp_path), shared.memory_bytes) == (1, 0)
    shared.release([name], in_memory=False)
    assert (files(tmp_path), shared.disk_bytes) == (0, 0)


def test_a_model_in_a_file_is_in_memory_again_for_one_more_holder(shared: SharedModels, tmp_path: Path) -> None:
    name = model(1).name
    shared.add(model(1))
    shared.hold([name])
    shared.park([name])
    shared.add(model(1))
    shared.hold([name])
    assert shared.message(name) is shared.message(name)
    assert shared.memory_bytes == shared.disk_bytes == shared.message(name).num_bytes
    shared.release([name], in_memory=True)
    assert (files(tmp_path), shared.memory_bytes) == (1, 0)


def test_its_file_is_gone_once_all_its_holders_are_in_memory_again(shared: SharedModels, tmp_path: Path) -> None:
    name = model(1).name
    shared.add(model(1))
    for _ in range(2):
        shared.hold([name])
    for _ in range(2):
        shared.park([name])
    shared.unpark([name])
    assert files(tmp_path) == 1
    shared.unpark([name])
    assert (files(tmp_path), shared.disk_bytes) == (0, 0)
    assert shared.memory_bytes == shared.message(name).num_bytes


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_damaged_file_is_an_error_and_changes_nothing(shared: SharedModels, tmp_path: Path, damage: str) -> None:
    for seed in (1, 2):
        shared.add(model(seed))
        shared.hold([model(seed).name])
        shared.park([model(seed).name])
    one, two = sorted(tmp_path.iterdir())
    if damage == "gone":
        one.unlink()
    else:
        one.write_bytes(one.read_bytes()[:100] if damage == "cut" else two.read_bytes())
    with pytest.raises((OSError, PacketError)):
        shared.unpark([model(1).name])
    assert shared.memory_bytes == 0
    shared.unpark([model(2).name])


def test_records_beyond_the_budget_take_their_model_to_disk_once(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    for device in range(5):
        peers.shared.add(model(7))
        peers.put(device, peer(device, model(7)))
    assert files(tmp_path) == 1
    assert peers.shared.memory_bytes == 0
    found = peers.get(3)
    assert found is not None
    end = from_state(found.state, [message.reference for message in peers.models(3)])
    assert end.memory.models[-1].arrays["w"].tobytes() == model(7).arrays["w"].tobytes()
    assert end.error["w"].tolist() == 10 * [3]
    for device in range(5):
        peers.put(device, Peer())
    assert (files(tmp_path), peers.shared.disk_bytes) == (0, 0)
    peers.close()


def test_a_record_whose_model_cannot_be_read_is_dropped_with_a_notice(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    peers.shared.add(model(7))
    peers.put(0, peer(0, model(7)))
    (path,) = tmp_path.rglob("model-*")
    path.write_bytes(b"")
    found = peers.get(0)
    assert found == Peer(lost=True)
    assert "device 0's link could not be read from disk" in peers.notices[0]
    assert model(7).name not in peers.shared
    peers.close()


def test_shared_models_in_memory_and_on_disk_are_restored(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    peers = Peers(memory_bytes=6_000, disk_bytes=10**6)
    for device, seed in enumerate((1, 2, 2)):
        peers.shared.add(model(seed))
        peers.put(device, peer(device, model(seed)))
    assert files(tmp_path) == 1

    def stored(paths: dict[Any, Path]) -> dict[Any, StoredBytes]:
        return {key: StoredBytes(path.name, path.read_bytes) for key, path in paths.items()}

    saved = peers.saved()
    saved |= {"paths": stored(saved["paths"])}
    saved["shared"] |= {"paths": stored(saved["shared"]["paths"])}
    again = Peers(memory_bytes=6_000, disk_bytes=10**6)
    again.restore(saved)
    for device, seed in enumerate((1, 2, 2)):
        found = again.get(device)
        assert found is not None
        end = from_state(found.state, [message.reference for message in again.models(device)])
        assert end.memory.models[-1].arrays["w"].tobytes() == model(seed).arrays["w"].tobytes()
    peers.close()
    again.close()
