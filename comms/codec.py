"""Codecs: named arrays in, named arrays out, so that they chain.

    sender      arrays, reconstruction = codec.encode(tensors, context=...)     then packet.seal(arrays)
    receiver    packet.open(...), then tensors = codec.decode(arrays, expected=..., context=...)

What a receiver must know about shapes, types and counts comes from its own ``expected``, never from the message: a
hostile packet cannot make it allocate more than ``layout(expected)`` allows. Codecs are stateless frozen dataclasses; what
must be remembered between messages belongs to the endpoint of a link. A codec's parameters (scales, levels) are arrays
like any other: there is no second channel.
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
    """A codec by name (built-in, entry point, or ``module:Class``) with its options."""

    name: str
    options: dict[str, Any] = {}


class ArraySpec(msgspec.Struct, frozen=True):
    """Name, shape and numpy type of one array. Where ``exact`` is false the array is flat, and ``shape`` its upper bound.

    ``role``: weight, vector or statistic for a tensor of the model; "" for what a codec made (scales, streams).
    ``nonzeros``: upper bound on the entries that are not zero, where a sparsifier knows one.
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
    """What these arrays are, in their order; ``roles`` by name, "" for what is not in it."""
    return tuple(
        ArraySpec(name, array.shape, array.dtype.str, role=roles.get(name, "")) for name, array in arrays.items()
    )


def in_order(arrays: Arrays, layout: tuple[ArraySpec, ...], *, codec: object) -> Arrays:
    """What a codec yields, in the order of its layout. Raises ``ValueError`` where it yields other arrays."""
    names = [spec.name for spec in layout]
    if list(arrays) == names:
        return arrays
    if sorted(arrays) != sorted(names):
        raise ValueError(f"codec {codec!r} yields arrays {sorted(arrays)}; its layout says {sorted(names)}")
    return {name: arrays[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class Context:
    """What both ends know without sending it.

    ``seed``: for stochastic rounding and the like. ``base``: the tensors that residuals are taken against. ``reference``:
    current weights, where a selection goes by weight magnitude. ``roles``: weight, vector or statistic, by tensor name.
    """

    seed: int = 0
    base: Arrays = field(default_factory=dict)
    reference: Arrays = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


NO_CONTEXT = Context()


@runtime_checkable
class Codec(Protocol):
    """Turns named arrays into named arrays and back.

    ``layout`` says what ``encode`` yields for arrays of the ``expected`` specifications: exactly, or, where the amount
    depends on the data, as flat arrays with an upper bound. It raises ``ValueError`` for what cannot stand before this codec
    in a chain. ``encode`` returns the arrays that the layout names, in any order (a chain and a packet bring them into that
    of the layout, by which the receiver reads), and the reconstruction that the receiver will hold: the input itself (the
    same object) when nothing is lost. It leaves its input as it is. ``decode`` restores the ``expected`` arrays,
    bit-identical to the reconstruction, or raises a ``PacketError``; they may be views of what it was given, and are only
    read.
    """

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """Specifications of the encoded arrays."""
        ...

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Encoded arrays, and what the receiver will reconstruct."""
        ...

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """The expected arrays again."""
        ...


@dataclass(frozen=True)
class IdentityCodec:
    """Sends arrays as they are: the smallest codec, and the empty chain."""

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The same arrays."""
        return expected

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """The same arrays."""
        return tensors, tensors

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """The same arrays."""
        return arrays


@dataclass(frozen=True)
class CodecChain:
    """Codecs one after another, left to right when encoding. At most one of them is a sparsifier (``sparsifies`` is true)."""

    links: tuple[Codec, ...]

    def __post_init__(self) -> None:
        """Refuse two sparsifiers."""
        names = [type(link).__name__ for link in self.links if getattr(link, "sparsifies", False)]
        if len(names) > 1:
            raise ValueError(f"a chain holds one sparsifier at most; this one holds {' and '.join(names)}")

    @property
    def sparsifies(self) -> bool:
        """Whether one of the links does."""
        return any(getattr(link, "sparsifies", False) for link in self.links)

    def _layouts(self, expected: tuple[ArraySpec, ...]) -> list[tuple[ArraySpec, ...]]:
        """What goes into each link, and what comes out of the last."""
        layouts = [expected]
        for link in self.links:
            layouts.append(link.layout(layouts[-1]))
        return layouts

    def layout(self, expected: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
        """The last link's layout."""
        return self._layouts(expected)[-1]

    def encode(self, tensors: Arrays, *, context: Context) -> tuple[Arrays, Arrays]:
        """Apply each link in turn; what is lost in a later link is carried back through the earlier ones."""
        inputs: list[Arrays] = [tensors]
        kept: list[Arrays] = []
        layouts = self._layouts(specs_of(tensors, context.roles))  # as the receiver derives them
        for link, layout in zip(self.links, layouts[1:], strict=True):
            arrays, reconstruction = link.encode(inputs[-1], context=context)
            inputs.append(in_order(arrays, layout, codec=link))  # the next may go by the order of what it is given
            kept.append(reconstruction)
        held = inputs[-1]
        for index in reversed(range(len(self.links))):
            if held is inputs[index + 1]:  # the links behind lost nothing
                held = kept[index]
            else:
                held = self.links[index].decode(held, expected=layouts[index], context=context)
        return inputs[-1], held

    def decode(self, arrays: Arrays, *, expected: tuple[ArraySpec, ...], context: Context) -> Arrays:
        """Undo each link, last first."""
        layouts = self._layouts(expected)
        for link, before in zip(reversed(self.links), reversed(layouts[:-1]), strict=True):
            arrays = link.decode(arrays, expected=before, context=context)
        return arrays


def chain(*links: Codec) -> Codec:
    """Codecs one after another: itself a codec. ``chain()`` is the identity, ``chain(c)`` is ``c``."""
    if not links:
        return IdentityCodec()
    return links[0] if len(links) == 1 else CodecChain(links)
