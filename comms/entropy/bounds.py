"""Upper bounds on the size of a stream of symbols, from specifications alone: the receiver accepts no longer one.

*Plain* coding has no model of the data, so its size is bounded for any data: a nonzero entry costs at most log2(items /
nonzeros) + 1.45 bits for its gap (the entropy of the density, for any arrangement), 9 bits for sign and magnitude, and less
than half a bit for the losses of tables and lanes. All bounds are computed in integers.
"""

from ..codec import ArraySpec

_STREAM_BYTES = 64  # coder, lengths, the last words of a stream
_TENSOR_BYTES = 32  # description, alphabet and counts of one tensor
_ENTRY_BITS = 12


def stream_bound(specs: list[ArraySpec]) -> int:
    """The largest size in bytes of a stream of arrays of these specifications."""
    return _STREAM_BYTES + sum(_tensor_bound(spec.items, most_entries(spec), _ENTRY_BITS) for spec in specs)


def plain_limit(sizes: list[tuple[int, int]]) -> int:
    """The largest size in bytes of plainly coded tensors of these (items, nonzeros). A receiver's bound is never smaller.

    A receiver's ``nonzeros`` may be larger than the real number. One bit less for each entry than in ``stream_bound`` makes up
    for the steps of ``bit_length``.
    """
    return sum(_tensor_bound(items, nonzeros, _ENTRY_BITS - 1) for items, nonzeros in sizes)


def most_entries(spec: ArraySpec) -> int:
    """Upper bound on the nonzero entries of an array."""
    return spec.items if spec.nonzeros is None else min(spec.nonzeros, spec.items)


def may_be_dense(items: int, entries: int) -> bool:
    """Whether a sender considers dense coding for an array with so many nonzero entries."""
    return 16 * entries > items


def sparse_is_smaller(items: int, nonzeros: int) -> bool:
    """Whether the bound of plain coding is the one for a sparse tensor, not that for a dense one."""
    return _sparse_bytes(items, nonzeros, _ENTRY_BITS) < _dense_bytes(items)


def _tensor_bound(items: int, nonzeros: int, entry_bits: int) -> int:
    """The largest size in bytes of one tensor."""
    return _TENSOR_BYTES + min(_dense_bytes(items), _sparse_bytes(items, nonzeros, entry_bits))


def _dense_bytes(items: int) -> int:
    """All symbols, and the losses of lanes."""
    return items + items // 64


def _sparse_bytes(items: int, nonzeros: int, entry_bits: int) -> int:
    """Positions, signs and magnitudes."""
    return nonzeros * ((items // nonzeros).bit_length() + entry_bits) // 8 if nonzeros else 0
