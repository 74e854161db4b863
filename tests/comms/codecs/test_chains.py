"""Chains of lossy stages: for any tensors, the receiver holds the sender's reconstruction bit for bit."""

import numpy as np
import pytest
from fedbonsai.comms.codec import Array, Arrays, Codec, Context, chain, specs_of
from fedbonsai.comms.codecs.auto import Auto
from fedbonsai.comms.codecs.float16 import Float16
from fedbonsai.comms.codecs.lz4_codec import Lz4
from fedbonsai.comms.codecs.pack import Pack
from fedbonsai.comms.codecs.sparse import Sparse
from fedbonsai.comms.codecs.sparsify import Threshold, TopK
from fedbonsai.comms.codecs.ternary import Ternary
from fedbonsai.comms.codecs.uniform import Uniform
from fedbonsai.comms.entropy.codec import Entropy, Rans
from fedbonsai.comms.errors import PacketError
from fedbonsai.comms.packet import PacketKind, Stamp, seal, sealed_bytes, unseal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

REST = ("vector", "statistic")
CHAINS: dict[str, Codec] = {
    "topk, ternary, uniform": chain(TopK(0.1), Ternary(), Uniform(roles=REST)),
    "topk, uniform, ternary, lz4": chain(
        TopK(0.3, scope="normalised"), Uniform(roles=REST, signed="auto"), Ternary(2, scope="global"), Lz4()
    ),
    "topk, median, float16": chain(TopK(0.5, scope="tensor"), Ternary(4, rule="median"), Float16(roles=REST)),
    "topk, float16, lz4": chain(TopK(0.1), Float16(), Lz4()),
    "threshold, uniform": chain(Threshold(1.0, relative=True), Uniform(granularity="channel", stochastic=True)),
    "uniform, lz4": chain(Uniform(), Lz4()),
    "topk, float16, sparse": chain(TopK(0.3, scope="tensor"), Float16(), Sparse()),
    "topk, uniform, sparse": chain(TopK(0.1), Uniform(), Sparse()),
    "uniform 4 bit, pack": chain(Uniform(bits=4), Pack(4)),
    "topk, ternary, uniform 2 bit, pack, lz4": chain(
        TopK(0.2), Ternary(), Uniform(bits=2, roles=REST, signed="auto", stochastic=True), Pack(2), Lz4()
    ),
}
SPARSIFIERS: tuple[tuple[Codec, ...], ...] = (
    (),
    (TopK(0.3),),
    (TopK(0.3, scope="normalised"),),
    (TopK(0.3, scope="tensor"),),
    (Threshold(0.5),),
)
QUANTISERS: tuple[tuple[Codec, ...], ...] = (
    (),
    (Float16(),),
    (Uniform(granularity="channel"),),
    (Ternary(),),
    (Ternary(), Uniform(roles=REST)),
    (Uniform(roles=REST), Ternary(2, rule="median")),
    (Ternary(2, scope="global"), Float16(roles=REST)),
    (Ternary(roles=("vector",)), Ternary(scope="global")),
)
BACK_ENDS: tuple[tuple[Codec, ...], ...] = (
    (),
    (Pack(8),),
    (Lz4(),),
    (Entropy(),),
    (Rans(), Lz4()),
    (Auto(),),
    (Sparse(),),
    (Sparse("none"),),
    (Auto(("identity",)),),
    (Auto(("lz4",)),),
    (Auto(("entropy",)),),
    (Pack(8), Auto()),
)
STAMP = Stamp(kind=PacketKind.UPDATE)
every = pytest.mark.parametrize("codec", CHAINS.values(), ids=CHAINS.keys())


def floats(dtype: str) -> st.SearchStrategy[Array]:
    bound = 60_000.0 if dtype == "<f2" else 2.0**100
    elements = st.floats(-bound, bound, width=8 * int(dtype[-1]))
    return npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), elements=elements)


TENSORS = st.dictionaries(
    st.sampled_from(["conv.weight", "norm.weight", "norm.mean", "head", "bias"]),
    st.sampled_from(["<f4", "<f4", "<f8", "<f2"]).flatmap(floats),
    max_size=4,
)


def assert_same_bits(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@every
@settings(max_examples=40, deadline=None)
@given(tensors=TENSORS, seed=st.integers(0, 2**32))
def test_both_ends_hold_the_same_bits(codec: Codec, tensors: dict[str, Array], seed: int) -> None:
    context = Context(seed=seed, roles={"norm.mean": "statistic"})
    expected = specs_of(tensors, context.roles)
    packet, held = seal(tensors, codec=codec, context=context, stamp=STAMP)
    most, exact = sealed_bytes(codec, expected)
    assert packet.nbytes == most if exact else packet.nbytes <= most
    receiver = Context(roles=context.roles)
    assert_same_bits(unseal(packet, codec=codec, expected=expected, context=receiver, stamp=STAMP), held)


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=repr)
@pytest.mark.parametrize("quantiser", QUANTISERS, ids=repr)
def test_any_sparsifier_quantiser_and_back_end_can_be_chained(
    quantiser: tuple[Codec, ...], back_end: tuple[Codec, ...]
) -> None:
    """Weights and vectors alternate, with different sizes and values, so that a mix-up of two arrays is detected."""
    generator = np.random.default_rng(0)
    shapes = {"w": (20, 10), "v": (3,), "w2": (5, 10), "none": (0, 2), "v2": (4,), "one": ()}
    tensors = {n: np.asarray(generator.standard_normal(s) * 10**i, "<f4") for i, (n, s) in enumerate(shapes.items())}
    for sparsifier in SPARSIFIERS:
        codec = chain(*sparsifier, *quantiser, *back_end)
        packet, held = seal(tensors, codec=codec, context=Context(), stamp=STAMP)
        assert_same_bits(unseal(packet, codec=codec, expected=specs_of(tensors), context=Context(), stamp=STAMP), held)


@every
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_arbitrary_arrays_decode_or_raise_a_packet_error(codec: Codec, data: st.DataObject) -> None:
    tensors = {"w": np.ones((3, 4), "<f4"), "b": np.ones(5, "<f4"), "n": np.ones((), "<f2")}
    expected = specs_of(tensors)
    arrays = {}
    for spec in codec.layout(expected):
        size = spec.num_bytes if spec.exact else data.draw(st.integers(0, spec.num_bytes))
        noise = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), spec.dtype)
        arrays[spec.name] = noise.reshape(spec.shape) if spec.exact else noise
    try:
        found = codec.decode(arrays, expected=expected, context=Context())
    except PacketError:
        return
    assert [(s.name, s.shape, s.dtype) for s in expected] == [(n, a.shape, a.dtype.str) for n, a in found.items()]


def test_the_bound_on_nonzero_entries_passes_through_a_quantiser() -> None:
    tensors = {"w": np.arange(100, dtype="<f4").reshape(10, 10), "b": np.ones(3, "<f4")}
    layout = CHAINS["topk, ternary, uniform"].layout(specs_of(tensors, {"w": "weight", "b": "vector"}))
    assert [(s.name, s.dtype, s.role, s.nonzeros) for s in layout] == [
        ("w", "|i1", "weight", 10),
        ("w#levels", "<f4", "", None),
        ("b", "|i1", "vector", None),
        ("b#scale", "<f4", "", None),
    ]


def test_packed_symbols_have_the_size_of_their_bits() -> None:
    tensors = {"w": np.random.default_rng(0).standard_normal((100, 100)).astype("<f4")}
    arrays, _ = CHAINS["uniform 4 bit, pack"].encode(tensors, context=Context())
    assert {name: array.nbytes for name, array in arrays.items()} == {"w": 5000, "w#scale": 4}
