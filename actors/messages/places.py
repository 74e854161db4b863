"""Places: which channels, of which family of models, the memory of a link belongs to, and how it moves from one to another.

Both ends derive a place from a plan's part, or, where the channels are given by a map, from the map. Its bytes name family and
channels completely, so an end that has dropped an old map can still move its memory. Only the groups of channels are needed for
it, never the full model.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...comms.codec import Array, ArraySpec
from ...comms.errors import OutOfSync
from ...comms.links.memory import Move
from ...learning.architecture import Kept
from ...learning.parts.channels import map_bytes, read_map
from ...learning.parts.part import Part
from ...learning.parts.slices import Slice, move_array, shared_items, sliced_shape
from ...learning.workload import Workload

_END = b"\0"  # of the family's name, where a map of channels follows
_MOST = 64  # places, and pairs of them, that are kept compiled


class Places:
    """Names places, and compiles moves between them."""

    def __init__(self, workload: Workload, *, choose: Callable[[Part], Kept] | None = None) -> None:
        """``choose``: the channels of a narrow part, also where its map is not named yet; None: those of the workload."""
        self._workload = workload
        self._choose = choose or workload.channels
        self._slices: OrderedDict[bytes, Mapping[str, Slice]] = OrderedDict()
        self._counts: OrderedDict[Any, dict[str, int]] = OrderedDict()

    def of(self, part: Part) -> bytes:
        """The place of a part. Raises ``ValueError`` for a map that this process does not have."""
        family = part.model.encode()
        if part.width == 1:
            return family
        kept = self._choose(part)
        return family if kept.all() else family + _END + map_bytes(kept).tobytes()

    def move(self, old: bytes, new: bytes) -> Move | None:
        """Leads from one place to another; None if they have nothing in common. The move raises ``OutOfSync`` if it cannot."""
        if family_of(old) != family_of(new):
            return None
        before, after = self._compiled(old), self._compiled(new)

        def move(name: str, array: Array) -> Array:
            one, other = before.get(name, ()), after.get(name, ())
            if not one and not other:
                return array
            try:
                return move_array(array, one, other, shape=self._full_shape(new, name, array.shape))
            except ValueError as error:
                raise OutOfSync(f"the memory of {name!r} cannot be moved to other channels: {error}") from error

        return move

    def new_items(self, old: bytes, new: bytes, specs: Iterable[ArraySpec]) -> dict[str, int]:
        """By tensor, the number of elements that the new place has and the old one does not; only of tensors with some.

        ``specs``: the tensors at the new place. The two places are of one family.
        """
        specs = tuple(specs)
        key = old, new, tuple(spec.name for spec in specs)
        if key not in self._counts:
            before, after = self._compiled(old), self._compiled(new)
            found = {}
            for spec in specs:
                full = self._full_shape(new, spec.name, spec.shape)
                shared = shared_items(full, before.get(spec.name, ()), after.get(spec.name, ()))
                if count := spec.items - shared:
                    found[spec.name] = count
            self._counts[key] = found
            if len(self._counts) > _MOST:
                self._counts.popitem(last=False)
        return self._counts[key]

    def problem(self, place: bytes, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Why these tensors cannot be of this place; "" if they can."""
        try:
            compiled = self._compiled(place)
            for name, shape in shapes.items() if compiled else ():
                full = self._full_shape(place, name, shape)
                if sliced_shape(full, compiled.get(name, ())) != shape:
                    return f"{name[:80]!r} has the shape {shape}, which its channels do not give"
        except (OutOfSync, ValueError) as error:
            return str(error)
        return ""

    def _compiled(self, place: bytes) -> Mapping[str, Slice]:
        """The slices of a place. Raises ``OutOfSync`` for bytes that are none of this workload."""
        if place not in self._slices:
            family, _, channels = place.partition(_END)
            try:
                architecture = self._workload.family(family.decode())
                found = architecture.slices(read_map(channels, architecture.groups)) if channels else {}
            except ValueError as error:
                raise OutOfSync(f"a link's memory is of channels that the model does not have: {error}") from error
            self._slices[place] = found
            if len(self._slices) > _MOST:
                self._slices.popitem(last=False)
        self._slices.move_to_end(place)
        return self._slices[place]

    def _full_shape(self, place: bytes, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a full tensor, from that of any narrow one of the family: only dimensions with channels differ."""
        owners = self._workload.family(family_of(place).decode()).groups.owners.get(name, {})
        return tuple(owners[dimension].size if dimension in owners else size for dimension, size in enumerate(shape))


def family_of(place: bytes) -> bytes:
    """The family of models of a place."""
    return place.partition(_END)[0]


def kept_channels(place: bytes) -> str:
    """How many channels a place has, "all" or the number: places of one width have equally many."""
    channels = place.partition(_END)[2]
    return str(int.from_bytes(channels, "big").bit_count()) if channels else "all"
