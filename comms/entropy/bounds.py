"""How long a stream of symbols can get, from what both ends know: the receiver's limit, and the sender's promise.

Plainly coded, an entry that is there costs at most log2(items / nonzeros) + 1.45 bits for its gap (the entropy of a coin, for
any arrangement), 9 bits for sign and magnitude, and less than half a bit for what tables and lanes lose. All in integers.
"""

from ..codec import ArraySpec

_STREAM_BYTES = 64  # coder, lengths, the last words of a stream
_TENSOR_BYTES = 32  # description, alphabet and counts of one tensor
_ENTRY_BITS = 12


def stream_bound(specs: list[ArraySpec]) -> int:
    """The most bytes of a stream of arrays of these specifications, items and nonzeros taken from them."""
    return _STREAM_BYTES + sum(_tensor_bound(spec.items, most_entries(spec), _ENTRY_BITS) for spec in specs)


def plain_limit(sizes: list[tuple[int, int]]) -> int:
    """A size (items, nonzeros of each tensor) that plain coding keeps, and that no bound of a receiver is below.

    One bit less for each entry makes up for the steps of ``bit_length``: a receiver's ``nonzeros`` may be larger.
    """
    return sum(_tensor_bound(items, nonzeros, _ENTRY_BITS - 1) for items, nonzeros in sizes)


def most_entries(spec: ArraySpec) -> int:
    """The most entries of an array that are not zero."""
    return spec.items if spec.nonzeros is None else min(spec.nonzeros, spec.items)


def may_be_dense(items: int, entries: int) -> bool:
    """Whether a sender looks at coding all symbols of an array with so many entries that are not zero."""
    return 16 * entries > items


def sparse_is_smaller(items: int, nonzeros: int) -> bool:
    """Which plain way is the one that the bound is for."""
    return _sparse_bytes(items, nonzeros, _ENTRY_BITS) < _dense_bytes(items)


def _tensor_bound(items: int, nonzeros: int, entry_bits: int) -> int:
    """The most bytes of one tensor."""
    return _TENSOR_BYTES + min(_dense_bytes(items), _sparse_bytes(items, nonzeros, entry_bits))


def _dense_bytes(items: int) -> int:
    """All symbols, and what lanes lose."""
    return items + items // 64


def _sparse_bytes(items: int, nonzeros: int, entry_bits: int) -> int:
    """Positions, signs and magnitudes."""
    return nonzeros * ((items // nonzeros).bit_length() + entry_bits) // 8 if nonzeros else 0
