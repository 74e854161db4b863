"""What both ends of a link expect of the next model: one function, called with the roles swapped.

``own`` are the models that this direction has carried, ``other`` those of the opposite direction, newest last; uplink: own
are the device's models as the server has them, other the global models that they started from, and the present one.

    stationary    own[-1]                                                              ResFed's rule 0
    half_step     own[-1] + 1/2 (other[-1] - other[-2])                                rule 1, its default
    second_order  other[-1] + 2 (own[-1] - other[-2]) - (own[-2] - other[-3])          rule 2; diverges under sparsification
    delta         other[-1]                                                            uplink: the model it starts from
    drift         other[-1] + beta (own[-1] - other[-2])                               uplink; beta 0 is delta

Source: Song et al., "ResFed", arXiv 2212.05602, and its public code; there the two ends have rules 0 and 1 swapped, so they
are never in sync. ``delta`` and ``drift`` are anchored at the model that the device has just been sent: what is not sent
cannot drag the global model to a stale value, which is what breaks the others under partial participation.

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847) adds what was not sent to the
next residual. The unanchored uplink rules are closed loops, where past errors come back by themselves: a second memory
counts them twice and diverges. With drift the unsent error obeys (z - 1)(z - beta) = 0: beta stays at 1/2 or below.

What an update holds may change from plan to plan (blocks, widths, statistics). A rule therefore goes tensor by tensor: one that
a history lacks, or has in another shape, is taken as if the history were too short for it, the same at both ends.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
import xxhash

from ..codec import Array, Arrays, ArraySpec
from ..errors import OutOfSync

RuleName = Literal["stationary", "half_step", "second_order", "delta", "drift"]
# Models that a rule needs: of its own direction, of the other.
HISTORY: dict[str, tuple[int, int]] = {
    "stationary": (1, 0),
    "half_step": (1, 2),
    "second_order": (2, 3),
    "delta": (0, 1),
    "drift": (1, 2),
}
ANCHORED = ("delta", "drift")


class Residual(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How one direction of a link is coded: as the residual against what ``rule`` predicts.

    ``beta``: gain of ``drift``. ``feedback``: whether what was not sent is added to the next residual. ``arithmetic`` "bits"
    takes residuals of the bit patterns as integers, which a lossless codec restores exactly; "float" is what lossy ones need.
    Raises ``ValueError`` for a gain that is not stable, and for feedback of "bits"; whether the rule and its feedback suit a
    direction is judged by ``check_up`` and ``check_down``.
    """

    rule: RuleName
    beta: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.5
    feedback: bool = False
    arithmetic: Literal["float", "bits"] = "float"

    def __post_init__(self) -> None:
        """Refuse a gain that is not stable (msgspec judges only what it converts), and to feed back what loses nothing."""
        if not 0 <= self.beta <= 0.5:
            raise ValueError(f"beta is {self.beta!r}; it must be from 0 to 0.5")
        if self.feedback and self.arithmetic == "bits":
            raise ValueError("feedback is true with arithmetic 'bits', which loses nothing; it must be false")

    def check_up(self) -> None:
        """Raise ``ValueError`` for feedback with a rule that is not anchored, which diverges. (Any rule may go up.)"""
        if self.feedback and self.rule not in ANCHORED:
            raise ValueError(
                f"feedback is true with the uplink rule {self.rule!r}, which feeds errors back by itself and diverges with "
                f"both; it is allowed with: {', '.join(ANCHORED)}"
            )

    def check_down(self) -> None:
        """Raise ``ValueError`` for a rule that is anchored at what came down. (Any other may go down, with feedback or not.)"""
        if self.rule in ANCHORED:
            allowed = ", ".join(rule for rule in HISTORY if rule not in ANCHORED)
            raise ValueError(
                f"rule is {self.rule!r}, which starts from what came down; a downlink's rule is one of: {allowed}"
            )


def predict(
    residual: Residual, *, own: Sequence[Arrays], other: Sequence[Arrays], start: Arrays, names: Sequence[str]
) -> Arrays:
    """The prediction for ``names``, from as many models as the rule needs; the arrays may be those of a history.

    ``start``: the global model that both ends hold (uplink: the newest of ``other``; downlink: the newest of ``own``); its
    tensors say what each must be like. With a history too short for the rule, or that has a tensor otherwise: ``start`` for an
    anchored rule, else the newest of ``own`` where that has the tensor, else ``start``. All arithmetic is elementwise, in the
    type of the models and in a fixed order. Raises ``OutOfSync`` where ``start`` lacks a tensor.
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
    """One tensor's prediction: by the rule, or by the little that its history holds."""
    needs_own, needs_other = HISTORY[residual.rule]
    mine, theirs = _newest(own, needs_own, name, like=start), _newest(other, needs_other, name, like=start)
    if len(mine) == needs_own and len(theirs) == needs_other:
        return _by_rule(residual, mine, theirs)
    newest = [] if residual.rule in ANCHORED else _newest(own, 1, name, like=start)
    return newest[0] if newest else start


def _newest(models: Sequence[Arrays], count: int, name: str, *, like: Array) -> list[Array]:
    """A tensor in the last ``count`` models; without those that lack it, or have it in another shape or type."""
    found = [model[name] for model in models[max(0, len(models) - count) :] if name in model]
    return [array for array in found if array.shape == like.shape and array.dtype == like.dtype]


def _by_rule(residual: Residual, own: list[Array], other: list[Array]) -> Array:
    """One tensor's prediction, from as many models as the rule needs."""
    rule = residual.rule
    if rule == "stationary":
        return own[-1]
    if rule == "delta":
        return other[-1]
    kind = other[-1].dtype.type
    if rule == "half_step":
        predicted = own[-1] + kind(0.5) * (other[-1] - other[-2])
    elif rule == "drift":
        predicted = other[-1] + kind(residual.beta) * (own[-1] - other[-2])
    else:
        predicted = (other[-1] + kind(2) * (own[-1] - other[-2])) - (own[-2] - other[-3])
    return np.asarray(predicted)


def difference(values: Arrays, prediction: Arrays, residual: Residual) -> dict[str, Array]:
    """The residuals of ``values``: differences, or integer differences of their bit patterns."""
    if residual.arithmetic == "float":
        with _no_overflow():
            return {name: np.asarray(value - prediction[name]) for name, value in values.items()}
    return {name: np.asarray(_bits(value) - _bits(prediction[name])) for name, value in values.items()}


def restore(residuals: Arrays, prediction: Arrays, residual: Residual) -> dict[str, Array]:
    """What a receiver makes of ``residuals``; ``difference`` undone, exactly so with "bits"."""
    if residual.arithmetic == "float":
        with _no_overflow():
            return {name: np.asarray(prediction[name] + value) for name, value in residuals.items()}
    restored = {name: np.asarray(_bits(prediction[name]) + value) for name, value in residuals.items()}
    return {name: bits.view(prediction[name].dtype) for name, bits in restored.items()}


def carried(expected: tuple[ArraySpec, ...], residual: Residual) -> tuple[ArraySpec, ...]:
    """What a codec is given for tensors of these specifications: with "bits", integers of the same width."""
    if residual.arithmetic == "float":
        return expected
    return tuple(msgspec.structs.replace(spec, dtype=f"<i{np.dtype(spec.dtype).itemsize}") for spec in expected)


def hash_arrays(arrays: Arrays) -> int:
    """64-bit hash (xxh3) of names and contents, in their order: what both ends compare."""
    digest = xxhash.xxh3_64()
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.intdigest()


def _no_overflow() -> np.errstate:
    """What a stranger's large numbers overflow to is found where it is looked for, by the check for what is not finite."""
    return np.errstate(over="ignore", invalid="ignore")


def _bits(array: Array) -> Array:
    """An array's bit patterns, as integers of the same width."""
    return np.ascontiguousarray(array).view(f"<i{array.dtype.itemsize}").reshape(array.shape)
