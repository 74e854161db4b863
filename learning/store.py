"""The server's store: named tensors in sections, and the hash that names a model.

Sections: ``model`` (the global model, full names), ``auxiliaries`` (proxies, auxiliary heads), ``snapshots``,
``optimiser`` (the server optimiser's slots), ``trackers``. All of it is one value: a checkpoint is this value on disk.
"""

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
import xxhash
from torch import Tensor

Section = Literal["model", "auxiliaries", "snapshots", "optimiser", "trackers"]
SECTIONS: tuple[Section, ...] = ("model", "auxiliaries", "snapshots", "optimiser", "trackers")


class Store:
    """Sections of named tensors. ``store["model"]`` is a plain dict; tensors in it are contiguous and owned here."""

    def __init__(self, model: Mapping[str, Tensor]) -> None:
        """A store whose model section is a copy of ``model`` (a state dict)."""
        self._sections: dict[Section, dict[str, Tensor]] = {section: {} for section in SECTIONS}
        self["model"].update({name: tensor.detach().clone().contiguous() for name, tensor in model.items()})

    def __getitem__(self, section: Section) -> dict[str, Tensor]:
        """The tensors of one section."""
        return self._sections[section]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.nbytes for tensors in self._sections.values() for t in tensors.values())


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of name: two models with one hash are the same bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_hash(tensors: Mapping[str, Tensor]) -> int:
    """A fast 64-bit hash of the same, for the stamp of a packet: which state it builds on."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(name)
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.intdigest()
