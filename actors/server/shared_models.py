"""The models that simulated devices hold: each stored once, as a packet, however many devices hold it.

A device's state names such a model (``comms.links.state``); the packet is passed beside the state. A model is in memory while
one of the devices whose records are in memory holds it, else in a file while any device holds it.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...comms.channel import Channel, StoredBytes
from ...comms.codec import Array, NumBytes
from ...comms.errors import PacketError
from ...comms.links.memory import HeldModel, ModelName
from ...comms.links.state import seal_named
from ...comms.packet import read_stamp
from ...learning.spec import CountOrZero
from ..messages.messages import Message


class SharedModels:
    """Models by name, and how many devices hold each: all of them, and those whose records are in memory."""

    SAVED: ClassVar[dict[str, Any]] = {  # by a checkpoint
        "_messages": dict[ModelName, Message],
        "_files": dict[ModelName, NumBytes],
        "_holders": dict[ModelName, CountOrZero],
        "_in_memory": dict[ModelName, CountOrZero],
        "memory_bytes": NumBytes,
        "disk_bytes": NumBytes,
    }
    SAVED_AS: ClassVar = SAVED | {"paths": dict[ModelName, StoredBytes]}
    NOT_SAVED = ("_channel", "_folder")

    def __init__(self, channel: Channel, folder: Callable[[], Path]) -> None:
        """No model. ``folder``: of the files, made when it is first called."""
        self._channel, self._folder = channel, folder
        self._messages: dict[ModelName, Message] = {}
        self._files: dict[ModelName, int] = {}  # bytes of each file
        self._holders: dict[ModelName, int] = {}
        self._in_memory: dict[ModelName, int] = {}
        self.memory_bytes = self.disk_bytes = 0  # of all packets in memory, and of all files

    def __contains__(self, name: ModelName) -> bool:
        """Whether a model is in memory."""
        return name in self._messages

    def add(self, model: HeldModel) -> None:
        """Store a model in memory, before a device whose record is there holds it (``hold``)."""
        if model.name not in self:
            self._store(model.name, seal_named(model))

    def message(self, name: ModelName) -> Message:
        """The packet of a model. One from a file is not kept in memory. Raises ``OSError`` and ``PacketError``."""
        if name in self._messages:
            return self._messages[name]
        packet = self._read(name)
        return Message(self._channel.put(packet), packet.nbytes, "held")

    def hold(self, names: Iterable[ModelName]) -> None:
        """One more device, whose record is in memory, holds these models, which must be there too."""
        for name in names:
            self._holders[name] = self._holders.get(name, 0) + 1
            self._in_memory[name] = self._in_memory.get(name, 0) + 1

    def release(self, names: Iterable[ModelName], *, in_memory: bool) -> None:
        """One device less holds these models. ``in_memory``: whether its record is in memory."""
        for name in names:
            self._holders[name] -= 1
            self._in_memory[name] -= in_memory
            if not self._in_memory[name]:
                self._forget(name)
            if not self._holders[name]:
                self._remove_file(name)
                del self._holders[name], self._in_memory[name]

    def park(self, names: Iterable[ModelName]) -> None:
        """The record of a device goes to disk. Raises ``OSError``, and changes nothing then."""
        last = [name for name in names if self._in_memory[name] == 1]
        for name in last:
            if name not in self._files:
                packet = self._channel.get(self._messages[name].reference)
                try:
                    packet.tofile(self._path(name))
                except OSError:
                    self._path(name).unlink(missing_ok=True)
                    raise
                self._files[name] = packet.nbytes
                self.disk_bytes += packet.nbytes
        for name in names:
            self._in_memory[name] -= 1
        for name in last:
            self._forget(name)

    def unpark(self, names: Iterable[ModelName]) -> None:
        """The record of a device is read from disk. Raises ``OSError`` and ``PacketError``, and changes nothing then."""
        packets = {name: self._read(name) for name in names if name not in self._messages}
        for name, packet in packets.items():
            self._store(name, packet)
        for name in names:
            self._in_memory[name] += 1
            if self._in_memory[name] == self._holders[name]:
                self._remove_file(name)

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint, with the files by model."""
        return {name: getattr(self, name) for name in self.SAVED} | {
            "paths": {name: self._path(name) for name in self._files}
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved state. A file that cannot be written is missed when it is read (``unpark``)."""
        for name in self.SAVED:
            setattr(self, name, saved[name])
        for name, stored in saved["paths"].items():
            try:
                self._path(name).write_bytes(stored.read())
            except OSError:
                continue

    def _store(self, name: ModelName, packet: Array) -> None:
        self._messages[name] = Message(self._channel.put(packet), packet.nbytes, "held")
        self.memory_bytes += packet.nbytes

    def _forget(self, name: ModelName) -> None:
        """Drop the packet of a model from memory, if it is there."""
        if (message := self._messages.pop(name, None)) is not None:
            self.memory_bytes -= message.num_bytes

    def _read(self, name: ModelName) -> Array:
        """The packet in a file. Raises ``OSError`` and ``PacketError``."""
        packet = np.fromfile(self._path(name), np.uint8)
        stamp = read_stamp(packet)
        if (stamp.version, stamp.state_hash) != name:
            raise PacketError(f"it is version {stamp.version} with hash {stamp.state_hash:016x}")
        return packet

    def _remove_file(self, name: ModelName) -> None:
        if name in self._files:
            self._path(name).unlink(missing_ok=True)
            self.disk_bytes -= self._files.pop(name)

    def _path(self, name: ModelName) -> Path:
        version, content = name
        return self._folder() / f"model-{version}-{content:016x}.packet"
