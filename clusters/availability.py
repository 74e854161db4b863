"""Availability, dropouts and jitter of a class of devices, as a fleet declares them or as CSV files of traces hold them.

All of this is simulated by the virtual clock (``availability.py`` and ``disruptions.py`` in ``runtime/simulation/``); the wall
clock ignores it.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from .profile import Fraction, NonNegative, Positive
from .units import LIMITS

Window = tuple[int, float, float]  # device, from this second, until this one
Rate = tuple[int, float, float, float]  # device, from this second on, bytes per second up, and down
LEAST_PERIOD_S = 1e-3  # periods are drawn one after another up to the time that is looked up
WINDOW, RATE = ("device", "start_s", "end_s"), ("device", "at_s", "up_bytes_per_s", "down_bytes_per_s")


class Availability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a device of a class can be reached: while every condition that is set here holds.

    ``share``: share of the time, in periods of random length; those in which it can be reached last ``mean_on_s`` on
    average. ``on_s`` seconds out of every ``every_s``, from ``phase_s`` on (None: drawn for each device). ``trace``: a file
    of windows, or the windows. Not before ``joins_s``, and not from ``leaves_s`` on.
    """

    shorthand: ClassVar[tuple[str, ...]] = ("share",)

    share: Fraction = 1.0
    mean_on_s: Positive = 600.0
    on_s: Positive | None = None
    every_s: Positive | None = None
    phase_s: NonNegative | None = None
    trace: str | tuple[Window, ...] | None = None
    joins_s: NonNegative = 0.0
    leaves_s: Positive | None = None


class Dropout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Probabilities that a plan is lost: in the downlink (``before``), ``during`` training, in the uplink (``after``).

    ``somewhere``: divided equally among the three; a plain number sets this. ``early``: probability that the device stops
    training early, after a share of its steps, and sends its update so far; nothing is lost.
    """

    shorthand: ClassVar[tuple[str, ...]] = ("somewhere",)

    before: Fraction = 0.0
    during: Fraction = 0.0
    after: Fraction = 0.0
    somewhere: Fraction = 0.0
    early: Fraction = 0.0

    @property
    def chances(self) -> tuple[float, float, float]:
        """Probabilities of ``before``, ``during`` and ``after``, each with its share of ``somewhere``."""
        each = self.somewhere / 3
        return self.before + each, self.during + each, self.after + each


class Jitter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Random variation, from plan to plan, of computing time (``compute``) and of the rates of a device's link (``links``).

    Each is the standard deviation of the logarithm of a factor whose mean is 1. A plain number sets both.
    """

    shorthand: ClassVar[tuple[str, ...]] = ("compute", "links")

    compute: Annotated[float, msgspec.Meta(ge=0, le=3)] = 0.0
    links: Annotated[float, msgspec.Meta(ge=0, le=3)] = 0.0


ALWAYS, NEVER_LOST, STEADY = Availability(), Dropout(), Jitter()


def check_availability(availability: Availability, dropout: Dropout, field: str) -> None:
    """Raise ``ValueError`` where the declarations of a class contradict each other. ``field``: of the class, for errors."""
    section = f"{field}.availability"
    for name in ("mean_on_s", "on_s", "every_s"):
        if (seconds := getattr(availability, name)) is not None and seconds < LEAST_PERIOD_S:
            raise ValueError(f"{section}.{name} is {seconds:g}; it must be at least {LEAST_PERIOD_S:g}")
    if (availability.on_s is None) != (availability.every_s is None):
        present, missing = ("on_s", "every_s") if availability.every_s is None else ("every_s", "on_s")
        raise ValueError(
            f"{section}.{present} is {getattr(availability, present):g} without {missing}; a schedule needs both"
        )
    if availability.on_s is not None and availability.every_s is not None and availability.on_s > availability.every_s:
        raise ValueError(
            f"{section}.on_s is {availability.on_s:g}; it must be at most every_s, {availability.every_s:g}"
        )
    if availability.phase_s is not None and availability.every_s is None:
        raise ValueError(
            f"{section}.phase_s is {availability.phase_s:g} without every_s; a schedule needs on_s and every_s"
        )
    if availability.leaves_s is not None and availability.leaves_s <= availability.joins_s:
        raise ValueError(
            f"{section}.leaves_s is {availability.leaves_s:g}; it must be more than joins_s, {availability.joins_s:g}"
        )
    if (total := sum(dropout.chances)) > 1 + 1e-9:
        raise ValueError(f"{field}.dropout adds up to {total:g}; all chances together must be at most 1")


def load_trace(availability: Availability, field: str, **where: Any) -> Availability:
    """The availability of a class with the windows of its devices in place of the file that holds them.

    ``where``: see ``load_rows``. Raises ``ValueError`` in one sentence.
    """
    if availability.trace is None:
        return availability
    field = f"{field}.availability.trace"
    windows = load_rows(availability.trace, head=WINDOW, field=field, **where)
    for device, start_s, end_s in windows:
        if not 0 <= start_s < min(end_s, math.inf):
            text = f"{field} has device {device} from {start_s:g} s to {end_s:g} s"
            raise ValueError(f"{text}; a window begins at 0 or later, and ends later")
    return msgspec.structs.replace(availability, trace=windows)


def load_rates(source: str | tuple[Rate, ...] | None, field: str, **where: Any) -> tuple[Rate, ...] | None:
    """The rates of the devices of a class, from the file that holds them. Arguments and errors as for ``load_trace``."""
    if source is None:
        return None
    field = f"{field}.rates"
    rates = load_rows(source, head=RATE, field=field, **where)
    least, most = LIMITS["bytes_per_s"]
    for device, at_s, up, down in rates:
        if not (0 <= at_s < math.inf and least <= up <= most and least <= down <= most):
            text = f"{field} has device {device} at {at_s:g} s with {up:g} bytes/s up and {down:g} down"
            raise ValueError(f"{text}; times are 0 or later, rates between {least:g} and {most:g}")
    return rates


def load_rows(
    source: str | Sequence[tuple[Any, ...]],
    *,
    head: Sequence[str],
    devices: range,
    num_devices: int,
    folder: Path,
    field: str,
) -> tuple[tuple[Any, ...], ...]:
    """The rows of ``devices``, sorted: each a device number and further numbers.

    ``source``: path of a CSV file, relative to ``folder``, or rows that have been read already. ``head``: the required first
    line of the file. ``field``: of the fleet, for errors. Raises ``ValueError`` in one sentence.
    """
    rows = (
        _read(Path(source) if Path(source).is_absolute() else folder / source, head, field)
        if isinstance(source, str)
        else source
    )
    for row in rows:
        if not 0 <= row[0] < num_devices:
            raise ValueError(f"{field} has a line of device {row[0]}; devices are 0 to {num_devices - 1}")
    kept = tuple(sorted(row for row in rows if row[0] in devices))
    if not kept:
        raise ValueError(f"{field} has no line of devices {devices[0]} to {devices[-1]}, those of its class")
    return kept


def _read(path: Path, head: Sequence[str], field: str) -> list[tuple[Any, ...]]:
    """The rows in a CSV file."""
    if "\0" in str(path):
        raise ValueError(f"{field} is {str(path)!r}, which holds a NUL character; allowed: a path without one")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{field} is {str(path)!r}, which cannot be read: {error}") from error
    if not rows or [name.strip() for name in rows[0][1]] != list(head):
        raise ValueError(f"{field} is {str(path)!r}, whose first line must be {','.join(head)}")
    found = []
    for number, row in rows[1:]:
        try:
            found.append((int(row[0]), *(float(value) for value in row[1:])))
        except ValueError:
            found.append(())
        if len(found[-1]) != len(head):
            text = f"{field}: line {number} of {str(path)!r} is {','.join(row)!r}"
            raise ValueError(f"{text}; it must be a device's number and {len(head) - 1} numbers")
    return found
