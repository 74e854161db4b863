"""The codec contract: named arrays in, named arrays out, so that codecs can be chained.

    sender      arrays, reconstruction = codec.encode(tensors, context=...)
    receiver    tensors = codec.decode(arrays, expected=..., context=...)

``packet.seal`` and ``packet.unseal`` call the two, and put the arrays into a packet and take them out of it.

The receiver takes shapes, types and counts from its own ``expected``, never from the message: a hostile packet cannot make
it allocate more than ``layout(expected)`` allows. Codecs are stateless frozen dataclasses; state between messages belongs
to the ends of a link (``links``). A codec's parameters (scales, levels) are sent as arrays like any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

_NO_ROLES: Mapping[str, str] = MappingProxyType({})

Array = npt.NDArray[Any]
NumBytes = Annotated[int, msgspec.Meta(ge=0)]
Arrays = Mapping[str, Array]


class CodecSpec(msgspec.Struct, frozen=True):
    """A codec by name (built-in, entry point or ``module:Class``) with its options, as a configuration gives it."""

    name: str
    options: dict[str, Any] = {}


class ArraySpec(msgspec.Struct, frozen=True):
    """Name, shape and numpy type of one array.

    ``exact``: whether ``shape`` is the array's shape. If false, the array is flat and ``shape`` is an upper bound of its size.
    ``role``: weight, sparse (a weight of a layer that is trained sparsely), vector, statistic or activation for a tensor; ""
    for an array that a codec added (scales, streams).
    ``nonzeros``: upper bound on the number of nonzero entries, if a sparsifier sets one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    exact: bool = True
    role: str = ""
    nonzeros: int | None = None

    @property
    def items(self) -> int:
        """Number of elements, or its upper bound."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes, or their upper bound."""
        return self.items * np.dtype(self.dtype).itemsize


def specs_of(arrays: Arrays, roles: Mapping[str, str] = _NO_ROLES) -> tuple[ArraySpec, ...]:
    """Specifications of these arrays, in their order. ``roles``: by array name; "" for an array that is not in it."""
    return tuple(
        ArraySpec(name, array.shape, array.dtype.str, role=roles.get(name, "")) for name, array in arrays.items()
    )


def in_order(arrays: Arrays, layout: tuple[ArraySpec, ...], *, codec: object) -> Arrays:
    """Sorts the arrays that ``codec`` yielded into the order of its layout.

    Raises ``ValueError`` if the names differ from those of the layout.
    """
    names = [spec.name for spec in layout]
    if list(arrays) == names:
        return arrays
    if sorted(arrays) != sorted(names):
        raise ValueError(f"codec {codec!r} yields arrays {sorted(arrays)}; its layout says {sorted(names)}")
    return {name: arrays[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class Context:
    """Inputs of a codec that are not sent.

    ``seed``: for stochastic rounding. ``roles``: role of each tensor by name, as in ``ArraySpec``; both ends know it.
    ``reference``: tensors of the same names and shapes as those that are encoded, by whose magnitudes a stage may select the
    entries that it keeps (``TopK.by``). Only the sender knows it, and ``decode`` must not use it. For an update it holds the
    trained weights, whether differences, residuals or the weights themselves are sent. It is empty for every other message, and
    for a codec that does not need it (``needs_reference``).
    """

    seed: int = 0
    reference: Arrays = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


NO_CONTEXT = Context()


@runtime_checkable
class Codec(Protocol):
    """Encodes named arrays as other named arrays, and decodes them."""

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """Specifications of the arrays that ``encode`` returns for arrays of the ``expected`` specifications.

        Exact, or, for an array whose size depends on the data, flat with an upper bound. Raises ``ValueError`` for arrays
        that this codec cannot encode, such as those of a codec that must come after it in a chain.
        """
        ...

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Returns the encoded arrays and the reconstruction: the tensors as the receiver will decode them.

        The encoded arrays have the names of the layout, in any order; chains and packets sort them into its order. A codec
        that loses nothing returns its input as the reconstruction (the same object). The input is not changed.
        """
        ...

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Returns the ``expected`` arrays, bit-identical to the reconstruction, or raises a ``PacketError``.

        They may be views of the input, so the caller must not write to them.
        """
        ...


@dataclass(frozen=True)
class IdentityCodec:
    """Sends arrays unchanged. The smallest codec, and the empty chain."""

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The specifications of the input."""
        return expected

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """The input itself, twice."""
        return tensors, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """The input itself."""
        return arrays


@dataclass(frozen=True)
class CodecChain:
    """Codecs (``stages``) applied one after another: left to right when encoding, right to left when decoding.

    At most one stage may be a sparsifier (its ``sparsifies`` is true). A stage whose ``needs_reference`` is true encodes only
    with ``Context.reference``.
    """

    stages: tuple[Codec, ...]

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for two sparsifiers."""
        names = [type(stage).__name__ for stage in self.stages if sparsifies(stage)]
        if len(names) > 1:
            raise ValueError(f"a chain holds one sparsifier at most; this one holds {' and '.join(names)}")

    @property
    def sparsifies(self) -> bool:
        """Whether one of the stages is a sparsifier."""
        return any(sparsifies(stage) for stage in self.stages)

    @property
    def needs_reference(self) -> bool:
        """Whether one of the stages needs ``Context.reference`` to encode."""
        return any(needs_reference(stage) for stage in self.stages)

    def _layouts(self, expected: tuple[ArraySpec, ...]) -> list[tuple[ArraySpec, ...]]:
        """Specifications of the input of each stage, then of the output of the last."""
        layouts = [expected]
        for stage in self.stages:
            layouts.append(stage.layout(layouts[-1]))
        return layouts

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The layout of the last stage."""
        return self._layouts(expected)[-1]

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Encodes by each stage in turn. The reconstruction includes the losses of all stages."""
        inputs: list[Arrays] = [tensors]
        reconstructions: list[Arrays] = []  # of the input of each stage
        layouts = self._layouts(specs_of(tensors, context.roles))  # as the receiver derives them
        for stage, layout in zip(self.stages, layouts[1:], strict=True):
            arrays, reconstruction = stage.encode(inputs[-1], context=context)
            inputs.append(in_order(arrays, layout, codec=stage))  # the next stage may depend on the order
            reconstructions.append(reconstruction)
        held = inputs[-1]
        for index in reversed(range(len(self.stages))):
            if held is inputs[index + 1]:  # the later stages lost nothing
                held = reconstructions[index]
            else:
                held = self.stages[index].decode(held, expected=layouts[index], context=context)
        return inputs[-1], held

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Decodes by each stage, the last one first."""
        layouts = self._layouts(expected)
        for stage, before in zip(reversed(self.stages), reversed(layouts[:-1]), strict=True):
            arrays = stage.decode(arrays, expected=before, context=context)
        return arrays


def sparsifies(codec: Codec) -> bool:
    """Whether a codec is a sparsifier: if it has a ``sparsifies`` that is true."""
    return bool(getattr(codec, "sparsifies", False))


def needs_reference(codec: Codec) -> bool:
    """Whether a codec needs ``Context.reference`` to encode: if it has a ``needs_reference`` that is true."""
    return bool(getattr(codec, "needs_reference", False))


def chain(*stages: Codec) -> Codec:
    """The codec that applies ``stages`` in turn. ``chain()`` is the identity, ``chain(c)`` is ``c``."""
    if not stages:
        return IdentityCodec()
    return stages[0] if len(stages) == 1 else CodecChain(stages)
