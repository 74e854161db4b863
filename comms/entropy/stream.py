"""Many tensors of symbols as one row of stages: what an encoder puts, and how a decoder takes it again.

Stages, in order: description of each tensor; alphabets; classes of density; positions; models of signs; all symbols.
"""

import numpy as np

from ..codec import Array, ArraySpec
from ..errors import CorruptPacket
from . import alphabets, density, positions, signs
from .alphabets import Alphabet
from .bounds import may_be_dense, most_entries
from .coders import StageReader, StageWriter, Symbols
from .density import Classes, Shape3
from .tables import Integers, Table, fold, normalise, unfold
from .tensors import DENSE, EMPTY, SHARED, SPARSE, Dense, Sparse, Tensor, restored

_CODE_BITS = 9  # kind 2, view 2, axes 3, signs 2
_BASE_BITS = 6
_AXES = 3


def put(encoder: StageWriter, tensors: list[Tensor], shared: Alphabet | None) -> None:
    """All stages of these tensors."""
    codes = np.array([_code(tensor) for tensor in tensors], np.int64)
    encoder.put((np.diff(codes, prepend=0) & ((1 << _CODE_BITS) - 1), _repeats()))
    sparse = [tensor for tensor in tensors if isinstance(tensor, Sparse)]
    own = [tensor.alphabet for tensor in tensors if tensor is not None and tensor.alphabet is not None]
    classes = [_pooled([t.classes for t in sparse], axis) for axis in range(_AXES)]
    of_classes = [alphabets.fit(np.bincount(c, minlength=alphabets.SIZE))[0] if len(c) else None for c in classes]
    alphabets.put_alphabets(encoder, [*own, *([shared] if shared else []), *(a for a in of_classes if a)])
    encoder.put(
        (np.array([t.classes.base for t in sparse], np.int64), _BASE_BITS),
        *(p for c, a in zip(classes, of_classes, strict=True) if a for p in alphabets.pieces_of(c, a)),
    )
    if sparse:
        positions.put_positions(encoder, [t.flat for t in sparse], [positions.view_of(t.classes) for t in sparse])
        signs.put_models(encoder, [t.signs for t in sparse])
    pieces = []
    for tensor in tensors:
        if isinstance(tensor, Sparse):
            pieces += signs.pieces_of(tensor.negative, tensor.flat, tensor.classes.shape, tensor.signs)
            pieces += alphabets.pieces_of(tensor.magnitudes, tensor.alphabet)
        elif tensor is not None:
            alphabet = tensor.alphabet or shared
            assert alphabet is not None
            pieces += alphabets.pieces_of(tensor.values, alphabet)
    encoder.put(*pieces)


def take(decoder: StageReader, specs: list[ArraySpec]) -> list[Array]:
    """Arrays of these specifications again. Raises a ``PacketError`` for what no sender sends."""
    (steps,) = decoder.take((len(specs), _repeats()))
    codes = (np.cumsum(steps) & ((1 << _CODE_BITS) - 1)).tolist()
    kinds = [code & 3 for code in codes]
    views = [_shape_of(code, spec.shape) for code, spec in zip(codes, specs, strict=True) if code & 3 == SPARSE]
    modes = [code >> 7 for code in codes if code & 3 == SPARSE]
    flags = [code >> 4 & 7 for code in codes if code & 3 == SPARSE]
    _check_claims(specs, kinds, views, flags)
    num_own = sum(kind in (SPARSE, DENSE) for kind in kinds)
    with_classes = [axis for axis in range(_AXES) if any(flag >> axis & 1 for flag in flags)]
    found = iter(alphabets.take_alphabets(decoder, num_own + (SHARED in kinds) + len(with_classes)))
    own = [next(found) if kind in (SPARSE, DENSE) else None for kind in kinds]
    shared = next(found) if SHARED in kinds else None
    classes = _take_classes(decoder, views, flags, dict(zip(with_classes, found, strict=True)))
    most = sum(most_entries(spec) for kind, spec in zip(kinds, specs, strict=True) if kind == SPARSE)
    flats = positions.take_positions(decoder, [positions.view_of(c) for c in classes], most) if classes else []
    models = signs.take_models(decoder, modes, flats, views) if classes else []
    entries = iter(zip(flats, views, models, strict=True))
    plan, wants = [], []
    for kind, alphabet, spec in zip(kinds, own, specs, strict=True):
        sign_wants, value_wants, entry = [], [], None
        if kind == SPARSE:
            entry = next(entries)
            sign_wants = signs.wants_of(*entry)
        if kind != EMPTY:
            alphabet = alphabet or shared
            assert alphabet is not None
            count = len(entry[0]) if entry else spec.items
            value_wants = alphabets.wants_of(count, alphabet)
        wants += sign_wants + value_wants
        plan.append((entry, alphabet, len(sign_wants), len(value_wants)))
    parts = iter(decoder.take(*wants))
    arrays = []
    for (entry, alphabet, num_signs, num_values), spec in zip(plan, specs, strict=True):
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
    """A sparse tensor from what is there."""
    magnitudes = values.astype(np.int64)
    symbols = np.where(negative, -magnitudes, magnitudes)
    info = np.iinfo(spec.dtype)
    if len(symbols) and not info.min <= symbols.min() <= symbols.max() <= info.max:
        raise CorruptPacket(f"an entropy-coded stream holds a symbol that does not fit {spec.name!r}")
    array = np.zeros(spec.items, spec.dtype)
    array[flat] = symbols
    return array.reshape(spec.shape)


def _code(tensor: Tensor) -> int:
    """Kind, view, axes that have classes, and mode of signs in one number."""
    if tensor is None:
        return EMPTY
    if isinstance(tensor, Dense):
        return SHARED if tensor.alphabet is None else DENSE
    axes = sum((axis is not None) << number for number, axis in enumerate(tensor.classes.axes))
    return SPARSE | tensor.view << 2 | axes << 4 | tensor.signs.mode << 7


def _shape_of(code: int, shape: tuple[int, ...]) -> Shape3:
    """The view that a code names."""
    shapes = density.shapes_of(shape)
    if code >> 2 & 3 >= len(shapes) or 0 in shape:
        raise CorruptPacket(f"an entropy-coded stream looks at shape {shape} in a way that there is not")
    return shapes[code >> 2 & 3]


def _check_claims(specs: list[ArraySpec], kinds: list[int], views: list[Shape3], flags: list[int]) -> None:
    """Refuse what no sender has for so few entries, and what would take memory that they do not account for."""
    shapes = iter(zip(views, flags, strict=True))
    for kind, spec in zip(kinds, specs, strict=True):
        entries = most_entries(spec)
        if kind in (DENSE, SHARED) and not may_be_dense(spec.items, entries):
            raise CorruptPacket(
                f"an entropy-coded stream holds all symbols of {spec.name!r}, which has {entries} at most"
            )
        if kind == SPARSE:
            shape, flag = next(shapes)
            indices = sum(size for axis, size in enumerate(shape) if flag >> axis & 1)
            if flag and not density.may_have_classes(indices, spec.items, entries):
                raise CorruptPacket(
                    f"an entropy-coded stream has classes for {indices} channels of {spec.name!r}, too many"
                )


def _pooled(classes: list[Classes], axis: int) -> Integers:
    """The classes of one axis of all tensors that have any, folded."""
    own = [found for c in classes if (found := c.axes[axis]) is not None]
    return fold(np.concatenate(own)) if own else np.zeros(0, np.int64)


def _take_classes(
    decoder: StageReader, shapes: list[Shape3], flags: list[int], of_axis: dict[int, Alphabet]
) -> list[Classes]:
    """The classes of all sparse tensors."""
    counts = {a: sum(s[a] for s, flag in zip(shapes, flags, strict=True) if flag >> a & 1) for a in of_axis}
    wants = [alphabets.wants_of(counts[axis], alphabet) for axis, alphabet in of_axis.items()]
    bases, *rest = decoder.take((len(shapes), _BASE_BITS), *(w for want in wants for w in want))
    parts = iter(rest)
    pooled, at = {}, dict.fromkeys(of_axis, 0)
    for (axis, alphabet), want in zip(of_axis.items(), wants, strict=True):
        folded = alphabets.values_of([next(parts) for _ in want], alphabet)
        if folded.max(initial=0) > 2 * density.MAX_STEP:
            raise CorruptPacket("an entropy-coded stream has a class of density that there is not")
        pooled[axis] = unfold(folded.astype(np.int8))  # a byte for each index: there may be many
    classes = []
    for shape, flag, base in zip(shapes, flags, bases.tolist(), strict=True):
        own = Classes(shape, base)
        for axis in of_axis:
            if flag >> axis & 1:
                own.axes[axis] = pooled[axis][at[axis] : at[axis] + shape[axis]]
                at[axis] += shape[axis]
        classes.append(own)
    return classes


def _repeats() -> Table:
    """Difference to the tensor before: half of them 0."""
    return normalise([1 << _CODE_BITS] + [1] * ((1 << _CODE_BITS) - 1))
