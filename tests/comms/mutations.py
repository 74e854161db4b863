"""Mutations of packets, as from a hostile sender or a faulty network.

``mutated`` changes one of a case's valid packets, by a numpy generator, so that a few numbers identify the result for good.
Most mutated packets get a correct checksum, so that they reach the decoder.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import xxhash
from fedbonsai.comms.codec import NO_CONTEXT, Array, ArraySpec
from fedbonsai.comms.entropy import stream
from fedbonsai.comms.entropy.codec import CODED, Entropy, is_symbols
from fedbonsai.comms.entropy.coders import CoderName, Symbols, SymbolWriter
from fedbonsai.comms.entropy.tables import Table
from fedbonsai.comms.entropy.tensors import describe

from .receivers import Case

_FIXED = struct.Struct("<4sBBHIIIIQQQ")
_CHECKSUM_BYTES = 8


def resealed(packet: Array) -> Array:
    """The packet with a correct checksum."""
    if packet.nbytes < _CHECKSUM_BYTES:
        return packet
    packet = packet.copy()
    packet[-_CHECKSUM_BYTES:] = np.frombuffer(xxhash.xxh3_64_digest(packet[:-_CHECKSUM_BYTES].data), np.uint8)
    return packet


def taken_apart(packet: Array, layout: tuple[ArraySpec, ...]) -> tuple[list[Any], list[bytes]]:
    """The fixed part of a valid packet, and the bytes of its arrays."""
    fixed = list(_FIXED.unpack_from(packet.data))
    lengths = iter(msgspec.msgpack.decode(packet[_FIXED.size : _FIXED.size + fixed[4]].tobytes()))
    position, arrays = _FIXED.size + -(-fixed[4] // 8) * 8, []
    for spec in layout:
        width = np.dtype(spec.dtype).itemsize
        position = -(-position // width) * width
        size = spec.num_bytes if spec.exact else next(lengths)
        arrays.append(packet[position : position + size].tobytes())
        position += size
    return fixed, arrays


def put_together(fixed: list[Any], arrays: list[bytes], layout: tuple[ArraySpec, ...]) -> Array:
    """A packet of these arrays, with correct header, sizes and checksum."""
    header = msgspec.msgpack.encode([len(a) for a, spec in zip(arrays, layout, strict=True) if not spec.exact])
    body = bytearray(header + bytes(-len(header) % 8))
    start = len(body)
    for data, spec in zip(arrays, layout, strict=True):
        body += bytes(-(_FIXED.size + len(body)) % np.dtype(spec.dtype).itemsize) + data
    fixed = [*fixed[:4], len(header), *fixed[5:10], len(body) - start]
    return resealed(np.frombuffer(_FIXED.pack(*fixed) + bytes(body) + bytes(_CHECKSUM_BYTES), np.uint8))


Mutation = Callable[[np.random.Generator, Array, Case], Array]


def flip_bits(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Flips one to eight bits, anywhere before the checksum."""
    found = packet.copy()
    for _ in range(int(rng.integers(1, 9))):
        found[int(rng.integers(packet.nbytes - _CHECKSUM_BYTES))] ^= np.uint8(1 << int(rng.integers(8)))
    return found


def overwrite(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Overwrites a run of bytes with noise, zeros or ones."""
    found = packet.copy()
    start = int(rng.integers(packet.nbytes))
    size = min(int(rng.integers(1, 33)), packet.nbytes - start)
    found[start : start + size] = (rng.integers(0, 256, size), 0, 255)[int(rng.integers(3))]
    return found


def truncate(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Cuts off the end."""
    return packet[: int(rng.integers(packet.nbytes))]


def extend(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Appends bytes."""
    return np.append(packet, rng.integers(0, 256, int(rng.integers(1, 65))).astype(np.uint8))


def splice(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Joins the beginning of one packet and the end of another."""
    other = case.packets[int(rng.integers(len(case.packets)))]
    start = int(rng.integers(packet.nbytes))
    if rng.random() < 0.5:  # cut at the same place, so that the size may be right
        return np.concatenate([packet[:start], other[start:]])
    return np.concatenate([packet[:start], other[int(rng.integers(other.nbytes)) :]])


def lengths(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Changes lengths in the header (swapped, slightly off, or very large), and sometimes the length in the fixed part."""
    fixed, arrays = taken_apart(packet, case.layout)
    sizes = [len(a) for a, spec in zip(arrays, case.layout, strict=True) if not spec.exact]
    how = int(rng.integers(4))
    if how == 0:
        rng.shuffle(sizes)
    elif how == 1 and sizes:
        sizes[int(rng.integers(len(sizes)))] += int(rng.integers(-9, 10))
    elif how == 2 and sizes:
        sizes[int(rng.integers(len(sizes)))] = (-1, 2**31, 2**40, 2**62)[int(rng.integers(4))]
    else:
        sizes += [0] * int(rng.integers(1, 4))
    header = msgspec.msgpack.encode(sizes)
    body = packet[_FIXED.size + -(-fixed[4] // 8) * 8 :]
    fixed[4] = len(header)
    if rng.random() < 0.2:
        fixed[10] = (0, 2**31, 2**62, 2**64 - 1)[int(rng.integers(4))]
    head = np.frombuffer(_FIXED.pack(*fixed) + header + bytes(-len(header) % 8), np.uint8)
    return np.concatenate([head, body])


def stamp(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Changes kind, version, plan, attempt, sequence, memory format or hash."""
    fixed, arrays = taken_apart(packet, case.layout)
    which, bits = ((1, 8), (2, 8), (3, 16), (5, 32), (6, 32), (7, 32), (8, 64), (9, 64))[int(rng.integers(8))]
    fixed[which] = int(rng.integers(0, 12)) if rng.random() < 0.7 else int(rng.integers(0, 2**63)) % 2**bits
    return put_together(fixed, arrays, case.layout)


def contents(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Replaces an array by noise, shortens or lengthens it, or changes bytes of it. Header and sizes are made to fit."""
    fixed, arrays = taken_apart(packet, case.layout)
    if not arrays:
        return packet
    which = _any_array(rng, case.layout)
    data, spec = bytearray(arrays[which]), case.layout[which]
    how = int(rng.integers(5))
    at = int(rng.integers(len(data) + 1))
    if how == 0:
        data = bytearray(rng.bytes(len(data)))
    elif how == 1:
        data = data[:at] + rng.bytes(len(data) - at)
    elif how == 2 and not spec.exact:
        data = data[:at]
    elif how == 3 and not spec.exact:
        data = data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:]
    else:
        for _ in range(int(rng.integers(1, 4))):
            if data:
                data[int(rng.integers(min(len(data), 40)))] = int(rng.integers(256))
    arrays[which] = bytes(data[: spec.num_bytes])
    return put_together(fixed, arrays, case.layout)


def noise(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Replaces the payload by noise of legal lengths, often with the first bytes of each array kept."""
    fixed, arrays = taken_apart(packet, case.layout)
    found = []
    for data, spec in zip(arrays, case.layout, strict=True):
        size = spec.num_bytes if spec.exact else int(rng.integers(spec.num_bytes + 1))
        head = data[: int(rng.integers(4))] if rng.random() < 0.7 else b""
        size -= size % np.dtype(spec.dtype).itemsize
        found.append((head + rng.bytes(size))[:size])
    return put_together(fixed, found, case.layout)


def swap_arrays(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Takes one array from another packet for the same receiver: each packet is valid, the mixture is not."""
    fixed, arrays = taken_apart(packet, case.layout)
    _, others = taken_apart(case.packets[int(rng.integers(len(case.packets)))], case.layout)
    if arrays:
        which = _any_array(rng, case.layout)
        arrays[which] = others[which]
    return put_together(fixed, arrays, case.layout)


class _Tampering(SymbolWriter):
    """A writer of entropy-coded streams that replaces some symbols by others that are legal at their place."""

    def __init__(self, name: CoderName, rng: np.random.Generator, share: float) -> None:
        super().__init__(name)
        self._rng, self._share = rng, share

    def put(self, *pieces: tuple[Symbols, Table | int]) -> None:
        super().put(*((self._tampered(symbols, table), table) for symbols, table in pieces))

    def _tampered(self, symbols: Symbols, table: Table | int) -> Symbols:
        found = np.array(symbols, np.int64)
        at = np.flatnonzero(self._rng.random(found.size) < self._share)
        if isinstance(table, int):
            largest = (1 << table) - 1
            found[at] = self._rng.choice([0, largest, int(self._rng.integers(largest + 1))], at.size)
        else:
            found[at] = self._rng.choice(np.flatnonzero(table), at.size)
        return found


def tamper(rng: np.random.Generator, packet: Array, case: Case) -> Array:
    """Re-encodes an entropy-coded stream with some wrong symbols. (Packets without one: as ``contents``.)"""
    if not case.symbols:
        return contents(rng, packet, case)
    fixed, arrays = taken_apart(packet, case.layout)
    which = next(i for i, spec in enumerate(case.layout) if spec.name == CODED)
    coded = {spec.name: np.frombuffer(a, spec.dtype) for a, spec in zip(arrays, case.layout, strict=True)}
    symbols = Entropy().decode(coded, expected=case.symbols, context=NO_CONTEXT)
    described, shared = describe([symbols[s.name] for s in case.symbols if is_symbols(s.name, s.dtype)])
    writer = _Tampering(("ans", "rans")[int(rng.integers(2))], rng, (0.003, 0.03, 0.3)[int(rng.integers(3))])
    stream.put(writer, described, shared)
    arrays[which] = writer.finish()[: case.layout[which].num_bytes].tobytes()
    return put_together(fixed, arrays, case.layout)


def _any_array(rng: np.random.Generator, layout: tuple[ArraySpec, ...]) -> int:
    """The index of an array; in half of the cases, of one whose size depends on the data."""
    varying = [i for i, spec in enumerate(layout) if not spec.exact]
    if varying and rng.random() < 0.5:
        return varying[int(rng.integers(len(varying)))]
    return int(rng.integers(len(layout)))


MUTATIONS: Mapping[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        flip_bits,
        overwrite,
        truncate,
        extend,
        splice,
        lengths,
        stamp,
        contents,
        noise,
        swap_arrays,
        tamper,
    )
}


def mutated(case: Case, seed: tuple[int, ...], names: tuple[str, ...] = tuple(MUTATIONS)) -> Array:
    """The packet that these numbers identify: one of the case's packets after one or two of these mutations."""
    rng = np.random.default_rng(seed)
    packet = case.packets[int(rng.integers(len(case.packets)))]
    packet = MUTATIONS[names[int(rng.integers(len(names)))]](rng, packet, case)
    if rng.random() < 0.3 and packet.nbytes > _FIXED.size + _CHECKSUM_BYTES:
        packet = (flip_bits, overwrite)[int(rng.integers(2))](rng, packet, case)
    return resealed(packet) if rng.random() < 0.9 else packet
