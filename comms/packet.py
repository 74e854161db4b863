"""The packet: the bytes that are sent. Fixed part, header, payload, checksum; never pickle.

Layout, little-endian::

    48 bytes   magic "FBZ1", format, kind, attempt, header length, sequence, version, axes, state hash, plan, payload length
    header     msgpack: byte lengths of the arrays whose size depends on the data; padded to 8
    payload    the arrays in the order of the codec's layout, each aligned to its item size
    8 bytes    xxh3-64 of everything before

The receiver takes sizes and types of the arrays from its own layout. A packet is one flat uint8 array, since Ray gives such
an array to a reader without a copy, while it copies ``bytes``.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from .codec import Array, Arrays, ArraySpec, Codec, Context, IdentityCodec, in_order, specs_of
from .errors import CorruptPacket, MismatchedPacket, TruncatedPacket, UnfitPacket, UnsupportedPacket

MAGIC = b"FBZ1"
FORMAT = 2
_FIXED = struct.Struct("<4sBBHIIIIQQQ")
_KIND_OFFSET = 5
_CHECKSUM_BYTES = 8
_PIECE_BYTES = 1 << 18  # fits a core's own cache, since each piece is read twice
_LIST_BYTES, _LENGTH_BYTES = 5, 9  # the most that msgpack needs for a list's head and for a 64-bit integer


class PacketKind(IntEnum):
    """What a packet holds."""

    WEIGHTS = 1
    UPDATE = 2
    ACTIVATIONS = 3
    GRADIENTS = 4
    LOGITS = 5
    LABELS = 6
    RESIDUAL = 7  # of a model, against the prediction from the receiver's memory
    AGREED = 8  # no payload: the receiver makes the model from the seed and checks its hash
    INDEX_MAP = 9  # which channels narrow parts hold
    PATCH = 10  # what a model in the receiver's memory lacks at other channels
    BLOCK = 11  # a frozen block, named by its content
    HELD = 12  # a model that simulated devices hold: passed beside their states, never sent to a device


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of a packet, from its fixed part.

    ``version`` and ``state_hash``: of the state that the payload refers to. ``plan`` and ``attempt``: 0 for a broadcast.
    ``sequence``: number within a stream. ``axes``: number of the payload's memory format at its sender, for payloads whose
    receiver needs it; 0 is row-major.
    """

    kind: PacketKind
    version: int = 0
    state_hash: int = 0
    plan: int = 0
    attempt: int = 0
    sequence: int = 0
    axes: int = 0


def seal(
    tensors: Arrays, *, codec: Codec, context: Context, stamp: Stamp, minus: Arrays | None = None
) -> tuple[Array, Arrays]:
    """Encodes tensors and writes a packet. Returns the packet (flat uint8) and the reconstruction that the receiver will hold.

    ``minus``: send the differences ``tensors - minus``. With the identity codec they are computed while the packet is
    written, and the reconstruction consists of views of the packet. Raises ``ValueError`` if the codec yields other arrays
    than its layout says, which no receiver could read.
    """
    if minus is not None and type(codec) is not IdentityCodec:  # not isinstance: a subclass may encode differently
        tensors, minus = {name: array - minus[name] for name, array in tensors.items()}, None
    layout = codec.layout(specs_of(tensors, context.roles))
    arrays, reconstruction = codec.encode(tensors, context=context)
    arrays = in_order(arrays, layout, codec=codec)
    _check_layout(codec, layout, arrays)
    header = msgspec.msgpack.encode([arrays[spec.name].nbytes for spec in layout if not spec.exact])
    offsets, end = _place([(spec.dtype, arrays[spec.name].nbytes) for spec in layout], _FIXED.size + _pad(len(header)))
    packet = np.empty(end + _CHECKSUM_BYTES, np.uint8)
    payload_bytes = end - _FIXED.size - _pad(len(header))
    packet[: _FIXED.size] = np.frombuffer(
        _FIXED.pack(MAGIC, FORMAT, stamp.kind, stamp.attempt, len(header), stamp.sequence, stamp.version,
                    stamp.axes, stamp.state_hash, stamp.plan, payload_bytes), np.uint8)  # fmt: skip
    start = _FIXED.size
    position = start + _pad(len(header))
    packet[start:position] = 0
    packet[start : start + len(header)] = np.frombuffer(header, np.uint8)
    digest, written = xxhash.xxh3_64(packet[:position].data), {}
    for spec, offset in zip(layout, offsets, strict=True):
        array = arrays[spec.name]
        packet[position:offset] = 0  # alignment gap
        digest.update(packet[position:offset].data)
        position = offset + array.nbytes
        written[spec.name] = packet[offset:position].view(array.dtype).reshape(array.shape)
        _write(written[spec.name], array, None if minus is None else minus[spec.name], digest)
    packet[position:end] = 0
    digest.update(packet[position:end].data)
    packet[end:] = np.frombuffer(digest.digest(), np.uint8)
    return packet, written if minus is not None else reconstruction


def claimed_kind(packet: Array) -> int:
    """The kind that a packet claims, without a check of its checksum: to find the reader that will check it. 0 if too short."""
    return int(packet[_KIND_OFFSET]) if packet.nbytes > _KIND_OFFSET else 0


def read_stamp(packet: Array) -> Stamp:
    """Checks a packet's frame and checksum and returns its stamp. Raises a ``PacketError``."""
    return _frame(packet).stamp


def unseal(packet: Array, *, codec: Codec, expected: tuple[ArraySpec, ...], context: Context,
           stamp: Stamp | None = None, finite: bool = False) -> Arrays:  # fmt: skip
    """Checks and decodes a packet. Returns the ``expected`` arrays, as views of the packet where the codec allows it.

    ``stamp``: the stamp that the packet must have; None for any. ``finite``: refuse NaN and infinity. Raises a
    ``PacketError``.
    """
    frame = _frame(packet, sum_squares=finite)
    found = frame.stamp
    if stamp is not None and found != stamp:
        fields = [f for f in Stamp.__struct_fields__ if getattr(found, f) != getattr(stamp, f)]
        wrong = ", ".join(f"{f} is {getattr(found, f)}, expected {getattr(stamp, f)}" for f in fields)
        raise MismatchedPacket(f"a packet's {wrong}")
    layout = codec.layout(expected)
    lengths = iter(_lengths(frame.header, sum(not spec.exact for spec in layout)))
    sizes = [spec.num_bytes if spec.exact else next(lengths) for spec in layout]
    for spec, size in zip(layout, sizes, strict=True):
        if not 0 <= size <= spec.num_bytes or size % np.dtype(spec.dtype).itemsize:
            raise MismatchedPacket(f"{spec.name!r} claims {size} bytes; at most {spec.num_bytes} are expected")
    offsets, end = _place([(spec.dtype, size) for spec, size in zip(layout, sizes, strict=True)], frame.start)
    if end + _CHECKSUM_BYTES != packet.nbytes:
        raise MismatchedPacket(f"a packet of {packet.nbytes} bytes, where {end + _CHECKSUM_BYTES} are expected")
    arrays = {}
    for spec, offset, size in zip(layout, offsets, sizes, strict=True):
        flat = packet[offset : offset + size].view(spec.dtype)
        arrays[spec.name] = flat.reshape(spec.shape) if spec.exact else flat
    tensors = codec.decode(arrays, expected=expected, context=context)
    for spec in expected:  # a user's codec may be wrong
        array = tensors.get(spec.name)
        if array is None or array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            decoded = "nothing" if array is None else f"{array.dtype.str} of shape {array.shape}"
            raise MismatchedPacket(
                f"{spec.name!r} decodes to {decoded}; expected is {spec.dtype} of shape {spec.shape}"
            )
    # If the payload is float32 arrays as they are, the pass for the checksum has checked them already.
    plain = type(codec) is IdentityCodec and frame.start % 4 == 0 and all(spec.dtype == "<f4" for spec in expected)
    if finite and not (plain and frame.finite):
        for name, array in tensors.items():
            if array.dtype.kind in "fc" and not np.isfinite(array).all():
                raise UnfitPacket(f"{name!r} holds NaN or infinity")
    return tensors


def sealed_bytes(codec: Codec, expected: tuple[ArraySpec, ...]) -> tuple[int, bool]:
    """Size in bytes of a packet of the ``expected`` arrays, and whether it is exact (else an upper bound)."""
    layout = codec.layout(expected)
    varying = sum(not spec.exact for spec in layout)
    header = len(msgspec.msgpack.encode([])) if not varying else _LIST_BYTES + varying * _LENGTH_BYTES
    _, end = _place([(spec.dtype, spec.num_bytes) for spec in layout], _FIXED.size + _pad(header))
    return end + _CHECKSUM_BYTES, not varying


class _Frame(NamedTuple):
    """A packet whose frame and checksum have been checked.

    ``start``: offset of the payload. ``finite``: True only if the payload, read as float32, is known to be finite.
    """

    stamp: Stamp
    header: bytes
    start: int
    finite: bool


def _frame(packet: Array, *, sum_squares: bool = False) -> _Frame:
    """Checks the frame and the checksum. ``sum_squares``: also find out whether the payload, as float32, is finite."""
    if packet.dtype != np.uint8 or packet.ndim != 1 or not packet.flags.c_contiguous:
        raise CorruptPacket(f"a packet is one flat array of bytes, not {packet.dtype} of shape {packet.shape}")
    if packet.nbytes < _FIXED.size + _CHECKSUM_BYTES:
        raise TruncatedPacket(f"a packet of {packet.nbytes} bytes is shorter than its fixed part")
    fixed = _FIXED.unpack_from(packet.data)
    magic, version, kind, attempt, header_bytes, sequence, model, axes, state, plan, payload = fixed
    if magic != MAGIC:
        raise CorruptPacket("not a packet: the first four bytes are wrong")
    if version != FORMAT:
        raise UnsupportedPacket(f"packet format {version}; this receiver reads format {FORMAT}")
    start = _FIXED.size + _pad(header_bytes)
    if start + payload + _CHECKSUM_BYTES != packet.nbytes:
        raise TruncatedPacket(f"a packet says {start + payload + _CHECKSUM_BYTES} bytes and has {packet.nbytes}")
    digest = xxhash.xxh3_64(packet[:start].data)
    squares = np.float32(np.inf)
    if sum_squares:
        squares = _digest(packet[start:-_CHECKSUM_BYTES], digest)
    else:
        digest.update(packet[start:-_CHECKSUM_BYTES].data)
    if digest.digest() != packet[-_CHECKSUM_BYTES:].tobytes():
        raise CorruptPacket("the checksum does not match")
    if kind not in PacketKind._value2member_map_:
        raise UnsupportedPacket(f"unknown kind of packet {kind}")
    stamp = Stamp(
        kind=PacketKind(kind),
        version=model,
        state_hash=state,
        plan=plan,
        attempt=attempt,
        sequence=sequence,
        axes=axes,
    )
    return _Frame(stamp, packet[_FIXED.size : _FIXED.size + header_bytes].tobytes(), start, bool(np.isfinite(squares)))


def _digest(payload: Array, digest: xxhash.xxh3_64) -> np.float32:
    """Adds a payload to a digest, and returns the sum of squares of the payload read as float32.

    Both in one pass, piece by piece, so that the second reading of a piece comes from the cache. The sum is infinite or NaN
    if a value is, or if it overflows.
    """
    squares = np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, payload.nbytes, _PIECE_BYTES):
            piece = payload[start : start + _PIECE_BYTES]
            digest.update(piece.data)
            floats = piece[: piece.nbytes // 4 * 4].view(np.float32)
            squares += np.dot(floats, floats)
    return squares


def _write(out: Array, array: Array, minus: Array | None, digest: xxhash.xxh3_64) -> None:
    """Writes ``array``, or ``array - minus``, to ``out``, and adds it to a digest, piece by piece, from the cache."""
    step = max(out.size, 1)
    if array.flags.c_contiguous and (minus is None or minus.flags.c_contiguous):
        step = _PIECE_BYTES // out.itemsize
        out, array, minus = out.reshape(-1), array.reshape(-1), None if minus is None else minus.reshape(-1)
    for start in range(0, out.size, step):
        piece = slice(start, start + step)  # of another memory order: all
        if minus is None:
            np.copyto(out[piece], array[piece])
        else:
            np.subtract(array[piece], minus[piece], out=out[piece])
        digest.update(out[piece].data)


def _lengths(header: bytes, count: int) -> list[int]:
    """Decodes the byte lengths of a header."""
    # Checked before decoding, since a decoded list takes more memory than its bytes.
    if len(header) > _LIST_BYTES + count * _LENGTH_BYTES:
        raise MismatchedPacket(f"a header of {len(header)} bytes, which is too long for {count} lengths")
    try:
        lengths = msgspec.msgpack.decode(header, type=list[int])
    except msgspec.MsgspecError as error:
        raise CorruptPacket(f"the header cannot be read: {error}") from error
    if len(lengths) != count:
        raise MismatchedPacket(f"the header gives {len(lengths)} lengths, where {count} are expected")
    return lengths


def _place(arrays: list[tuple[str, int]], position: int) -> tuple[list[int], int]:
    """Offsets of arrays of (type, bytes) from ``position`` on, each aligned to its item size, and the end of the last."""
    offsets = []
    for dtype, size in arrays:
        width = np.dtype(dtype).itemsize
        position = -(-position // width) * width
        offsets.append(position)
        position += size
    return offsets, position


def _check_layout(codec: Codec, layout: tuple[ArraySpec, ...], arrays: Arrays) -> None:
    """Raises ``ValueError`` if arrays differ in shape or type from the codec's layout: at the sender, where it can be fixed."""
    for spec in layout:
        array = arrays[spec.name]
        fits = array.shape == spec.shape if spec.exact else array.ndim == 1 and array.size <= spec.items
        if array.dtype != np.dtype(spec.dtype) or not fits:
            found = f"{array.dtype.str} of shape {array.shape}"
            raise ValueError(f"codec {codec!r} yields {spec.name!r} as {found}; its layout says {spec}")


def _pad(size: int) -> int:
    """``size``, rounded up to a multiple of 8."""
    return -(-size // 8) * 8
