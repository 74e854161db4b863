"""Many tensors of symbols in one stream: what the sender writes, and how the receiver reads it.

Sections, in order: description of each tensor; alphabets; density classes; positions; models of signs; all symbols.
"""

import numpy as np

from ..codec import Array, ArraySpec
from ..errors import CorruptPacket
from . import alphabets, density, positions, signs
from .alphabets import Alphabet
from .bounds import may_be_dense, most_entries
from .coders import SymbolReader, SymbolWriter
from .density import DensityClasses, Shape3
from .tables import Integers, Symbols, Table, fold, normalise, unfold
from .tensors import DENSE, EMPTY, SHARED, SPARSE, Dense, Sparse, Tensor, restored

_CODE_BITS = 9  # kind 2, view 2, axes 3, signs 2
_BASE_BITS = 6
_AXES = 3


def put(writer: SymbolWriter, tensors: list[Tensor], shared: Alphabet | None) -> None:
    """Writes all sections of these tensors. ``shared``: the alphabet of the tensors without one of their own."""
    codes = np.array([_code(tensor) for tensor in tensors], np.int64)
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
    codes = (np.cumsum(steps) & ((1 << _CODE_BITS) - 1)).tolist()
    kinds = [code & 3 for code in codes]
    views = [_shape_of(code, spec.shape) for code, spec in zip(codes, specs, strict=True) if code & 3 == SPARSE]
    modes = [code >> 7 for code in codes if code & 3 == SPARSE]
    flags = [code >> 4 & 7 for code in codes if code & 3 == SPARSE]
    _check_claims(specs, kinds, views, flags)
    num_own = sum(kind in (SPARSE, DENSE) for kind in kinds)
    with_classes = [axis for axis in range(_AXES) if any(flag >> axis & 1 for flag in flags)]
    found = iter(alphabets.take_alphabets(reader, num_own + (SHARED in kinds) + len(with_classes)))
    own = [next(found) if kind in (SPARSE, DENSE) else None for kind in kinds]
    shared = next(found) if SHARED in kinds else None
    classes = _take_classes(reader, views, flags, dict(zip(with_classes, found, strict=True)))
    most = sum(most_entries(spec) for kind, spec in zip(kinds, specs, strict=True) if kind == SPARSE)
    flats = positions.take_positions(reader, [positions.classed_shape(c) for c in classes], most) if classes else []
    models = signs.take_models(reader, modes, flats, views) if classes else []
    entries = iter(zip(flats, views, models, strict=True))
    tensors, requests = [], []
    for kind, alphabet, spec in zip(kinds, own, specs, strict=True):
        sign_requests, value_requests, entry = [], [], None
        if kind == SPARSE:
            entry = next(entries)
            sign_requests = signs.requests_of(*entry)
        if kind != EMPTY:
            alphabet = alphabet or shared
            assert alphabet is not None
            count = len(entry[0]) if entry else spec.items
            value_requests = alphabets.requests_of(count, alphabet)
        requests += sign_requests + value_requests
        tensors.append((entry, alphabet, len(sign_requests), len(value_requests)))
    parts = iter(reader.take(*requests))
    arrays = []
    for (entry, alphabet, num_signs, num_values), spec in zip(tensors, specs, strict=True):
        sign_parts = [next(parts) for _ in range(num_signs)]
        value_parts = [next(parts) for _ in range(num_values)]
        if alphabet is None:
            arrays.append(np.zeros(spec.shape, spec.dtype))
            continue
        values = alphabets.values_of(value_parts, alphabet)
        if entry is None:
            arrays.append(restored(values, spec.dtype).reshape(spec.shape))
        else:
            arrays.append(_scatter(values, signs.signs_of(sign_parts, *entry), entry[0], spec))
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


def _code(tensor: Tensor) -> int:
    """Kind, view, axes with classes, and mode of signs, in one number."""
    if tensor is None:
        return EMPTY
    if isinstance(tensor, Dense):
        return SHARED if tensor.alphabet is None else DENSE
    axes = sum((axis is not None) << number for number, axis in enumerate(tensor.classes.axes))
    return SPARSE | tensor.view << 2 | axes << 4 | tensor.signs.mode << 7


def _shape_of(code: int, shape: tuple[int, ...]) -> Shape3:
    """The view that a code names. Raises ``CorruptPacket`` if the shape has no such view."""
    shapes = density.shapes_of(shape)
    if code >> 2 & 3 >= len(shapes) or 0 in shape:
        raise CorruptPacket(
            f"an entropy-coded stream names view {code >> 2 & 3} of shape {shape}, which has {len(shapes)}"
        )
    return shapes[code >> 2 & 3]


def _check_claims(specs: list[ArraySpec], kinds: list[int], views: list[Shape3], flags: list[int]) -> None:
    """Raises ``CorruptPacket`` for descriptions that no sender writes for so few nonzero entries.

    They could make the receiver allocate more memory than the expected number of entries accounts for.
    """
    shapes = iter(zip(views, flags, strict=True))
    for kind, spec in zip(kinds, specs, strict=True):
        entries = most_entries(spec)
        if kind in (DENSE, SHARED) and not may_be_dense(spec.items, entries):
            raise CorruptPacket(
                f"an entropy-coded stream holds all symbols of {spec.name!r}, which has at most {entries} nonzero entries"
            )
        if kind == SPARSE:
            shape, flag = next(shapes)
            indices = sum(size for axis, size in enumerate(shape) if flag >> axis & 1)
            if flag and not density.may_have_classes(indices, spec.items, entries):
                raise CorruptPacket(
                    f"an entropy-coded stream has classes for {indices} channels of {spec.name!r}, too many"
                )


def _pooled(classes: list[DensityClasses], axis: int) -> Integers:
    """The classes of one axis, of all tensors that have any, folded."""
    own = [steps for c in classes if (steps := c.axes[axis]) is not None]
    return fold(np.concatenate(own)) if own else np.zeros(0, np.int64)


def _take_classes(
    reader: SymbolReader, shapes: list[Shape3], flags: list[int], of_axis: dict[int, Alphabet]
) -> list[DensityClasses]:
    """Reads the density classes of all sparse tensors. ``of_axis``: the alphabet of each axis that has classes."""
    counts = {a: sum(s[a] for s, flag in zip(shapes, flags, strict=True) if flag >> a & 1) for a in of_axis}
    requests = [alphabets.requests_of(counts[axis], alphabet) for axis, alphabet in of_axis.items()]
    bases, *rest = reader.take((len(shapes), _BASE_BITS), *(one for several in requests for one in several))
    parts = iter(rest)
    pooled, at = {}, dict.fromkeys(of_axis, 0)
    for (axis, alphabet), several in zip(of_axis.items(), requests, strict=True):
        folded = alphabets.values_of([next(parts) for _ in several], alphabet)
        if folded.max(initial=0) > 2 * density.MAX_STEP:
            raise CorruptPacket(f"an entropy-coded stream has a density class beyond {density.MAX_STEP}")
        pooled[axis] = unfold(folded.astype(np.int8))  # a byte for each index: there may be many
    classes = []
    for shape, flag, base in zip(shapes, flags, bases.tolist(), strict=True):
        own = DensityClasses(shape, base)
        for axis in of_axis:
            if flag >> axis & 1:
                own.axes[axis] = pooled[axis][at[axis] : at[axis] + shape[axis]]
                at[axis] += shape[axis]
        classes.append(own)
    return classes


def _repeats() -> Table:
    """The table of the differences between the codes of successive tensors: half of them are 0."""
    return normalise([1 << _CODE_BITS] + [1] * ((1 << _CODE_BITS) - 1))
