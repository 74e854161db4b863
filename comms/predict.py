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
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
import xxhash

from .codecs import Array, Arrays, ArraySpec

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
    Raises ``ValueError`` for feedback where it is not stable.
    """

    rule: RuleName
    beta: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.5
    feedback: bool = False
    arithmetic: Literal["float", "bits"] = "float"

    def __post_init__(self) -> None:
        """Refuse what would lose nothing, and feed it back."""
        if self.feedback and self.arithmetic == "bits":
            raise ValueError("feedback is true with arithmetic 'bits', which loses nothing; it must be false")

    def check_up(self) -> None:
        """Raise ``ValueError`` unless this suits an uplink."""
        if self.feedback and self.rule not in ANCHORED:
            raise ValueError(
                f"feedback is true with the uplink rule {self.rule!r}, which feeds errors back by itself and diverges with "
                f"both; it is allowed with: {', '.join(ANCHORED)}"
            )

    def check_down(self) -> None:
        """Raise ``ValueError`` unless this suits a downlink."""
        if self.rule in ANCHORED:
            allowed = ", ".join(rule for rule in HISTORY if rule not in ANCHORED)
            raise ValueError(
                f"rule is {self.rule!r}, which starts from what came down; a downlink's rule is one of: {allowed}"
            )


def predict(residual: Residual, *, own: Sequence[Arrays], other: Sequence[Arrays], names: Sequence[str]) -> Arrays:
    """The prediction for ``names``, from as many models as the rule needs; the arrays may be those of a history.

    With a history too short for the rule: the newest of ``other`` for an anchored rule, else the newest of ``own``, or of
    ``other`` where there is none. All arithmetic is elementwise, in the type of the models and in a fixed order.
    """
    needs_own, needs_other = HISTORY[residual.rule]
    if len(own) < needs_own or len(other) < needs_other:
        anchored = residual.rule in ANCHORED or not own
        newest = other[-1] if anchored else own[-1]
        return {name: newest[name] for name in names}
    with _no_overflow():
        return {name: _predict_one(residual, [m[name] for m in own], [m[name] for m in other]) for name in names}


def _predict_one(residual: Residual, own: list[Array], other: list[Array]) -> Array:
    """One tensor's prediction."""
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
