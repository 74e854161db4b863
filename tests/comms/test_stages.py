import numpy as np
import pytest
from fedbonsai.comms.codec import ArraySpec, Codec, Context
from fedbonsai.comms.codecs.float16 import Float16
from fedbonsai.comms.codecs.sparsify import Threshold, TopK
from fedbonsai.comms.codecs.ternary import Ternary
from fedbonsai.comms.codecs.uniform import Uniform
from fedbonsai.comms.errors import MismatchedPacket
from fedbonsai.comms.stages import received, touched_arrays, touched_specs

TENSORS = {
    "conv": np.ones((2, 3), "<f4"),
    "bias": np.ones(2, "<f4"),
    "mean": np.ones(2, "<f8"),
    "count": np.ones((2, 2), "<i8"),
    "conv#scale": np.ones((1, 1), "<f4"),
    "half": np.ones((), "<f2"),
}
STAGES = [
    TopK(0.5),
    TopK(0.5, scope="normalised"),
    Threshold(1),
    Threshold(1, relative=True),
    Float16(),
    Uniform(),
    Ternary(),
]


def test_only_floats_of_the_roles_are_touched() -> None:
    roles = {"mean": "statistic"}
    specs = tuple(ArraySpec(n, a.shape, a.dtype.str, role=roles.get(n, "")) for n, a in TENSORS.items())
    for role, names in {"weight": ["conv"], "sparse": [], "vector": ["bias", "half"], "statistic": ["mean"]}.items():
        assert list(touched_specs(specs, (role,))) == names
        assert list(touched_arrays(TENSORS, (role,), Context(roles=roles))) == names


def test_a_given_role_takes_precedence_over_the_shape() -> None:
    context = Context(roles={"conv": "counter", "bias": "weight"})
    assert list(touched_arrays(TENSORS, ("weight",), context)) == ["bias"]


def test_weights_of_sparse_layers_are_weights_and_have_a_role_of_their_own() -> None:
    tensors, roles = {"conv": np.ones((2, 3), "<f4"), "fc": np.ones((2, 2), "<f4")}, {"conv": "sparse"}
    specs = tuple(ArraySpec(n, a.shape, a.dtype.str, role=roles.get(n, "")) for n, a in tensors.items())
    for role, names in {"weight": ["conv", "fc"], "sparse": ["conv"], "vector": []}.items():
        assert list(touched_specs(specs, (role,))) == names
        assert list(touched_arrays(tensors, (role,), Context(roles=roles))) == names


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(3, "<f4"), r"'w' is <f4 of shape \(3,\), where <f4 of \(2,\) is expected"),
        (np.ones((2, 1), "<f4"), r"of shape \(2, 1\)"),
        (np.ones(2, "<f8"), "'w' is <f8"),
        (None, "'w' is missing"),
    ],
)
def test_unexpected_arrays(array: np.ndarray | None, words: str) -> None:
    arrays = {} if array is None else {"w": array}
    with pytest.raises(MismatchedPacket, match=words):
        received(arrays, ArraySpec("w", (2,), "<f4"))


def test_an_array_of_varying_size_has_a_bound() -> None:
    spec = ArraySpec("w", (2,), "|u1", exact=False)
    assert received({"w": np.zeros(1, "|u1")}, spec).size == 1
    with pytest.raises(MismatchedPacket):
        received({"w": np.zeros(3, "|u1")}, spec)


@pytest.mark.parametrize(
    "stage",
    [TopK(0.5), TopK(0.5, scope="normalised"), Threshold(1), Threshold(1, True), Float16(), Uniform(), Ternary()],
    ids=repr,
)
def test_checks_that_all_stages_share(stage: Codec) -> None:
    with pytest.raises(ValueError, match="'w' has no fixed shape; sparsifiers and quantisers must come before"):
        stage.layout((ArraySpec("w", (4,), "<f4", exact=False, role="weight"),))
    with pytest.raises(ValueError, match="roles hold 'counter'; they must be among weight, sparse, vector, statistic"):
        type(stage)(**{**vars(stage), "roles": ("counter",)})
    with pytest.raises(ValueError, match="roles are empty"):
        type(stage)(**{**vars(stage), "roles": ()})
    integers = {"count": np.ones((2, 2), "<i8")}
    assert stage.encode(integers, context=Context()) == (integers, integers)
    signalling = np.array(0x7F81_0000, "<u4").view("<f4")
    for bad in (np.nan, np.inf, -np.inf, signalling):
        damaged = np.array([[1, 7], [0, 2]], "<f4")
        damaged[0, 1] = bad
        tensors = {"fine": np.ones((2, 2), "<f4"), "damaged": damaged}
        with pytest.raises(ValueError, match="tensor 'damaged' holds NaN, infinity"):
            stage.encode(tensors, context=Context())
