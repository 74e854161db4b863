"""The server's records of all links (peers), within a budget of memory and one of disk.

Only devices that have taken part have a peer. Beyond ``memory_bytes`` the least recently used peers are written to files;
beyond ``disk_bytes`` the oldest files are dropped, and their devices are resynchronised with their next plans. A notice reports
the first drop, and every doubling of their number. A simulated device's own state is stored here too: it is sent with its plan
and comes back with its report. Models that states name are stored once (``shared_models``), within the same budgets.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ...clusters.scratch import Scratch, ScratchFolder
from ...comms.channel import Channel, LocalChannel, StoredBytes
from ...comms.codec import NumBytes
from ...comms.errors import OutOfSync, PacketError
from ...comms.links.memory import WHOLE, DeviceEnd, HeldModel, LinkMemory, ModelName
from ...comms.links.state import LinkState, from_state, named_models, state_bytes, to_state
from ...learning.parts.part import Part
from ..messages.messages import Message
from .shared_models import SharedModels

_MEMORY, _STATE = "memory:", "state:"


@dataclass(frozen=True)
class MovedLink:
    """What a record becomes once the device has acknowledged a plan at another place (``comms.links.memory``).

    ``stream``: "" if the plan's downlink has no memory.
    """

    stream: str
    place: bytes
    part: Part
    memory: LinkMemory


@dataclass
class Peer:
    """The server's record of one device's link.

    ``stream``: key of the downlink's settings; models of another stream do not count. ``place``: of the memories at both ends,
    and ``part``: the part that the device holds (None: not known yet). ``moved``: what a plan in flight changes of these.
    ``held``: version that the device has acknowledged; None before its first report. ``folded``: its newest plan whose update
    was folded (0: none). ``in_flight``: the model that its plan in flight was sent. ``lost``: the ends do not agree on what the
    device holds; ``resync_plan``: the plan that resynchronises it with a dense model.
    """

    stream: str = ""
    held: int | None = None
    memory: LinkMemory = field(default_factory=LinkMemory)
    folded: int = 0
    state: LinkState | None = None
    in_flight: HeldModel | None = None
    lost: bool = False
    resync_plan: int = 0
    place: bytes = WHOLE
    part: Part | None = None
    moved: MovedLink | None = None

    def move(self) -> None:
        """The device has moved to the place of its plan."""
        if self.moved is None:
            return
        self.stream, self.place, self.part = self.moved.stream, self.moved.place, self.moved.part
        self.memory, self.moved = self.moved.memory, None
        if not self.stream:
            self.held = None  # without a patch it has dropped its models

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays; arrays that peers share count for each of them."""
        models = sum(a.nbytes for model in self.memory.models for a in model.arrays.values())
        sent = sum(a.nbytes for s in self.memory.sent for arrays in (s.base, s.local) for a in arrays.values())
        return models + sent + (state_bytes(self.state) if self.state is not None else 0)


class Peers:
    """Peers by device, in order of use. The time of one ``put`` does not grow with their number."""

    SAVED: ClassVar[dict[str, Any]] = {  # by a checkpoint
        "_entries": dict[int, Peer],
        "_sizes": dict[int, NumBytes],
        "_evictable": OrderedDict[int, None],
        "_files": OrderedDict[int, NumBytes],
        "_named": dict[int, tuple[ModelName, ...]],
        "shared": SharedModels,
        "_total": NumBytes,
        "_files_total": NumBytes,
        "_over_budget": NumBytes,
        "held": dict[int, int],
        "dropped": NumBytes,
        "notices": list[str],
    }
    SAVED_AS: ClassVar = SAVED | {"paths": dict[int, StoredBytes], "shared": SharedModels.SAVED_AS}
    NOT_SAVED = ("_memory_bytes", "_disk_bytes", "_scratch", "_folder")

    def __init__(
        self,
        *,
        memory_bytes: int,
        disk_bytes: int,
        scratch: Scratch | None = None,
        channel: Channel | None = None,
    ) -> None:
        """Empty. The folder for files is made in ``scratch`` when it is first needed. ``channel``: for shared models."""
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._entries: dict[int, Peer] = {}
        self._sizes: dict[int, int] = {}  # bytes of each peer in memory
        # Devices whose peers are in memory and not in flight, least recently used first.
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()  # bytes of each device's file, oldest first
        self._named: dict[int, tuple[ModelName, ...]] = {}  # by device, the models that its state names
        self.shared = SharedModels(channel or LocalChannel(), self._made_folder)
        self._total = self._files_total = 0  # sums of ``_sizes`` and ``_files``
        self._over_budget = 0  # number dropped for the budget
        self._scratch = scratch or Scratch()
        self._folder: ScratchFolder | None = None
        self.held: dict[int, int] = {}  # by device, the version that it has acknowledged
        self.dropped = 0
        self.notices: list[str] = []

    def __len__(self) -> int:
        """Number of peers."""
        return len(self._entries)

    def get(self, device: int) -> Peer | None:
        """A device's peer, read from disk if needed; None if it has none."""
        if device in self._files:
            self._load(device, self._entries[device])
        return self._entries.get(device)

    def peek(self, device: int) -> Peer | None:
        """A device's peer without its arrays, which may be on disk."""
        return self._entries.get(device)

    def read(self, device: int) -> Peer | None:
        """A device's peer with its arrays, or a copy of it if they are on disk; it does not count as a use.

        None if the device has none, or its file cannot be read.
        """
        peer = self._entries.get(device)
        if peer is None or device not in self._files:
            return peer
        try:
            return replace(peer, **self._read_file(device))
        except (OSError, SafetensorError, OutOfSync):  # a notice follows when the peer is used
            return None

    def models(self, device: int) -> tuple[Message, ...]:
        """The packets of the models that a device's state names. Raises ``OSError`` and ``PacketError``."""
        return tuple(self.shared.message(name) for name in self._named.get(device, ()))

    def put(self, device: int, peer: Peer) -> None:
        """Store a peer as the most recently used. While its plan is in flight it stays in memory."""
        if device in self._files:
            self._remove_file(device)
            self.shared.release(self._named.pop(device, ()), in_memory=False)
        self._entries[device] = peer
        self._set_size(device, peer.num_bytes)
        before, named = self._named.pop(device, ()), named_models(peer.state)
        self.shared.hold(named)  # first, since they may be the same
        self.shared.release(before, in_memory=True)
        if named:
            self._named[device] = named
        self._evictable.pop(device, None)
        if peer.in_flight is None and self._sizes[device]:
            self._evictable[device] = None
        if peer.held is None or peer.lost:
            self.held.pop(device, None)
        else:
            self.held[device] = peer.held
        self._keep_budget()

    def streams(self) -> set[str]:
        """Keys of the downlinks that devices follow, or will follow after their plans in flight."""
        peers = self._entries.values()
        return {peer.stream for peer in peers} | {peer.moved.stream for peer in peers if peer.moved is not None}

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint, with the files of peers on disk, by device."""
        return {name: getattr(self, name) for name in self.SAVED} | {
            "paths": {device: self._path(device) for device in self._files},
            "shared": self.shared.saved(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state. ``paths``: by device, its stored file."""
        for name in self.SAVED.keys() - {"shared"}:
            setattr(self, name, saved[name])
        self.shared.restore(saved["shared"])
        for device, stored in saved["paths"].items():
            data = stored.read()
            try:
                self._path(device).write_bytes(data)
            except OSError as error:
                self._unwritten(device, error)

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def _keep_budget(self) -> None:
        """Write the least recently used peers to files, and drop the oldest files, until both budgets hold."""
        while self._evictable and self._total + self.shared.memory_bytes > self._memory_bytes:
            device, _ = self._evictable.popitem(last=False)
            self._spill(device, self._entries[device])
        while self._files and self._files_total + self.shared.disk_bytes > self._disk_bytes:
            device = next(iter(self._files))
            self._drop(device)
            self._over_budget += 1
            if self._over_budget.bit_count() == 1:
                self.notices.append(
                    f"the memory of device {device}'s link was dropped (number {self._over_budget} beyond the "
                    f"{self._disk_bytes} bytes that links may have on disk); it is resynchronised with its next plan"
                )

    def _spill(self, device: int, peer: Peer) -> None:
        """Write a peer's arrays to a file, and drop them from memory."""
        arrays = {_MEMORY + name: array for name, array in to_state(DeviceEnd(memory=peer.memory)).items()}
        if peer.state is not None:
            arrays |= {_STATE + name: array for name, array in peer.state.items()}
        try:
            path = self._path(device)
            # (ascontiguousarray would give a number without dimensions one.) The format sorts tensors, and the order of a
            # model's is part of its hash.
            numbered = {f"{number:06} {name}": array for number, (name, array) in enumerate(arrays.items())}
            save_file({name: np.asarray(array, order="C") for name, array in numbered.items()}, path)
            self.shared.park(self._named.get(device, ()))
        except (OSError, SafetensorError) as error:
            if self._folder is not None:
                self._path(device).unlink(missing_ok=True)
            self._unwritten(device, error)
            return
        self._files[device] = path.stat().st_size
        self._files_total += self._files[device]
        self._set_size(device, 0)
        peer.memory, peer.state = LinkMemory(), None

    def _unwritten(self, device: int, error: Exception) -> None:
        """Drop a peer whose file could not be written."""
        self._drop(device)
        self.notices.append(f"the memory of device {device}'s link could not be written to disk ({error}); dropped")

    def _load(self, device: int, peer: Peer) -> None:
        """Read a peer's arrays back; a peer whose file is missing or damaged is dropped."""
        try:
            arrays = self._read_file(device)
            self.shared.unpark(self._named.get(device, ()))
        except (OSError, SafetensorError, PacketError) as error:
            self._drop(device)
            self.notices.append(f"the memory of device {device}'s link could not be read from disk ({error}); dropped")
            return
        peer.memory, peer.state = arrays["memory"], arrays["state"]
        self._remove_file(device)
        self._set_size(device, peer.num_bytes)
        self._evictable[device] = None

    def _read_file(self, device: int) -> dict[str, Any]:
        """``memory`` and ``state`` of a peer on disk. Raises ``OSError``, ``SafetensorError`` or ``OutOfSync``."""
        numbered = load_file(self._path(device))
        arrays = {name.partition(" ")[2]: numbered[name] for name in sorted(numbered)}
        memory = {name.removeprefix(_MEMORY): a for name, a in arrays.items() if name.startswith(_MEMORY)}
        state = {name.removeprefix(_STATE): a for name, a in arrays.items() if name.startswith(_STATE)}
        return {"memory": from_state(memory).memory, "state": state or None}

    def _drop(self, device: int) -> None:
        """Drop a peer's memory, and its file: its device is resynchronised with its next plan."""
        on_disk = device in self._files
        if on_disk:
            self._remove_file(device)
        self.shared.release(self._named.pop(device, ()), in_memory=not on_disk)
        self._evictable.pop(device, None)
        self._entries[device] = Peer(folded=self._entries[device].folded, lost=True)
        self.held.pop(device, None)
        self._set_size(device, 0)
        self.dropped += 1

    def _set_size(self, device: int, num_bytes: int) -> None:
        """Set the bytes that a peer takes in memory."""
        self._total += num_bytes - self._sizes.get(device, 0)
        self._sizes[device] = num_bytes

    def _remove_file(self, device: int) -> None:
        """Remove a device's file."""
        self._path(device).unlink(missing_ok=True)
        self._files_total -= self._files.pop(device)

    def _path(self, device: int) -> Path:
        """The path of a device's file."""
        return self._made_folder() / f"{device}.safetensors"

    def _made_folder(self) -> Path:
        """The folder for files, made now if it is first needed."""
        if self._folder is None:
            self._folder = self._scratch.folder("links")
        return self._folder.path
