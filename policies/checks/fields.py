"""Checks of the fields of a policy: the same error sentence from YAML, from ``--set`` and from Python.

A policy declares the allowed values of a field by its annotation alone (``Annotated[float, msgspec.Meta(gt=0)]``) and calls
``check_fields(self)`` in ``__post_init__``. ``Cohort`` is the one type that an annotation cannot express.
"""

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

Cohort = int | float  # devices (int, at least 1), or a share of all devices (float in (0, 1]; 1.0 is everyone)


def convert_field(name: str, value: Any, hint: Any) -> Any:
    """``value`` converted to its annotation ``hint``: a list becomes a tuple, a mapping a struct.

    Raises ``ValueError`` naming the field, the value and what was expected.
    """
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        if get_origin(hint) is Literal:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, get_args(hint)))}") from error
        raise ValueError(f"{name} is {value!r}: {str(error)[0].lower()}{str(error)[1:]}") from error


def check_fields(policy: Any) -> None:
    """Raise ``ValueError`` for the first field of a dataclass whose value does not match its annotation."""
    hints = get_type_hints(type(policy), include_extras=True)
    for field in dataclasses.fields(policy):
        convert_field(field.name, getattr(policy, field.name), hints[field.name])


def is_cohort(value: object) -> bool:
    """Whether ``value`` is a number of devices or a share of them."""
    if isinstance(value, int):
        return value >= 1 and not isinstance(value, bool)
    return isinstance(value, float) and 0 < value <= 1


def check_cohort(name: str, value: Cohort) -> None:
    """Raise ``ValueError`` unless ``value`` is a number of devices or a share of them."""
    if not is_cohort(value):
        raise ValueError(
            f"{name} is {value!r}; allowed: a whole number of devices, at least 1, "
            "or a share of all devices above 0 and up to 1.0"
        )


def cohort_size(cohort: Cohort, num_devices: int) -> int:
    """Number of devices that ``cohort`` stands for in a fleet of ``num_devices``, at most all of them.

    A share is rounded to the nearest whole device (halves up), and is at least one.
    """
    wanted = cohort if isinstance(cohort, int) else max(1, int(cohort * num_devices + 0.5))
    return min(wanted, num_devices)
