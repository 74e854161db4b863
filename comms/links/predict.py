"""Prediction of the next model, computed alike at both ends of a link. One function serves both directions.

``own`` are the models sent in this direction, ``other`` those of the opposite direction, newest last. On the uplink, own are
the device's models as the server holds them, other the global models that they were trained from, and the current one.

    stationary    own[-1]                                                              ResFed's rule 0
    half_step     own[-1] + 1/2 (other[-1] - other[-2])                                rule 1, its default
    second_order  other[-1] + 2 (own[-1] - other[-2]) - (own[-2] - other[-3])          rule 2; diverges under sparsification
    delta         other[-1]                                                            uplink: the model trained from
    drift         other[-1] + beta (own[-1] - other[-2])                               uplink; beta 0 is delta

Source: Song et al., "ResFed", arXiv 2212.05602, and its public code, in which one end uses rule 0 where the other uses rule
1, so that they are never in sync. ``delta`` and ``drift`` are *anchored*: they predict from the model that the device was last
sent, so entries that are not sent cannot pull the global model to a stale value. The other rules fail under partial
participation for that reason.

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847) adds the unsent part to the
next residual. The unanchored uplink rules are closed loops, in which past errors enter the next residual anyway: feedback on
top counts them twice and diverges. With drift, the unsent error obeys (z - 1)(z - beta) = 0, so beta is at most 1/2.

The tensors of an update may change from plan to plan (blocks, widths, statistics), so a rule is applied to each tensor by
itself. A tensor that a model of the history lacks, or has in another shape, is predicted as from a shorter history, at both
ends.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
import xxhash

from ..codec import Array, Arrays, ArraySpec
from ..errors import OutOfSync

RuleName = Literal["stationary", "half_step", "second_order", "delta", "drift"]
# Number of models that a rule needs: of its own direction, of the other.
HISTORY: dict[str, tuple[int, int]] = {
    "stationary": (1, 0),
    "half_step": (1, 2),
    "second_order": (2, 3),
    "delta": (0, 1),
    "drift": (1, 2),
}
ANCHORED = ("delta", "drift")


class Residual(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Settings of one direction of a link: models are sent as residuals against the prediction of ``rule``.

    ``beta``: gain of ``drift``. ``feedback``: whether the unsent part is added to the next residual. ``arithmetic``: "bits"
    takes differences of the bit patterns as integers, which a lossless codec restores exactly; "float" takes differences of
    the values, as lossy codecs need. Raises ``ValueError`` for a gain that is not stable, and for feedback with "bits".
    ``check_up`` and ``check_down`` check rule and feedback for a direction.
    """

    rule: RuleName
    beta: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.5
    feedback: bool = False
    arithmetic: Literal["float", "bits"] = "float"

    def __post_init__(self) -> None:
        """Checks gain and feedback. (msgspec checks the gain only when it converts.)"""
        if not 0 <= self.beta <= 0.5:
            raise ValueError(f"beta is {self.beta!r}; it must be from 0 to 0.5")
        if self.feedback and self.arithmetic == "bits":
            raise ValueError("feedback is true with arithmetic 'bits', which loses nothing; it must be false")

    def check_up(self) -> None:
        """Raises ``ValueError`` for feedback with an unanchored rule, which diverges. Any rule without it suits an uplink."""
        if self.feedback and self.rule not in ANCHORED:
            raise ValueError(
                f"feedback is true with the uplink rule {self.rule!r}, which feeds errors back by itself and diverges with "
                f"both; it is allowed with: {', '.join(ANCHORED)}"
            )

    def check_down(self) -> None:
        """Raises ``ValueError`` for an anchored rule. Any other suits a downlink, with feedback or without."""
        if self.rule in ANCHORED:
            allowed = ", ".join(rule for rule in HISTORY if rule not in ANCHORED)
            raise ValueError(
                f"rule is {self.rule!r}, which predicts from the model sent down; a downlink's rule is one of: {allowed}"
            )


def is_broadcast(down: Residual) -> bool:
    """Whether the prediction of a downlink depends on what came down alone, so that one residual serves all devices."""
    return HISTORY[down.rule][1] == 0


def predict(
    residual: Residual, *, own: Sequence[Arrays], other: Sequence[Arrays], start: Arrays, names: Sequence[str]
) -> Arrays:
    """Predicts the tensors ``names``. The returned arrays may be those of a history.

    ``start``: the newest global model that both ends hold (uplink: the newest of ``other``; downlink: the newest of ``own``).
    Its tensors determine shapes and types. If the history of a tensor is too short for the rule, or has it in another shape
    or type, the prediction is ``start`` for an anchored rule, else the tensor of the newest of ``own`` if it fits, else
    ``start``. All arithmetic is elementwise, in the type of the models and in a fixed order. Raises ``OutOfSync`` if
    ``start`` lacks a tensor.
    """
    if missing := [name for name in names if name not in start]:
        raise OutOfSync(
            f"the model to start from has no {missing[0]!r} ({len(missing)} of {len(names)} tensors missing)"
        )
    with _no_overflow():
        return {name: _predict_tensor(residual, name, own=own, other=other, start=start[name]) for name in names}


def _predict_tensor(
    residual: Residual, name: str, *, own: Sequence[Arrays], other: Sequence[Arrays], start: Array
) -> Array:
    """One tensor's prediction: by the rule, or by the newest model if the history is too short for it."""
    needs_own, needs_other = HISTORY[residual.rule]
    own_arrays = _newest(own, needs_own, name, like=start)
    other_arrays = _newest(other, needs_other, name, like=start)
    if len(own_arrays) == needs_own and len(other_arrays) == needs_other:
        return _by_rule(residual, own_arrays, other_arrays)
    newest = [] if residual.rule in ANCHORED else _newest(own, 1, name, like=start)
    return newest[0] if newest else start


def _newest(models: Sequence[Arrays], count: int, name: str, *, like: Array) -> list[Array]:
    """A tensor in the last ``count`` models, without models that lack it or have it in another shape or type."""
    arrays = [model[name] for model in models[max(0, len(models) - count) :] if name in model]
    return [array for array in arrays if array.shape == like.shape and array.dtype == like.dtype]


def _by_rule(residual: Residual, own: list[Array], other: list[Array]) -> Array:
    """One tensor's prediction by the rule, from exactly as many models as it needs."""
    rule = residual.rule
    if rule == "stationary":
        return own[-1]
    if rule == "delta":
        return other[-1]
    scalar = other[-1].dtype.type
    if rule == "half_step":
        predicted = own[-1] + scalar(0.5) * (other[-1] - other[-2])
    elif rule == "drift":
        predicted = other[-1] + scalar(residual.beta) * (own[-1] - other[-2])
    else:
        predicted = (other[-1] + scalar(2) * (own[-1] - other[-2])) - (own[-2] - other[-3])
    return np.asarray(predicted)


def residuals_of(values: Arrays, prediction: Arrays, residual: Residual) -> dict[str, Array]:
    """The residuals of ``values`` against ``prediction``: differences, or integer differences of bit patterns."""
    if residual.arithmetic == "float":
        with _no_overflow():
            return {name: np.asarray(value - prediction[name]) for name, value in values.items()}
    return {name: np.asarray(_bits(value) - _bits(prediction[name])) for name, value in values.items()}


def restore(residuals: Arrays, prediction: Arrays, residual: Residual) -> dict[str, Array]:
    """The values of ``residuals``: the inverse of ``residuals_of``, exact with arithmetic "bits"."""
    if residual.arithmetic == "float":
        with _no_overflow():
            return {name: np.asarray(prediction[name] + value) for name, value in residuals.items()}
    restored = {name: np.asarray(_bits(prediction[name]) + value) for name, value in residuals.items()}
    return {name: bits.view(prediction[name].dtype) for name, bits in restored.items()}


def residual_specs(expected: tuple[ArraySpec, ...], residual: Residual) -> tuple[ArraySpec, ...]:
    """Specifications of the residuals of tensors: with arithmetic "bits", integers of the same width."""
    if residual.arithmetic == "float":
        return expected
    return tuple(msgspec.structs.replace(spec, dtype=f"<i{np.dtype(spec.dtype).itemsize}") for spec in expected)


def hash_arrays(arrays: Arrays) -> int:
    """64-bit hash (xxh3) of names and contents, in their order. Both ends compare it."""
    digest = xxhash.xxh3_64()
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.intdigest()


def _no_overflow() -> np.errstate:
    """Ignores overflow, as received values may cause. Receivers check the result for values that are not finite."""
    return np.errstate(over="ignore", invalid="ignore")


def _bits(array: Array) -> Array:
    """An array's bit patterns, as integers of the same width."""
    return np.ascontiguousarray(array).view(f"<i{array.dtype.itemsize}").reshape(array.shape)
