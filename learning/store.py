"""The server's store: named tensors in sections, and the hash that identifies a model.

Sections: ``model`` (the global model, full names), ``pending`` (the part of it that a lossy downlink has not sent yet),
``auxiliaries`` (proxies, auxiliary heads), ``families`` (models beside the global one, named ``FAMILY:name``), ``snapshots``,
``optimiser`` (the server optimiser's slots), ``trackers``. A checkpoint saves the whole store.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
import xxhash
from torch import Tensor

Section = Literal["model", "pending", "auxiliaries", "families", "snapshots", "optimiser", "trackers"]
SECTIONS: tuple[Section, ...] = ("model", "pending", "auxiliaries", "families", "snapshots", "optimiser", "trackers")


class Store:
    """Sections of named tensors. ``store["model"]`` is a plain dict; its tensors are contiguous and owned by the store."""

    SAVED: ClassVar = {"_sections": dict[Section, dict[str, Tensor]]}  # what a checkpoint saves, with its type
    SAVED_AS: ClassVar = dict.fromkeys(SECTIONS, dict[str, Tensor])
    NOT_SAVED = ()

    def __init__(self, model: Mapping[str, Tensor]) -> None:
        """Copy ``model`` (a state dict) into the model section. Tied tensors stay tied in the copy."""
        self._sections: dict[Section, dict[str, Tensor]] = {section: {} for section in SECTIONS}
        copies: dict[tuple[object, ...], Tensor] = {}
        for name, tensor in model.items():
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if memory not in copies:
                copies[memory] = tensor.detach().clone(memory_format=torch.contiguous_format)
            self["model"][name] = copies[memory]

    def __getitem__(self, section: Section) -> dict[str, Tensor]:
        """The tensors of one section."""
        return self._sections[section]

    def saved(self) -> dict[Section, dict[str, Tensor]]:
        """All sections, for a checkpoint."""
        return self._sections

    def restore(self, sections: Mapping[Section, Mapping[str, Tensor]]) -> None:
        """Restore saved sections. The models' tensors are changed in place, since modules may share them."""
        in_place: tuple[Section, ...] = ("model", "families")
        with torch.no_grad():
            for section in in_place:
                for name, tensor in sections[section].items():
                    self[section][name].copy_(tensor)
        for section in SECTIONS:
            if section in in_place:
                continue
            self[section].clear()
            self[section].update(sections[section])

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, tied ones counted once."""
        held = {id(t): t for tensors in self._sections.values() for t in tensors.values()}
        return sum(tensor.nbytes for tensor in held.values())


def same_shape_and_type(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and type."""
    return tensor.shape == other.shape and tensor.dtype == other.dtype


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of name: two models with the same hash have the same bits."""
    digest = hashlib.sha256()
    for piece in _pieces(tensors):
        digest.update(piece)
    return digest.hexdigest()


def state_hash(tensors: Mapping[str, Tensor]) -> int:
    """A fast 64-bit hash of the same bytes. The stamp of a packet holds it, to say which state the packet builds on."""
    digest = xxhash.xxh3_64()
    for piece in _pieces(tensors):
        digest.update(piece)
    return digest.intdigest()


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes to hash, in order of name. The length of each tensor's bytes follows from its type and shape."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        yield f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
