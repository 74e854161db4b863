"""The contract of all codecs, and chains. A new codec is a row of CODECS, or of LOSSLESS if it loses nothing."""

import numpy as np
import pytest
from fedbonsai.comms.codec import (
    NO_CONTEXT,
    Array,
    Arrays,
    ArraySpec,
    Codec,
    CodecChain,
    IdentityCodec,
    chain,
    specs_of,
)
from fedbonsai.comms.codecs.auto import Auto
from fedbonsai.comms.codecs.float16 import Float16
from fedbonsai.comms.codecs.lz4_codec import Lz4
from fedbonsai.comms.codecs.pack import Pack
from fedbonsai.comms.codecs.sparse import Sparse
from fedbonsai.comms.codecs.sparsify import Threshold, TopK
from fedbonsai.comms.codecs.ternary import Ternary
from fedbonsai.comms.codecs.uniform import Uniform
from fedbonsai.comms.entropy.codec import Entropy, Rans
from fedbonsai.comms.stages import ROLES

from .fakes import Backwards, Drop, Halve, Liar

LOSSLESS: dict[str, Codec] = {
    "identity": IdentityCodec(),
    "lz4": Lz4(),
    "lz4 without shuffle": Lz4(shuffle=False),
    "lz4 high compression": Lz4(level=9),
    "lz4 high compression without shuffle": Lz4(level=1, shuffle=False),
    "identity, lz4": chain(IdentityCodec(), Lz4()),
    "lz4, identity": chain(Lz4(), IdentityCodec()),
    "lz4, lz4": chain(Lz4(), Lz4(level=3)),
    "empty chain": CodecChain(()),
    "pack": Pack(8),
    "pack, lz4": chain(Pack(8), Lz4()),
    "entropy": Entropy(),
    "rans": Rans(),
    "auto": Auto(),
    "sparse": Sparse(),
    "sparse without entropy coding": Sparse("none"),
    "pack, sparse": chain(Pack(8), Sparse()),
    "sparse, lz4": chain(Sparse("none"), Lz4()),
    "pack, auto": chain(Pack(8), Auto()),
    "backwards": Backwards(),
    "backwards, auto": chain(Backwards(), Auto()),
    "backwards, entropy": chain(Backwards(), Entropy()),
}
CODECS: dict[str, Codec] = {
    **LOSSLESS,
    "halve": Halve(),
    "halve, lz4": chain(Halve(), Lz4()),
    "identity, halve, lz4": chain(IdentityCodec(), Halve(), Lz4()),
    "drop": Drop(),
    "drop, halve": chain(Drop(), Halve()),
    "drop, halve, lz4": chain(Drop(), Halve(), Lz4()),
    "halve, drop, lz4": chain(Halve(), Drop(), Lz4()),
    "chain in a chain": chain(chain(IdentityCodec(), Drop()), chain(Halve(), Lz4())),
    "topk": TopK(0.1),
    "topk of each": TopK(0.1, scope="tensor", roles=ROLES),
    "topk normalised": TopK(0.1, scope="normalised", floor=2, roles=ROLES),
    "threshold": Threshold(0.5),
    "threshold relative": Threshold(1.5, relative=True, roles=ROLES),
    "float16": Float16(),
    "uniform": Uniform(),
    "uniform by channel": Uniform(bits=5, signed="auto", granularity="channel"),
    "uniform at random": Uniform(bits=2, stochastic=True),
    "ternary": Ternary(),
    "ternary of all": Ternary(3, scope="global", roles=ROLES),
    "ternary by medians": Ternary(4, rule="median"),
    "topk, ternary, uniform, pack": chain(TopK(0.1), Ternary(), Uniform(bits=4), Pack(4)),
    "topk, ternary, uniform, entropy": chain(TopK(0.1), Ternary(), Uniform(roles=("vector", "statistic")), Entropy()),
    "threshold, uniform, auto": chain(Threshold(0.5), Uniform(), Auto()),
    "threshold, float16, lz4": chain(Threshold(0.5), Float16(), Lz4()),
    "topk, float16, sparse": chain(TopK(0.1, scope="tensor"), Float16(), Sparse()),
    "topk, uniform, sparse": chain(TopK(0.1), Uniform(granularity="channel"), Sparse()),
}
DTYPES = ("<f4", "<f8", "<f2", "|i1", "|u1", "<i4", "<i8", "|b1")
SHAPES = ((), (0,), (1,), (3, 0, 2), (2, 3), (1000, 33))

lossless = pytest.mark.parametrize("codec", LOSSLESS.values(), ids=LOSSLESS.keys())
every = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def sample(dtype: str, shape: tuple[int, ...]) -> Array:
    """Arbitrary bits for floats (NaN and infinities among them), any value for the rest."""
    generator = np.random.default_rng(7)
    if dtype == "|b1":
        return generator.integers(2, size=shape).astype(bool)
    width = np.dtype(dtype).itemsize
    return np.frombuffer(generator.bytes(int(np.prod(shape)) * width), dtype).reshape(shape)


def floats() -> dict[str, Array]:
    generator = np.random.default_rng(3)
    return {
        "w": generator.standard_normal((40, 5)).astype("<f4"),
        "b": generator.standard_normal(5).astype("<f4"),
        "empty": np.zeros((0, 3), "<f4"),
        "number": np.array(0.75, "<f4"),
    }


def assert_same_bits(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def assert_fits(arrays: Arrays, layout: tuple[ArraySpec, ...]) -> None:
    assert {spec.name for spec in layout} == arrays.keys()
    for spec in layout:
        array = arrays[spec.name]
        assert array.dtype == np.dtype(spec.dtype)
        if spec.exact:
            assert array.shape == spec.shape
        else:
            assert array.ndim == 1
            assert array.size <= spec.items


@lossless
@pytest.mark.parametrize("dtype", DTYPES)
def test_lossless_codecs_restore_every_bit(codec: Codec, dtype: str) -> None:
    tensors = {f"t{number}": sample(dtype, shape) for number, shape in enumerate(SHAPES)}
    arrays, reconstruction = codec.encode(tensors, context=NO_CONTEXT)
    assert reconstruction is tensors
    assert_fits(arrays, codec.layout(specs_of(tensors)))
    assert_same_bits(codec.decode(arrays, expected=specs_of(tensors), context=NO_CONTEXT), tensors)


@lossless
def test_lossless_codecs_restore_zeros_nan_and_infinities(codec: Codec) -> None:
    odd = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45], "<f4")
    tensors = {"zeros": np.zeros((64, 64), "<f4"), "odd": odd}
    arrays, _ = codec.encode(tensors, context=NO_CONTEXT)
    assert_same_bits(codec.decode(arrays, expected=specs_of(tensors), context=NO_CONTEXT), tensors)


@lossless
def test_input_need_not_be_contiguous(codec: Codec) -> None:
    whole = sample("<f4", (6, 8))
    tensors = {"transposed": whole.T, "strided": whole[::2, 1::3], "backwards": whole[::-1]}
    arrays, _ = codec.encode(tensors, context=NO_CONTEXT)
    assert_same_bits(codec.decode(arrays, expected=specs_of(tensors), context=NO_CONTEXT), tensors)


@every
def test_the_receiver_decodes_the_reconstruction(codec: Codec) -> None:
    tensors = floats()
    arrays, reconstruction = codec.encode(tensors, context=NO_CONTEXT)
    assert_fits(arrays, codec.layout(specs_of(tensors)))
    assert_same_bits(codec.decode(arrays, expected=specs_of(tensors), context=NO_CONTEXT), reconstruction)


@every
def test_a_codec_keeps_no_state_and_does_not_change_its_input(codec: Codec) -> None:
    tensors = floats()
    first, _ = codec.encode(tensors, context=NO_CONTEXT)
    codec.encode({name: array + 1 for name, array in tensors.items()}, context=NO_CONTEXT)
    again, _ = codec.encode(tensors, context=NO_CONTEXT)
    assert_same_bits(again, first)
    assert_same_bits(tensors, floats())


@every
def test_no_tensors_are_no_arrays(codec: Codec) -> None:
    assert codec.layout(()) == ()
    assert codec.encode({}, context=NO_CONTEXT)[0] == {}
    assert codec.decode({}, expected=(), context=NO_CONTEXT) == {}


def test_losses_add_up_along_a_chain() -> None:
    tensors = {"w": np.array([0.1, 0.2, 0.7, -0.9], "<f4")}
    _, held = chain(Drop(0.5), Halve(), Lz4()).encode(tensors, context=NO_CONTEXT)
    assert held["w"].tolist() == [0.0, 0.0, float(np.float16(0.7)), float(np.float16(-0.9))]
    _, other = chain(Halve(), Drop(0.5)).encode(tensors, context=NO_CONTEXT)
    assert_same_bits(other, held)


def test_a_chain_of_no_codec_is_the_identity_and_of_one_is_that_codec() -> None:
    assert chain() == IdentityCodec()
    assert chain(Lz4()) == Lz4()
    assert chain(Lz4(), IdentityCodec()) == CodecChain((Lz4(), IdentityCodec()))


def test_a_chain_sorts_arrays_by_layout_and_checks_their_names() -> None:
    tensors = {"a": np.zeros(2, "<f4"), "b": np.ones(2, "<f4")}
    assert list(chain(IdentityCodec(), Backwards()).encode(tensors, context=NO_CONTEXT)[0]) == ["a", "b"]
    with pytest.raises(ValueError, match=r"yields arrays \['a/more', 'b/more'\]; its layout says \['a', 'b'\]"):
        chain(Liar("name"), Lz4()).encode(tensors, context=NO_CONTEXT)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((Lz4(), Entropy()), "'w' has no fixed shape; entropy must come before"),
        ((Lz4(), Rans()), "'w' has no fixed shape; entropy must come before"),
        ((Lz4(), Auto(("identity",))), "'w' has no fixed shape; auto must come before"),
        ((Lz4(), Pack(8)), "'w' has no fixed shape; pack must come before"),
        ((Lz4(), Sparse()), "'w' has no fixed shape; sparse must come before"),
        ((Entropy(), Auto(("identity",))), "'#coded' has no fixed shape; auto must come before"),
        ((Drop(), Uniform()), "'w/values' has no fixed shape; sparsifiers and quantisers must come before"),
    ],
)
def test_codecs_that_need_fixed_shapes_must_come_first(stages: tuple[Codec, ...], words: str) -> None:
    expected = (ArraySpec("w", (64,), "|i1"),) if isinstance(stages[0], Entropy) else (ArraySpec("w", (64,), "<f4"),)
    with pytest.raises(ValueError, match=words):
        chain(*stages).layout(expected)
