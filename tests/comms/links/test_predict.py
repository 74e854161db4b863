"""Predictions of every rule by hand, and the exact inverse of residuals."""

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from fedbonsai.comms.codec import Array, Arrays, ArraySpec
from fedbonsai.comms.errors import OutOfSync
from fedbonsai.comms.links.predict import (
    ANCHORED,
    HISTORY,
    Residual,
    RuleName,
    hash_arrays,
    predict,
    residual_specs,
    residuals_of,
    restore,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

RULES: list[RuleName] = ["stationary", "half_step", "second_order", "delta", "drift"]
SHAPES = [(), (3,), (2, 2), (0, 2)]


def models(*values: float, dtype: str = "<f4", shape: tuple[int, ...] = (1,)) -> list[Arrays]:
    return [{"w": np.full(shape, value, dtype)} for value in values]


def predicted(rule: RuleName, own: Sequence[Arrays], other: Sequence[Arrays], **fields: float) -> list[float]:
    residual = Residual(rule=rule, **fields)
    start = (own or other)[-1] if rule not in ANCHORED else other[-1]
    found: list[float] = predict(residual, own=own, other=other, start=start, names=["w"])["w"].reshape(-1).tolist()
    return found


# own ... 3, 8 and other ... 10, 11, 14 (newest last):
#   stationary    8
#   half_step     8 + (14 - 11) / 2 = 9.5
#   second_order  14 + 2 (8 - 11) - (3 - 10) = 14 - 6 + 7 = 15
#   delta         14
#   drift         14 + (8 - 11) / 2 = 12.5; with beta 1/4 14 - 0.75 = 13.25; with beta 0 delta
@pytest.mark.parametrize(
    ("rule", "value"), [("stationary", 8), ("half_step", 9.5), ("second_order", 15), ("delta", 14), ("drift", 12.5)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2"])
def test_the_rules_by_hand(rule: RuleName, value: float, dtype: str, shape: tuple[int, ...]) -> None:
    own, other = (models(*values, dtype=dtype, shape=shape) for values in ((1, 3, 8), (7, 10, 11, 14)))
    found = predict(Residual(rule=rule), own=own, other=other, start=other[-1], names=["w"])
    assert list(found) == ["w"]
    assert (found["w"].dtype.str, found["w"].shape) == (dtype, shape)
    assert found["w"].tolist() == np.full(shape, value).tolist()


def test_drift_by_its_gain() -> None:
    own, other = models(8), models(11, 14)
    assert predicted("drift", own, other, beta=0.25) == [13.25]
    assert predicted("drift", own, other, beta=0) == predicted("delta", own, other) == [14]


@pytest.mark.parametrize(
    ("rule", "own", "other", "value"),
    [
        ("stationary", (), (5, 6), 6),  # no model was sent in this direction: the newest of the other
        ("half_step", (), (5, 6), 6),
        ("half_step", (8,), (), 8),
        ("half_step", (8,), (6,), 8),
        ("half_step", (8,), (6, 7), 8.5),
        ("second_order", (), (6,), 6),
        ("second_order", (8,), (5, 6, 7), 8),
        ("second_order", (3, 8), (6, 7), 8),
        ("drift", (), (5, 6), 6),
        ("drift", (8,), (6,), 6),
        ("drift", (8,), (6, 7), 8),
        ("delta", (8,), (6,), 6),
    ],
)
def test_short_histories(rule: RuleName, own: tuple[float, ...], other: tuple[float, ...], value: float) -> None:
    assert predicted(rule, models(*own), models(*other)) == [value]


def test_more_history_than_a_rule_needs_changes_nothing() -> None:
    own, other = models(9, 1, 3, 8), models(-5, 7, 10, 11, 14)
    for rule in RULES:
        needs_own, needs_other = HISTORY[rule]
        assert predicted(rule, own[len(own) - needs_own :], other[-needs_other:]) == predicted(rule, own, other)


# "x" is missing from one of the histories, or has become wider; the history of "w" is complete (see above).
@pytest.mark.parametrize(
    ("rule", "value", "fallback"),
    [("stationary", 8, 4), ("half_step", 9.5, 4), ("second_order", 15, 4), ("delta", 14, 4), ("drift", 12.5, 4)],
)
@pytest.mark.parametrize("before", [{}, {"x": np.full((2, 1), 9, "<f4")}, {"x": np.full((2, 2), 9, "<f8")}], ids=str)
def test_only_a_tensor_that_a_history_lacks_is_predicted_without_it(
    rule: RuleName, value: float, fallback: float, before: Arrays
) -> None:
    own = [m | before for m in models(3, 8)]
    base = models(14)[0] | {"x": np.full((2, 2), fallback, "<f4")}
    other = [*(m | before for m in models(10, 11)), base]
    found = predict(Residual(rule=rule), own=own, other=other, start=base, names=["w", "x"])
    assert found["w"].tolist() == [value]
    assert found["x"] is base["x"]


def test_an_unanchored_rule_falls_back_to_its_own_newest_model() -> None:
    # Only the newest of the other models has the tensor: the history is too short for half_step.
    own, base = models(3, 8), models(14)[0]
    found = predict(Residual(rule="half_step"), own=own, other=[{}, base], start=base, names=["w"])
    assert found["w"].tolist() == [8]


def test_a_start_model_without_a_tensor_is_out_of_sync() -> None:
    with pytest.raises(OutOfSync, match="the model to start from has no 'x'"):
        predict(Residual(rule="stationary"), own=models(8), other=[], start=models(8)[0], names=["w", "x"])


def test_only_the_requested_names_in_their_order() -> None:
    other = [{"a": np.float32([1]), "b": np.float32([2]), "c": np.float32([3])}]
    found = predict(Residual(rule="delta"), own=[], other=other, start=other[0], names=["c", "a"])
    assert list(found) == ["c", "a"]
    assert found["c"] is other[0]["c"]


@pytest.mark.parametrize("rule", ["stationary", "half_step", "second_order"])
def test_both_ends_predict_the_same_from_equal_histories(rule: RuleName) -> None:
    down, up = models(10, 11, 14), models(3, 8, 9)
    server = predict(Residual(rule=rule), own=down, other=up, start=down[-1], names=["w"])
    own, other = [dict(m) for m in down], [dict(m) for m in up]
    device = predict(Residual(rule=rule), own=own, other=other, start=own[-1], names=["w"])
    assert hash_arrays(server) == hash_arrays(device)
    assert predicted(rule, down, up) != predicted(rule, up, down)  # and the two directions are not interchangeable


def test_inputs_are_not_changed() -> None:
    own, other = models(1, 3, 8), models(7, 10, 11, 14)
    before = [hash_arrays(m) for m in own + other]
    for rule in RULES:
        prediction = predict(Residual(rule=rule), own=own, other=other, start=other[-1], names=["w"])
        restore(residuals_of(own[0], prediction, Residual(rule=rule)), prediction, Residual(rule=rule))
    assert [hash_arrays(m) for m in own + other] == before


def test_differences_of_floats_by_hand() -> None:
    residual = Residual(rule="delta")
    found = residuals_of({"w": np.float32([3, -1])}, {"w": np.float32([1, 1])}, residual)
    assert found["w"].tolist() == [2, -2]
    assert restore(found, {"w": np.float32([1, 1])}, residual)["w"].tolist() == [3, -1]


def test_differences_of_bit_patterns_by_hand() -> None:
    # 1.0 is 0x3F800000 and the next float 0x3F800001; 0.0 is 0 and -0.0 is 0x80000000, which is the least int32.
    residual = Residual(rule="delta", arithmetic="bits")
    next_up = np.nextafter(np.float32(1), np.float32(2))
    found = residuals_of({"w": np.float32([next_up, -0.0])}, {"w": np.float32([1, 0])}, residual)
    assert (found["w"].dtype.str, found["w"].tolist()) == ("<i4", [1, -(2**31)])
    # From the pattern of -2.0 (0xC0000000 = -2^30) up to that of 2.0 (2^30) is 2^31, one more than int32 holds: it wraps.
    found = residuals_of({"w": np.float32([2])}, {"w": np.float32([-2])}, residual)
    assert found["w"].tolist() == [-(2**31)]
    assert restore(found, {"w": np.float32([-2])}, residual)["w"].tolist() == [2]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    """Any bit patterns but NaN, infinities included, of one type and shape."""
    dtype = draw(st.sampled_from(["<f4", "<f8", "<f2"]))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    elements = st.floats(width=8 * np.dtype(dtype).itemsize, allow_nan=False)
    value, prediction = (draw(npst.arrays(dtype, shape, elements=elements)) for _ in range(2))
    return value, prediction


@given(pairs())
def test_bit_patterns_are_restored_exactly(pair: tuple[Array, Array]) -> None:
    residual = Residual(rule="delta", arithmetic="bits")
    value, prediction = pair
    wide, other = value.T, prediction.T  # not contiguous if there are two dimensions
    residuals = residuals_of({"w": wide}, {"w": other}, residual)
    assert residuals["w"].dtype.kind == "i"
    found = restore(residuals, {"w": other}, residual)["w"]
    assert (found.dtype, found.shape) == (wide.dtype, wide.shape)
    assert found.tobytes() == wide.tobytes()


def test_a_restored_value_that_overflows_is_infinite_without_a_warning() -> None:
    large = {"w": np.float32([3e38]), "s": np.float32(3e38)}
    assert np.isinf(restore(large, large, Residual(rule="delta"))["w"]).all()


def test_specifications_of_residuals_of_bit_patterns() -> None:
    expected = (ArraySpec("w", (2,), "<f4", role="weight"), ArraySpec("v", (), "<f8"), ArraySpec("h", (1,), "<f2"))
    assert residual_specs(expected, Residual(rule="delta")) is expected
    found = residual_specs(expected, Residual(rule="delta", arithmetic="bits"))
    assert [(s.name, s.shape, s.dtype, s.role) for s in found] == [
        ("w", (2,), "<i4", "weight"),
        ("v", (), "<i8", ""),
        ("h", (1,), "<i2", ""),
    ]


def test_a_hash_depends_on_names_contents_order_and_the_sign_of_zero() -> None:
    one, two = np.float32([1]), np.float32([2])
    hashes = [
        hash_arrays(arrays)
        for arrays in (
            {},
            {"a": one},
            {"b": one},
            {"a": two},
            {"a": one, "b": two},
            {"b": two, "a": one},
            {"a": np.float32([0.0])},
            {"a": np.float32([-0.0])},
        )
    ]
    assert len(set(hashes)) == len(hashes)
    matrix = np.arange(6, dtype="<f4").reshape(2, 3)
    assert hash_arrays({"m": matrix.T}) == hash_arrays({"m": np.ascontiguousarray(matrix.T)})


@pytest.mark.parametrize("rule", RULES)
def test_rules_and_feedback_for_each_direction(rule: RuleName) -> None:
    anchored = rule in ("delta", "drift")
    up = Residual(rule=rule, feedback=True)
    if anchored:
        up.check_up()
        with pytest.raises(ValueError, match=f"rule is '{rule}', which predicts from the model sent down"):
            Residual(rule=rule).check_down()
    else:
        up.check_down()
        with pytest.raises(ValueError, match="feeds errors back by itself and diverges"):
            up.check_up()
    Residual(rule=rule).check_up()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="feedback is true with arithmetic 'bits', which loses nothing"):
        Residual(rule="delta", feedback=True, arithmetic="bits")
    for beta in (-0.1, 0.51, 3.0, float("nan")):
        with pytest.raises(ValueError, match=f"beta is {beta}; it must be from 0 to 0.5"):
            Residual(rule="drift", beta=beta)
    for beta in (-0.1, 0.51):
        with pytest.raises(msgspec.ValidationError, match="beta"):
            msgspec.convert({"rule": "drift", "beta": beta}, Residual)
