"""When devices can be reached, and what befalls them: what a class of a fleet declares of it, and traces of it in files.

All of it is simulated: the virtual clock acts on it (``availability.py`` and ``disruptions.py`` in ``runtime/simulation/``),
the wall clock does not.
"""

import math
from typing import Annotated, Any, ClassVar

import msgspec

from .profile import Fraction, NonNegative, Positive
from .traces import load_rows
from .units import LIMITS

Window = tuple[int, float, float]  # device, from this second, until this one
Rate = tuple[int, float, float, float]  # device, from this second on, bytes per second up, and down
LEAST_PERIOD_S = 1e-3  # periods are drawn one after another until the second in question
WINDOW, RATE = ("device", "start_s", "end_s"), ("device", "at_s", "up_bytes_per_s", "down_bytes_per_s")


class Availability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a device of a class can be reached: while all that is set here says so.

    ``share`` of the time, in periods of random length, those in which it can be reached of ``mean_on_s`` on average.
    ``on_s`` out of every ``every_s``, from ``phase_s`` on (None: drawn for each device). ``trace``: a file of windows, or the
    windows. Not before ``joins_s``, nor from ``leaves_s`` on.
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
    """The chances that a plan is lost: on its way down (``before``), ``during`` its training, on its way up (``after``).

    ``somewhere``: at any of the three, all alike; what a plain number means. ``early``: the chance that its device must stop
    training early, after a share of its steps, and sends what it has; nothing is lost.
    """

    shorthand: ClassVar[tuple[str, ...]] = ("somewhere",)

    before: Fraction = 0.0
    during: Fraction = 0.0
    after: Fraction = 0.0
    somewhere: Fraction = 0.0
    early: Fraction = 0.0

    @property
    def chances(self) -> tuple[float, float, float]:
        """Before, during and after."""
        each = self.somewhere / 3
        return self.before + each, self.during + each, self.after + each


class Jitter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much seconds of computing (``compute``) and rates of a device's own link (``links``) differ from plan to plan.

    Each is the standard deviation of the logarithm of a factor whose mean is 1. A plain number means both.
    """

    shorthand: ClassVar[tuple[str, ...]] = ("compute", "links")

    compute: Annotated[float, msgspec.Meta(ge=0, le=3)] = 0.0
    links: Annotated[float, msgspec.Meta(ge=0, le=3)] = 0.0


ALWAYS, NEVER_LOST, STEADY = Availability(), Dropout(), Jitter()


def check_availability(found: Availability, dropout: Dropout, field: str) -> None:
    """Raise ``ValueError`` where what a class declares does not agree with itself. ``field``: of the class."""
    here = f"{field}.availability"
    for name in ("mean_on_s", "on_s", "every_s"):
        if (seconds := getattr(found, name)) is not None and seconds < LEAST_PERIOD_S:
            raise ValueError(f"{here}.{name} is {seconds:g}; it must be at least {LEAST_PERIOD_S:g}")
    if (found.on_s is None) != (found.every_s is None):
        there, missing = ("on_s", "every_s") if found.every_s is None else ("every_s", "on_s")
        raise ValueError(f"{here}.{there} is {getattr(found, there):g} without {missing}; a schedule needs both")
    if found.on_s is not None and found.every_s is not None and found.on_s > found.every_s:
        raise ValueError(f"{here}.on_s is {found.on_s:g}; it must be at most every_s, {found.every_s:g}")
    if found.phase_s is not None and found.every_s is None:
        raise ValueError(f"{here}.phase_s is {found.phase_s:g} without every_s; a schedule needs on_s and every_s")
    if found.leaves_s is not None and found.leaves_s <= found.joins_s:
        raise ValueError(f"{here}.leaves_s is {found.leaves_s:g}; it must be more than joins_s, {found.joins_s:g}")
    if (total := sum(dropout.chances)) > 1 + 1e-9:
        raise ValueError(f"{field}.dropout adds up to {total:g}; all chances together must be at most 1")


def load_trace(found: Availability, field: str, **where: Any) -> Availability:
    """The same, with the windows of a class's devices in place of the file that holds them. ``where``: see ``load_rows``.

    Raises ``ValueError`` in one sentence.
    """
    if found.trace is None:
        return found
    field = f"{field}.availability.trace"
    windows = load_rows(found.trace, head=WINDOW, field=field, **where)
    for device, start_s, end_s in windows:
        if not 0 <= start_s < min(end_s, math.inf):
            text = f"{field} has device {device} from {start_s:g} s to {end_s:g} s"
            raise ValueError(f"{text}; a window begins at 0 or later, and ends later")
    return msgspec.structs.replace(found, trace=windows)


def load_rates(found: str | tuple[Rate, ...] | None, field: str, **where: Any) -> tuple[Rate, ...] | None:
    """The rates of a class's devices in place of the file that holds them. As ``load_trace``."""
    if found is None:
        return None
    field = f"{field}.rates"
    rates = load_rows(found, head=RATE, field=field, **where)
    least, most = LIMITS["bytes_per_s"]
    for device, at_s, up, down in rates:
        if not (0 <= at_s < math.inf and least <= up <= most and least <= down <= most):
            text = f"{field} has device {device} at {at_s:g} s with {up:g} bytes/s up and {down:g} down"
            raise ValueError(f"{text}; times are 0 or later, rates between {least:g} and {most:g}")
    return rates
