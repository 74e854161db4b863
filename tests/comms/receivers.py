"""Receivers of packets for every chain in use, each with valid packets for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from fedbonsai.comms.codec import NO_CONTEXT, Array, Arrays, ArraySpec, Codec, CodecSpec, IdentityCodec, specs_of
from fedbonsai.comms.codecs.make_codec import make_codec
from fedbonsai.comms.entropy.bounds import most_entries
from fedbonsai.comms.entropy.codec import Entropy
from fedbonsai.comms.links.broadcast import seal_agreed, seal_dense, seal_model
from fedbonsai.comms.links.memory import DeviceEnd, HeldModel, LinkMemory
from fedbonsai.comms.links.patch import apply_patch, seal_patch
from fedbonsai.comms.links.predict import Residual, hash_arrays, residual_specs, residuals_of
from fedbonsai.comms.links.receive import context_for, receive_models, receive_update
from fedbonsai.comms.packet import PacketKind, Stamp, read_stamp, seal, unseal

SHAPES = {
    "conv.weight": (8, 3, 3, 3),
    "dense.weight": (4, 256),
    "out.weight": (3, 4),
    "dense.bias": (4,),
    "scale": (),
    "none.weight": (0, 2),
    "norm.mean": (8,),
}
ROLES = {name: "weight" if name.endswith("weight") else "vector" for name in SHAPES} | {"norm.mean": "statistic"}
REST = ["vector", "statistic"]
# Limit of memory for reading a packet of ``tensors``, whatever it holds. The largest seen is 154 kB.
PEAK_BYTES = 256 * 1024
LARGE = ArraySpec("w", (200, 2048), "|i1", nonzeros=4096)  # one entry in a hundred
PLAIN_STAMP = Stamp(kind=PacketKind.WEIGHTS, version=3)
FLOAT = Residual(rule="delta")
BITS = Residual(rule="delta", arithmetic="bits")
DOWN = Residual(rule="stationary", feedback=True)


def sparse(density: float, levels: int, **last: Any) -> tuple[CodecSpec, ...]:
    """The chain of residuals, as the policy ``residuals`` makes it."""
    return (
        CodecSpec("topk", {"density": density}),
        CodecSpec("ternary", {"levels": levels, "scope": "global"}),
        CodecSpec("uniform", {"roles": REST}),
        CodecSpec("entropy", last),
    )


CHAINS: dict[str, tuple[CodecSpec, ...]] = {
    "residual, ans": sparse(0.1, 1, coder="ans"),
    "residual, rans": sparse(0.3, 4, coder="rans"),
    "uniform 8, entropy": (CodecSpec("uniform", {"granularity": "channel"}), CodecSpec("entropy")),
    "uniform 8, rans": (CodecSpec("uniform", {"signed": "auto"}), CodecSpec("entropy", {"coder": "rans"})),
    "uniform 4, pack": (CodecSpec("uniform", {"bits": 4}), CodecSpec("pack", {"bits": 4})),
    "float16, lz4": (CodecSpec("float16"), CodecSpec("lz4")),
    "topk, float16, sparse": (
        CodecSpec("topk", {"density": 0.1, "scope": "tensor"}),
        CodecSpec("float16"),
        CodecSpec("sparse"),
    ),
    "uniform, sparse": (CodecSpec("uniform"), CodecSpec("sparse")),
    "sparse": (CodecSpec("sparse", {"coder": "none"}),),
    "topk, lz4": (CodecSpec("topk", {"density": 0.2, "scope": "normalised"}), CodecSpec("lz4", {"level": 3})),
    "topk, auto": (*sparse(0.05, 2)[:3], CodecSpec("auto", {"among": ["rans", "entropy", "lz4", "identity"]})),
    "auto": (CodecSpec("auto"),),
    "identity": (),
    "lz4": (CodecSpec("lz4"),),
}


@dataclass(frozen=True)
class Case:
    """A receiver and valid packets for it.

    ``read``: returns arrays or raises. ``wanted``: specifications that these arrays must have. ``layout``: the arrays of a
    packet. ``symbols``: the input of the entropy codec, if the chain has one.
    """

    name: str
    packets: tuple[Array, ...]
    read: Callable[[Array], Arrays]
    wanted: tuple[ArraySpec, ...]
    layout: tuple[ArraySpec, ...] = field(repr=False)
    symbols: tuple[ArraySpec, ...] = field(repr=False, default=())

    @property
    def items(self) -> int:
        """Entries of all tensors that are expected."""
        return sum(spec.items for spec in self.wanted)


def tensors(seed: int) -> dict[str, Array]:
    """A model of 1,265 weights whose large entries concentrate in some rows, as in an update."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, shape in SHAPES.items():
        array = generator.standard_normal(shape).astype("<f4") if shape else np.array(0.75, "<f4")
        rows = np.exp2(generator.integers(-3, 3, shape[:1])).astype("<f4") if shape else np.float32(1)
        found[name] = np.asarray(array * np.reshape(rows, (-1,) + (1,) * (len(shape) - 1)) if shape else array)
    found["norm.mean"] = np.abs(found["norm.mean"])
    return found


EXPECTED = specs_of(tensors(0), ROLES)


def cases() -> dict[str, Case]:
    """Every chain as a packet without memory, as an update and as a broadcast residual; dense and agreed models."""
    found = []
    for name, specs in CHAINS.items():
        codec = make_codec(specs)
        symbols = make_codec(specs[:-1]).layout(EXPECTED) if specs and specs[-1].name == "entropy" else ()
        of_chain = [_plain(name, codec), _update(name, codec, FLOAT), _broadcast(name, codec)]
        found += [replace(case, symbols=symbols) for case in of_chain]
    found += [_update("lz4", make_codec(CHAINS["lz4"]), BITS), _update("identity", IdentityCodec(), BITS)]
    found += [_start("dense"), _start("agreed"), _patch()]
    return {case.name: case for case in found}


def large() -> Case:
    """Many symbols of which few are nonzero, by the entropy codec alone."""
    generator, found = np.random.default_rng(9), []
    for _ in range(2):
        symbols = np.zeros(LARGE.items, np.int8)
        symbols[generator.permutation(LARGE.items)[:4096]] = generator.choice([-2, -1, 1], 4096)
        found.append(
            seal({"w": symbols.reshape(LARGE.shape)}, codec=Entropy(), context=NO_CONTEXT, stamp=PLAIN_STAMP)[0]
        )

    def read(packet: Array) -> Arrays:
        return unseal(packet, codec=Entropy(), expected=(LARGE,), context=NO_CONTEXT, stamp=PLAIN_STAMP)

    return Case("large", tuple(found), read, (LARGE,), Entropy().layout((LARGE,)), (LARGE,))


def stated_bytes(specs: Sequence[ArraySpec]) -> int:
    """The documented limit of memory of ``Entropy.decode``."""
    return sum(300 * most_entries(spec) + 10 * spec.items + 750_000 for spec in specs)


def _plain(name: str, codec: Codec) -> Case:
    """A receiver of tensors without memory."""
    context = context_for(EXPECTED, seed=5)
    packets = tuple(seal(tensors(n), codec=codec, context=context, stamp=PLAIN_STAMP)[0] for n in range(3))

    def read(packet: Array) -> Arrays:
        return unseal(packet, codec=codec, expected=EXPECTED, context=context, stamp=PLAIN_STAMP, finite=True)

    return Case(name, packets, read, EXPECTED, codec.layout(EXPECTED))


def _update(name: str, codec: Codec, residual: Residual) -> Case:
    """The server as the receiver of residuals of a device's model."""
    context = context_for(EXPECTED, seed=5)
    prediction = tensors(100)
    stamp = Stamp(kind=PacketKind.UPDATE, version=2, plan=7, state_hash=hash_arrays(prediction))
    packets = tuple(
        seal(residuals_of(tensors(n), prediction, residual), codec=codec, context=context, stamp=stamp)[0]
        for n in range(3)
    )

    def read(packet: Array) -> Arrays:
        return receive_update(
            packet,
            prediction=prediction,
            residual=residual,
            codec=codec,
            expected=EXPECTED,
            context=context,
            stamp=stamp,
        )[1]

    layout = codec.layout(residual_specs(EXPECTED, residual))
    return Case(f"update of {residual.arithmetic} by {name}", packets, read, EXPECTED, layout)


def _broadcast(name: str, codec: Codec) -> Case:
    """A device that holds the previous model, as the receiver of residuals of the server's model."""
    first, context = HeldModel.of(1, tensors(200)), context_for(EXPECTED, seed=2)
    packets = tuple(
        seal_model(tensors(n), 2, memory=LinkMemory(models=[first]), residual=DOWN, codec=codec, context=context)[0]
        for n in range(3)
    )
    return Case(
        f"broadcast by {name}", packets, _receiver(first, DOWN, codec, version=2), EXPECTED, codec.layout(EXPECTED)
    )


def _start(how: str) -> Case:
    """A device that holds another model, as the receiver of a dense model or of one made from the seed."""
    model, context = HeldModel.of(2, tensors(1)), context_for(EXPECTED, seed=2)
    packet = seal_dense(model, codec=IdentityCodec(), context=context) if how == "dense" else seal_agreed(model)
    read = _receiver(HeldModel.of(1, tensors(200)), DOWN, IdentityCodec(), version=2)
    return Case(f"{how} model", (packet,), read, EXPECTED, EXPECTED if how == "dense" else ())


def _patch() -> Case:
    """A device that holds the first two rows of a matrix, and is to hold all four."""
    name = "dense.weight"
    held = HeldModel.of(2, {key: array[:2] if key == name else array for key, array in tensors(200).items()})

    def move(key: str, array: Array) -> Array:
        return np.concatenate([array, np.zeros_like(array)]) if key == name else array

    memory = LinkMemory(models=[held])
    packets = tuple(seal_patch(memory, move, tensors(n))[0] for n in range(3))
    layout = (ArraySpec(name, (512,), "<f4"),)

    def read(packet: Array) -> Arrays:
        return apply_patch(packet, read_stamp(packet), memory, move).models[-1].arrays

    return Case("patch", packets, read, EXPECTED, layout)


def _receiver(first: HeldModel, residual: Residual, codec: Codec, *, version: int) -> Callable[[Array], Arrays]:
    """Reads a packet at a device's end, and checks that a failure leaves the end unchanged."""

    def read(packet: Array) -> Arrays:
        end = DeviceEnd(memory=LinkMemory(models=[first]))
        try:
            return receive_models(
                end,
                [packet],
                version=version,
                residual=residual,
                codec=codec,
                expected=EXPECTED,
                agreed=lambda: tensors(1),
            ).arrays
        finally:
            last = end.memory.models[-1]
            assert last is first or last.version == version

    return read


def fault_of(case: Case, found: Arrays) -> str:
    """The fault of arrays that a receiver accepted; "" for none."""
    kinds = {name: (array.dtype.str, array.shape) for name, array in found.items()}
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in case.wanted}
    if kinds != wanted:
        return f"{case.name} gave {kinds}, where {wanted} are expected"
    bad = [name for name, array in found.items() if not np.isfinite(array).all()]
    return f"{case.name} gave NaN or infinity in {bad}" if bad else ""
