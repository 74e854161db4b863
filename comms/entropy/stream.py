"""Many tensors of symbols in one stream: what the sender writes, and how the receiver reads it.

Sections, in order: description of each tensor; alphabets; density classes; positions; models of signs; all symbols.
"""

from typing import NamedTuple

import numpy as np

from ..codec import Array, ArraySpec
from ..errors import CorruptPacket
from . import alphabets, density, positions, signs
from .alphabets import Alphabet
from .bounds import may_be_dense, most_entries
from .coders import SymbolReader, SymbolWriter
from .density import DensityClasses, Shape3
from .signs import SignModel
from .tables import Integers, Symbols, Table, fold, normalise, unfold
from .tensors import DENSE, EMPTY, SHARED, SPARSE, Dense, Sparse, Tensor, restored

_CODE_BITS = 9  # kind 2, view 2, axes 3, mode 2
_BASE_BITS = 6
_AXES = 3


class _Description(NamedTuple):
    """The description of a tensor that is sent first, as one number (``code``).

    ``kind``: EMPTY, SPARSE, DENSE or SHARED. Of a sparse tensor also ``view``: number among ``density.shapes_of``; ``axes``:
    the axes that have classes, as bits; ``mode``: that of the sign model.
    """

    kind: int
    view: int = 0
    axes: int = 0
    mode: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> "_Description":
        """The description of the sender's tensor."""
        if tensor is None:
            return cls(EMPTY)
        if isinstance(tensor, Dense):
            return cls(SHARED if tensor.alphabet is None else DENSE)
        axes = sum((axis is not None) << number for number, axis in enumerate(tensor.classes.axes))
        return cls(SPARSE, tensor.view, axes, tensor.signs.mode)

    @classmethod
    def from_code(cls, code: int) -> "_Description":
        """The description of a code."""
        return cls(code & 3, code >> 2 & 3, code >> 4 & 7, code >> 7)

    @property
    def code(self) -> int:
        """The description as one number of ``_CODE_BITS`` bits."""
        return self.kind | self.view << 2 | self.axes << 4 | self.mode << 7

    def has_classes(self, axis: int) -> bool:
        """Whether the indices of an axis have classes."""
        return bool(self.axes >> axis & 1)


class _Entries(NamedTuple):
    """The nonzero entries of a sparse tensor: sorted flat positions, view of the tensor, and model of the signs."""

    flat: Integers
    shape: Shape3
    signs: SignModel


def put(writer: SymbolWriter, tensors: list[Tensor], shared: Alphabet | None) -> None:
    """Writes all sections of these tensors. ``shared``: the alphabet of the tensors without one of their own."""
    codes = np.array([_Description.of(tensor).code for tensor in tensors], np.int64)
    writer.put((np.diff(codes, prepend=0) & ((1 << _CODE_BITS) - 1), _repeats()))
    sparse = [tensor for tensor in tensors if isinstance(tensor, Sparse)]
    own = [tensor.alphabet for tensor in tensors if tensor is not None and tensor.alphabet is not None]
    classes = [_pooled([t.classes for t in sparse], axis) for axis in range(_AXES)]
    of_classes = [alphabets.fit(np.bincount(c, minlength=alphabets.SIZE))[0] if len(c) else None for c in classes]
    alphabets.put_alphabets(writer, [*own, *([shared] if shared else []), *(a for a in of_classes if a)])
    writer.put(
        (np.array([t.classes.base for t in sparse], np.int64), _BASE_BITS),
        *(p for c, a in zip(classes, of_classes, strict=True) if a for p in alphabets.pieces_of(c, a)),
    )
    if sparse:
        positions.put_positions(writer, [t.flat for t in sparse], [positions.classed_shape(t.classes) for t in sparse])
        signs.put_models(writer, [t.signs for t in sparse])
    pieces = []
    for tensor in tensors:
        if isinstance(tensor, Sparse):
            pieces += signs.pieces_of(tensor.negative, tensor.flat, tensor.classes.shape, tensor.signs)
            pieces += alphabets.pieces_of(tensor.magnitudes, tensor.alphabet)
        elif tensor is not None:
            alphabet = tensor.alphabet or shared
            assert alphabet is not None
            pieces += alphabets.pieces_of(tensor.values, alphabet)
    writer.put(*pieces)


def take(reader: SymbolReader, specs: list[ArraySpec]) -> list[Array]:
    """Reads arrays of these specifications. Raises a ``PacketError`` for a stream that no sender writes."""
    (steps,) = reader.take((len(specs), _repeats()))
    codes = np.cumsum(steps) & ((1 << _CODE_BITS) - 1)
    described = [_Description.from_code(code) for code in codes.tolist()]
    sparse = [(d, spec) for d, spec in zip(described, specs, strict=True) if d.kind == SPARSE]
    shapes = [_shape_of(d, spec.shape) for d, spec in sparse]
    _check_claims(described, specs, shapes)

    num_own = sum(d.kind in (SPARSE, DENSE) for d in described)
    any_shared = any(d.kind == SHARED for d in described)
    axes = [axis for axis in range(_AXES) if any(d.has_classes(axis) for d, _ in sparse)]
    received = iter(alphabets.take_alphabets(reader, num_own + any_shared + len(axes)))
    own = [next(received) if d.kind in (SPARSE, DENSE) else None for d in described]
    shared = next(received) if any_shared else None
    used = [shared if d.kind == SHARED else alphabet for d, alphabet in zip(described, own, strict=True)]

    classes = _take_classes(reader, [d for d, _ in sparse], shapes, dict(zip(axes, received, strict=True)))
    entries: list[_Entries] = []
    if sparse:
        most = sum(most_entries(spec) for _, spec in sparse)
        flats = positions.take_positions(reader, [positions.classed_shape(c) for c in classes], most)
        models = signs.take_models(reader, [d.mode for d, _ in sparse], flats, shapes)
        entries = [_Entries(*parts) for parts in zip(flats, shapes, models, strict=True)]
    of_sparse = iter(entries)
    return _take_symbols(reader, specs, used, [next(of_sparse) if d.kind == SPARSE else None for d in described])


def _take_symbols(
    reader: SymbolReader, specs: list[ArraySpec], used: list[Alphabet | None], entries: list[_Entries | None]
) -> list[Array]:
    """Reads the last section, and returns the arrays.

    For each tensor, ``used``: its alphabet, None if it is empty; ``entries``: its nonzero entries, None if it is not sparse.
    """
    requests = []
    for spec, alphabet, sparse in zip(specs, used, entries, strict=True):
        of_signs = signs.requests_of(*sparse) if sparse else []
        of_values = alphabets.requests_of(len(sparse.flat) if sparse else spec.items, alphabet) if alphabet else []
        requests.append((of_signs, of_values))
    parts = iter(reader.take(*(request for both in requests for some in both for request in some)))
    arrays = []
    for spec, alphabet, sparse, (of_signs, of_values) in zip(specs, used, entries, requests, strict=True):
        sign_parts, value_parts = [next(parts) for _ in of_signs], [next(parts) for _ in of_values]
        if alphabet is None:
            arrays.append(np.zeros(spec.shape, spec.dtype))
            continue
        values = alphabets.values_of(value_parts, alphabet)
        if sparse is None:
            arrays.append(restored(values, spec.dtype).reshape(spec.shape))
        else:
            arrays.append(_scatter(values, signs.signs_of(sign_parts, *sparse), sparse.flat, spec))
    return arrays


def _scatter(values: Symbols, negative: Symbols, flat: Integers, spec: ArraySpec) -> Array:
    """A sparse tensor from the magnitudes, signs and positions of its nonzero entries."""
    magnitudes = values.astype(np.int64)
    symbols = np.where(negative, -magnitudes, magnitudes)
    info = np.iinfo(spec.dtype)
    if len(symbols) and not info.min <= symbols.min() <= symbols.max() <= info.max:
        raise CorruptPacket(f"an entropy-coded stream holds a symbol that does not fit {spec.name!r}")
    array = np.zeros(spec.items, spec.dtype)
    array[flat] = symbols
    return array.reshape(spec.shape)


def _shape_of(described: _Description, shape: tuple[int, ...]) -> Shape3:
    """The view of a sparse tensor as rows, columns and cells. Raises ``CorruptPacket`` if the shape has no such view."""
    shapes = density.shapes_of(shape)
    if described.view >= len(shapes) or 0 in shape:
        raise CorruptPacket(f"an entropy-coded stream describes shape {shape} as sparse by view {described.view}")
    return shapes[described.view]


def _check_claims(described: list[_Description], specs: list[ArraySpec], shapes: list[Shape3]) -> None:
    """Raises ``CorruptPacket`` for descriptions that no sender writes for so few nonzero entries.

    They could make the receiver allocate more memory than the expected number of entries accounts for.
    """
    of_sparse = iter(shapes)
    for d, spec in zip(described, specs, strict=True):
        entries = most_entries(spec)
        if d.kind in (DENSE, SHARED) and not may_be_dense(spec.items, entries):
            raise CorruptPacket(
                f"an entropy-coded stream holds all symbols of {spec.name!r}, which has at most {entries} nonzero entries"
            )
        if d.kind == SPARSE:
            indices = sum(size for axis, size in enumerate(next(of_sparse)) if d.has_classes(axis))
            if d.axes and not density.may_have_classes(indices, spec.items, entries):
                raise CorruptPacket(
                    f"an entropy-coded stream has classes for {indices} channels of {spec.name!r}, too many"
                )


def _pooled(classes: list[DensityClasses], axis: int) -> Integers:
    """The classes of one axis, of all tensors that have any, folded."""
    own = [steps for c in classes if (steps := c.axes[axis]) is not None]
    return fold(np.concatenate(own)) if own else np.zeros(0, np.int64)


def _take_classes(
    reader: SymbolReader, described: list[_Description], shapes: list[Shape3], of_axis: dict[int, Alphabet]
) -> list[DensityClasses]:
    """Reads the density classes of all sparse tensors. ``of_axis``: the alphabet of each axis that has classes."""
    requests = []
    for axis, alphabet in of_axis.items():
        count = sum(shape[axis] for d, shape in zip(described, shapes, strict=True) if d.has_classes(axis))
        requests.append(alphabets.requests_of(count, alphabet))
    bases, *rest = reader.take((len(shapes), _BASE_BITS), *(request for several in requests for request in several))
    parts = iter(rest)
    pooled, at = {}, dict.fromkeys(of_axis, 0)
    for (axis, alphabet), several in zip(of_axis.items(), requests, strict=True):
        folded = alphabets.values_of([next(parts) for _ in several], alphabet)
        if folded.max(initial=0) > 2 * density.MAX_STEP:
            raise CorruptPacket(f"an entropy-coded stream has a density class beyond {density.MAX_STEP}")
        pooled[axis] = unfold(folded.astype(np.int8))  # a byte for each index: there may be many
    classes = []
    for d, shape, base in zip(described, shapes, bases.tolist(), strict=True):
        own = DensityClasses(shape, base)
        for axis in of_axis:
            if d.has_classes(axis):
                own.axes[axis] = pooled[axis][at[axis] : at[axis] + shape[axis]]
                at[axis] += shape[axis]
        classes.append(own)
    return classes


def _repeats() -> Table:
    """The table of the differences between the codes of successive tensors: half of them are 0."""
    return normalise([1 << _CODE_BITS] + [1] * ((1 << _CODE_BITS) - 1))
