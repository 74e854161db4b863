"""What the server remembers of each device's link, under a budget: in memory, then on disk, then no more.

Only devices that have taken part have an entry. When all entries together exceed ``memory_bytes``, those used longest ago
are written to files; beyond ``disk_bytes`` the oldest are dropped, and their devices are resynchronised when they come
again. A notice says so for the first, and whenever their number has doubled. A simulated device's own state is kept here
too: it travels with its plan, and comes back with its report.
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
from ...comms.channel import Stored
from ...comms.codec import NumBytes
from ...comms.errors import OutOfSync
from ...comms.links.link import DeviceEnd, Memory, Model, State, state_bytes

_MEMORY, _STATE = "memory:", "state:"


@dataclass
class Peer:
    """The server's end of one device's link.

    ``stream``: the downlink's settings; another stream's models are not its own. ``held``: version that the device has
    acknowledged; None before its first report. ``folded``: its newest plan whose update was folded (0: none). ``on_its_way``:
    the model that its plan in flight brings. ``lost``: it, or we, cannot say what it holds; ``restarting``: the plan that
    brings it a dense model for that.
    """

    stream: str = ""
    held: int | None = None
    memory: Memory = field(default_factory=Memory)
    folded: int = 0
    state: State | None = None
    on_its_way: Model | None = None
    lost: bool = False
    restarting: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays; those that entries share count for each."""
        models = sum(a.nbytes for model in self.memory.models for a in model.arrays.values())
        sent = sum(a.nbytes for s in self.memory.sent for named in (s.base, s.local) for a in named.values())
        return models + sent + (state_bytes(self.state) if self.state is not None else 0)


class Peers:
    """Entries by device, and which of them may go: what one ``put`` costs does not grow with their number."""

    SAVED: ClassVar[dict[str, Any]] = {  # by a checkpoint
        "_entries": dict[int, Peer],
        "_sizes": dict[int, NumBytes],
        "_landed": OrderedDict[int, None],
        "_files": OrderedDict[int, NumBytes],
        "_total": NumBytes,
        "_files_total": NumBytes,
        "_beyond": NumBytes,
        "held": dict[int, int],
        "dropped": NumBytes,
        "notices": list[str],
    }
    SAVED_AS: ClassVar = SAVED | {"paths": dict[int, Stored]}
    NOT_SAVED = ("_memory_bytes", "_disk_bytes", "_scratch", "_folder")

    def __init__(self, *, memory_bytes: int, disk_bytes: int, scratch: Scratch | None = None) -> None:
        """No entry yet; the folder for files is made in ``scratch`` when it is first needed."""
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._entries: dict[int, Peer] = {}
        self._sizes: dict[int, int] = {}  # bytes of each entry in memory
        self._landed: OrderedDict[int, None] = OrderedDict()  # in memory and not in flight, used longest ago first
        self._files: OrderedDict[int, int] = OrderedDict()  # bytes of each device's file, oldest first
        self._total = self._files_total = 0  # of sizes, of files
        self._beyond = 0  # dropped for the budget
        self._scratch = scratch or Scratch()
        self._folder: ScratchFolder | None = None
        self.held: dict[int, int] = {}  # version that each device has acknowledged
        self.dropped = 0
        self.notices: list[str] = []

    def __len__(self) -> int:
        """Number of devices that have an entry."""
        return len(self._entries)

    def get(self, device: int) -> Peer | None:
        """The entry of a device, as it was last put; None where there is none."""
        if device in self._files:
            self._load(device, self._entries[device])
        return self._entries.get(device)

    def peek(self, device: int) -> Peer | None:
        """The entry of a device without its arrays, which may be on disk."""
        return self._entries.get(device)

    def read(self, device: int) -> Peer | None:
        """A copy of a device's entry with its arrays, which are read from disk if they are there; it does not count as used.

        None where there is none, or where its file cannot be read.
        """
        peer = self._entries.get(device)
        if peer is None or device not in self._files:
            return peer
        try:
            return replace(peer, **self._read_file(device))
        except (OSError, SafetensorError, OutOfSync):  # told when the entry is used
            return None

    def put(self, device: int, peer: Peer) -> None:
        """Keep an entry, as the newest. While its plan is on its way it stays in memory."""
        if device in self._files:
            self._remove_file(device)
        self._entries[device] = peer
        self._set_size(device, peer.num_bytes)
        self._landed.pop(device, None)
        if peer.on_its_way is None and self._sizes[device]:
            self._landed[device] = None
        if peer.held is None or peer.lost:
            self.held.pop(device, None)
        else:
            self.held[device] = peer.held
        self._keep_budget()

    def streams(self) -> set[str]:
        """The downlinks that devices follow."""
        return {peer.stream for peer in self._entries.values()}

    def saved(self) -> dict[str, Any]:
        """What a checkpoint must hold: the entries, and the files of those that are on disk, by device."""
        return {name: getattr(self, name) for name in self.SAVED} | {
            "paths": {device: self._path(device) for device in self._files}
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put in what was saved. ``paths``: by device, what ``read`` gives the bytes of its file."""
        for name in self.SAVED:
            setattr(self, name, saved[name])
        for device, stored in saved["paths"].items():
            data = stored.read()
            try:
                self._path(device).write_bytes(data)
            except OSError as error:
                self._remove_file(device)
                self._unwritten(device, error)

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def _keep_budget(self) -> None:
        """Write the oldest entries to files, and drop the oldest files."""
        while self._landed and self._total > self._memory_bytes:
            device, _ = self._landed.popitem(last=False)
            self._spill(device, self._entries[device])
        while self._files and self._files_total > self._disk_bytes:
            device = next(iter(self._files))
            self._remove_file(device)
            self._drop(device)
            self._beyond += 1
            if self._beyond.bit_count() == 1:
                self.notices.append(
                    f"the memory of device {device}'s link was dropped (number {self._beyond} beyond the {self._disk_bytes} "
                    "bytes that links may have on disk); it is resynchronised when it comes again"
                )

    def _spill(self, device: int, peer: Peer) -> None:
        """Write an entry's arrays to a file; what is left of it takes no memory to speak of."""
        arrays = {_MEMORY + name: array for name, array in DeviceEnd(memory=peer.memory).to_state().items()}
        if peer.state is not None:
            arrays |= {_STATE + name: array for name, array in peer.state.items()}
        try:
            path = self._path(device)
            # (ascontiguousarray would give a number without dimensions one.) The format sorts tensors, and the order of a
            # model's is part of its hash.
            numbered = {f"{number:06} {name}": array for number, (name, array) in enumerate(arrays.items())}
            save_file({name: np.asarray(array, order="C") for name, array in numbered.items()}, path)
        except (OSError, SafetensorError) as error:
            if self._folder is not None:
                self._path(device).unlink(missing_ok=True)
            self._unwritten(device, error)
            return
        self._files[device] = path.stat().st_size
        self._files_total += self._files[device]
        self._set_size(device, 0)
        peer.memory, peer.state = Memory(), None

    def _unwritten(self, device: int, error: Exception) -> None:
        """An entry's file could not be written."""
        self._drop(device)
        self.notices.append(f"the memory of device {device}'s link could not be written to disk ({error}); dropped")

    def _load(self, device: int, peer: Peer) -> None:
        """Bring an entry's arrays back; where its file is gone or damaged, drop it."""
        try:
            found = self._read_file(device)
        except (OSError, SafetensorError, OutOfSync) as error:
            self._remove_file(device)
            self._drop(device)
            self.notices.append(f"the memory of device {device}'s link could not be read from disk ({error}); dropped")
            return
        peer.memory, peer.state = found["memory"], found["state"]
        self._remove_file(device)
        self._set_size(device, peer.num_bytes)
        self._landed[device] = None

    def _read_file(self, device: int) -> dict[str, Any]:
        """The arrays of an entry on disk: its ``memory`` and ``state``. Raises what they are read with."""
        numbered = load_file(self._path(device))
        arrays = {name.partition(" ")[2]: numbered[name] for name in sorted(numbered)}
        memory = {name.removeprefix(_MEMORY): a for name, a in arrays.items() if name.startswith(_MEMORY)}
        state = {name.removeprefix(_STATE): a for name, a in arrays.items() if name.startswith(_STATE)}
        return {"memory": DeviceEnd.from_state(memory).memory, "state": state or None}

    def _drop(self, device: int) -> None:
        """Forget what an entry holds: its device will be resynchronised."""
        self._landed.pop(device, None)
        self._entries[device] = Peer(folded=self._entries[device].folded, lost=True)
        self.held.pop(device, None)
        self._set_size(device, 0)
        self.dropped += 1

    def _set_size(self, device: int, num_bytes: int) -> None:
        """Note how much memory an entry takes."""
        self._total += num_bytes - self._sizes.get(device, 0)
        self._sizes[device] = num_bytes

    def _remove_file(self, device: int) -> None:
        """Forget a device's file."""
        self._path(device).unlink(missing_ok=True)
        self._files_total -= self._files.pop(device)

    def _path(self, device: int) -> Path:
        """The file of a device."""
        if self._folder is None:
            self._folder = self._scratch.folder("links")
        return self._folder.path / f"{device}.safetensors"
