"""The server's records of links within budgets: to disk and back bit for bit, then dropped with a notice."""

import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedbonsai.actors.server.peers import Peer, Peers
from fedbonsai.comms.channel import StoredBytes
from fedbonsai.comms.codec import Array
from fedbonsai.comms.links.memory import DeviceEnd, HeldModel, LinkMemory, PendingUpdate, SentUpdate
from fedbonsai.comms.links.state import LinkState, from_state, to_state
from safetensors.numpy import load_file, save_file

ITEMS = 1000  # 4,000 bytes a tensor


@pytest.fixture(name="folder", autouse=True)
def folder_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix)


def named(seed: int) -> dict[str, Array]:
    values = np.random.default_rng(seed).standard_normal(ITEMS).astype("<f4")
    return {"block/w.weight": values.reshape(10, -1).T, "scale": np.array(seed, "<f4"), "none": np.zeros((0, 2), "<f4")}


TENSORS_BYTES = 4 * ITEMS + 4


def peer(seed: int, *, state: LinkState | None = None) -> Peer:
    """One global model, and one pair: three times ``TENSORS_BYTES``."""
    memory = LinkMemory(
        models=[HeldModel.of(seed, named(seed))], sent=[SentUpdate(named(seed + 100), named(seed + 200))]
    )
    return Peer(stream=f"stream {seed}", held=seed, memory=memory, folded=seed + 10, state=state)


def contents(entry: Peer | None) -> dict[str, tuple[object, ...]]:
    assert entry is not None
    arrays = dict(to_state(DeviceEnd(memory=entry.memory)))
    arrays |= {f"state {name}": array for name, array in (entry.state or {}).items()}
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def device_state(seed: int) -> LinkState:
    pending = PendingUpdate(seed, SentUpdate(named(seed + 1), named(seed + 2)), named(seed + 3))
    memory = LinkMemory([HeldModel.of(seed, named(seed))])
    return to_state(DeviceEnd(memory=memory, error=named(seed + 4), pending=pending))


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """As on a full disk: a write beyond this size fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_bytes_of_a_peer_by_hand() -> None:
    assert peer(1).num_bytes == 3 * TENSORS_BYTES
    state = {"w": np.zeros(5, "<f4")}
    assert peer(1, state=state).num_bytes == 3 * TENSORS_BYTES + 20
    assert Peer().num_bytes == 0


def test_within_the_budget_nothing_is_written(folder: Path) -> None:
    peers = Peers(memory_bytes=2 * 3 * TENSORS_BYTES, disk_bytes=0)
    entries = [peer(1), peer(2)]
    for device, entry in enumerate(entries):
        peers.put(device, entry)
    assert [peers.get(device) for device in range(2)] == entries
    assert len(peers) == 2
    assert not list(folder.iterdir())
    assert peers.get(2) is None
    assert (peers.dropped, peers.notices) == (0, [])
    peers.close()


def test_beyond_the_budget_the_oldest_is_written_to_disk_and_read_back_bit_for_bit(folder: Path) -> None:
    peers = Peers(memory_bytes=int(2.5 * 3 * TENSORS_BYTES), disk_bytes=10**6)
    before = {}
    for device in range(4):
        entry = peer(device)
        before[device] = contents(entry)
        peers.put(device, entry)
    assert files(folder) == ["0.safetensors", "1.safetensors"]
    assert len(peers) == 4
    for device in range(4):
        read = contents(peers.read(device))
        assert files(folder) == [f"{each}.safetensors" for each in range(device, 2)]  # reading moves nothing
        entry = peers.get(device)
        assert contents(entry) == read == before[device]
        # The order of a model's tensors is part of its hash, which both ends compare.
        assert list(contents(entry)) == list(read) == list(before[device])
        assert entry is not None
        assert HeldModel.of(device, entry.memory.models[-1].arrays) == entry.memory.models[-1]
        assert (entry.stream, entry.held, entry.folded) == (f"stream {device}", device, device + 10)
        assert not entry.lost
    assert files(folder) == []
    assert (peers.dropped, peers.notices) == (0, [])
    peers.close()


def test_a_devices_own_state_is_written_with_its_peer(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    entry = peer(3, state=device_state(3))
    before = contents(entry)
    peers.put(7, entry)
    assert files(folder) == ["7.safetensors"]
    found = peers.get(7)
    assert contents(found) == before
    assert found is not None
    end = from_state(found.state)
    assert end.pending is not None
    assert end.pending.plan == 3
    assert end.error["scale"].shape == ()
    peers.close()


def test_a_peer_without_a_state_has_none_afterwards() -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    peers.put(7, peer(3))
    found = peers.get(7)
    assert found is not None
    assert found.state is None
    peers.close()


def test_least_recently_used_is_by_put(folder: Path) -> None:
    peers = Peers(memory_bytes=2 * 3 * TENSORS_BYTES, disk_bytes=10**6)
    entries = [peer(device) for device in range(3)]
    for device in (0, 1, 0, 2):
        peers.put(device, entries[device])
    assert files(folder) == ["1.safetensors"]
    peers.close()


def test_peeking_leaves_the_arrays_where_they_are(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    peers.put(0, peer(5))
    found = peers.peek(0)
    assert found is not None
    assert (found.held, found.num_bytes) == (5, 0)
    assert files(folder) == ["0.safetensors"]
    assert peers.peek(1) is None
    peers.close()


def test_beyond_the_disk_budget_the_oldest_file_is_dropped_and_its_peer_is_lost(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=int(2.5 * 3 * TENSORS_BYTES))
    for device in range(4):
        peers.put(device, peer(device, state={}))
    assert files(folder) == ["2.safetensors", "3.safetensors"]
    assert peers.dropped == 2
    assert len(peers) == 4
    assert peers.held == {2: 2, 3: 3}
    found = peers.get(0)
    assert found is not None
    # Only the number of the last folded plan is kept.
    assert found == Peer(folded=10, lost=True)
    peers.close()


def test_a_peer_in_flight_is_neither_written_nor_dropped(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=0)
    busy = peer(1)
    busy.in_flight = HeldModel.of(9, named(9))
    before = contents(busy)
    peers.put(1, busy)
    for device in range(2, 5):
        peers.put(device, peer(device))
    assert files(folder) == []
    assert peers.dropped == 3
    found = peers.get(1)
    assert found is busy
    assert contents(found) == before
    busy.in_flight = None  # its plan has ended
    peers.put(1, busy)
    assert peers.dropped == 4
    found = peers.get(1)
    assert found is not None
    assert found.lost
    peers.close()


def test_a_peer_that_is_put_again_leaves_no_file(folder: Path) -> None:
    peers = Peers(memory_bytes=3 * TENSORS_BYTES, disk_bytes=10**6)
    peers.put(0, peer(0))
    peers.put(1, peer(1))
    assert files(folder) == ["0.safetensors"]
    newer = peer(4)
    before = contents(newer)
    peers.put(0, newer)  # without a ``get`` before
    assert files(folder) == ["1.safetensors"]
    assert contents(peers.get(0)) == before
    peers.close()


def test_a_full_disk_drops_the_peer_with_a_notice(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    with files_no_larger_than(4096):
        peers.put(0, peer(0))
    assert files(folder) == []
    found = peers.get(0)
    assert found is not None
    assert found.lost
    assert not found.memory.models
    assert peers.dropped == 1
    (notice,) = peers.notices
    assert notice.startswith("the memory of device 0's link could not be written to disk (")
    assert notice.endswith("); dropped")
    peers.put(1, peer(1))  # the disk has room again
    assert files(folder) == ["1.safetensors"]
    peers.close()


def test_a_disk_that_is_full_when_a_run_is_resumed_drops_the_peer_with_a_notice(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    peers.put(0, peer(0))
    saved = peers.saved()
    saved["paths"] = {device: StoredBytes(path.name, path.read_bytes) for device, path in saved["paths"].items()}
    again = Peers(memory_bytes=0, disk_bytes=10**6)
    with files_no_larger_than(1024):
        again.restore(saved)
    found = again.get(0)
    assert found == Peer(folded=10, lost=True)
    (notice,) = again.notices
    assert notice.startswith("the memory of device 0's link could not be written to disk (")
    again.close()
    peers.close()


def test_without_a_folder_for_files_a_peer_is_dropped_with_a_notice(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "gone"))
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    peers.put(0, peer(0))
    assert peers.get(0) == Peer(folded=10, lost=True)
    assert "could not be written to disk" in peers.notices[0]
    peers.close()


def test_a_missing_folder_drops_its_peers_with_a_notice(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    peers.put(0, peer(0))
    (made,) = folder.iterdir()
    shutil.rmtree(made)
    found = peers.get(0)
    assert found is not None
    assert found == Peer(folded=10, lost=True)
    peers.put(1, peer(1))
    found = peers.get(1)
    assert found is not None
    assert found.lost
    assert [notice.split(" (")[0] for notice in peers.notices] == [
        "the memory of device 0's link could not be read from disk",
        "the memory of device 1's link could not be written to disk",
    ]
    assert peers.dropped == 2
    assert peers.held == {}
    peers.close()


def test_a_damaged_file_drops_its_peer_with_a_notice(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    peers.put(0, peer(0))
    (path,) = folder.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    found = peers.get(0)
    assert found is not None
    assert found.lost
    assert "device 0's link could not be read from disk" in peers.notices[0]
    assert files(folder) == []
    peers.close()


def test_a_readable_file_with_an_invalid_state_drops_its_peer_with_a_notice(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    peers.put(0, peer(0))
    (path,) = folder.rglob("*.safetensors")
    (head,) = [name for name in load_file(path) if name.endswith("memory:head")]
    save_file(load_file(path) | {head: np.zeros(3, np.uint8)}, path)
    assert peers.get(0) == Peer(folded=10, lost=True)
    assert peers.dropped == 1
    assert "device 0's link could not be read from disk (the state of the device's end" in peers.notices[0]
    assert files(folder) == []
    peers.close()


def test_drops_for_the_budget_are_reported_at_every_doubling() -> None:
    peers = Peers(memory_bytes=0, disk_bytes=5)
    for device in range(9):
        peers.put(device, peer(device))
    assert peers.dropped == 9
    assert [notice.partition(" (")[2].partition(" beyond the 5 bytes")[0] for notice in peers.notices] == [
        "number 1",
        "number 2",
        "number 4",
        "number 8",
    ]
    peers.close()


class Watched(Peer):
    """Counts how often ``in_flight`` is read."""

    reads = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "in_flight":
            Watched.reads += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_peer_is_read_when_it_is_put_and_not_for_others(in_flight: bool) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    for device in range(50):
        small = Watched(memory=LinkMemory([HeldModel.of(1, {"w": np.zeros(1, "<f4")})]))
        small.in_flight = small.memory.models[0] if in_flight else None
        peers.put(device, small)
    assert 50 <= Watched.reads <= 2 * 50
    Watched.reads = 0
    peers.close()


def test_closing_removes_all_files(folder: Path) -> None:
    peers = Peers(memory_bytes=0, disk_bytes=10**6)
    for device in range(3):
        peers.put(device, peer(device))
    assert len(files(folder)) == 3
    peers.close()
    assert not list(folder.iterdir())
    peers.close()  # once more does no harm


def test_lost_devices_hold_nothing() -> None:
    peers = Peers(memory_bytes=10**6, disk_bytes=0)
    entry = peer(4)
    peers.put(0, entry)
    peers.put(1, Peer())
    assert peers.held == {0: 4}
    entry.lost = True
    peers.put(0, entry)
    assert peers.held == {}
    peers.close()
