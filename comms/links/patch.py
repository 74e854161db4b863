"""Patches: a device that is to hold other channels of the model moves its memory by index, and is sent only what it lacks.

The server has the same memory, moves it alike, and seals the values of those elements that the new place has and the old one
does not, dense and in the order of the new part's tensors and elements. The stamp holds version and hash of the newest model
that results, so a device that held something else notices. All devices that move alike from the same model share the packet.
"""

from collections.abc import Mapping

import numpy as np

from ..codec import Array, Arrays, ArraySpec, Context, IdentityCodec
from ..errors import MismatchedPacket, OutOfSync
from ..packet import PacketKind, Stamp, seal, unseal
from .memory import LinkMemory, Move


def seal_patch(memory: LinkMemory, move: Move, model: Arrays) -> tuple[Array, LinkMemory]:
    """Seals what ``memory`` lacks at the new place, from the ``model`` there. Returns the packet, and the memory there."""
    indices = _new_elements(move, memory.models[-1].arrays)
    values = {name: model[name].reshape(-1)[index] for name, index in indices.items()}
    moved = memory.moved(move, added={name: (index, values[name]) for name, index in indices.items()})
    newest = moved.models[-1]
    stamp = Stamp(kind=PacketKind.PATCH, version=newest.version, state_hash=newest.hash)
    packet, _ = seal(values, codec=IdentityCodec(), context=Context(), stamp=stamp)
    return packet, moved


def apply_patch(packet: Array, stamp: Stamp, memory: LinkMemory, move: Move) -> LinkMemory:
    """The memory at the new place, by a packet of ``seal_patch`` with this stamp. Raises a ``PacketError``.

    ``OutOfSync`` is raised if the memory is not the one that the packet was sealed for.
    """
    newest = memory.models[-1]
    if newest.version != stamp.version:
        raise OutOfSync(f"a patch of version {stamp.version} was sent to a device that holds version {newest.version}")
    indices = _new_elements(move, newest.arrays)
    expected = patch_specs({name: index.size for name, index in indices.items()}, newest.arrays)
    try:
        values = unseal(packet, codec=IdentityCodec(), expected=expected, context=Context(), finite=True)
    except MismatchedPacket as error:
        raise OutOfSync(f"a patch does not fit the channels that the device holds: {error}") from error
    moved = memory.moved(move, added={name: (index, values[name]) for name, index in indices.items()})
    if (found := moved.models[-1].hash) != stamp.state_hash:
        raise OutOfSync(f"a patch leads to a model with hash {found:016x}; the server's has {stamp.state_hash:016x}")
    return moved


def patch_specs(counts: Mapping[str, int], arrays: Arrays) -> tuple[ArraySpec, ...]:
    """The arrays in a patch: by tensor, its number of new elements. ``arrays``: give the types."""
    return tuple(ArraySpec(name, (count,), arrays[name].dtype.str) for name, count in counts.items())


def _new_elements(move: Move, arrays: Arrays) -> dict[str, Array]:
    """By tensor, flat indices of the elements that the moved tensor has newly; only of tensors that have some."""
    held = {name: move(name, np.ones(array.shape, np.bool_)) for name, array in arrays.items()}
    return {name: np.flatnonzero(~mask) for name, mask in held.items() if not mask.all()}
