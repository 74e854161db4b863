"""Fleets: classes of devices with a count each, the links that they share, the partition hosts and the server.

Devices are numbered from 0, class by class in the order written. Ten thousand devices of five classes are five profiles:
all devices of a class share one object. ``load_fleet`` takes a built-in name (``clusters/fleets``), a path or a mapping.
"""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import msgspec

from .availability import (
    ALWAYS,
    NEVER_LOST,
    STEADY,
    Availability,
    Dropout,
    Jitter,
    Rate,
    check_availability,
    load_rates,
    load_trace,
)
from .profile import DeviceProfile, NonNegative, Positive
from .reading import read_struct
from .units import format_quantity
from .yaml_text import read_yaml

Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(gt=0)]
MOST_DEVICES = 10_000_000
BUILT_IN = Path(__file__).parent / "fleets"


class DeviceClass(DeviceProfile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``count`` devices with one profile.

    Simulated devices run on any worker. A class of real devices names their nodes by ``label_selector``, labels of Ray nodes
    (``{board: rpi4}``), or by ``resource``, a custom Ray resource; each of its devices has a worker of its own there.
    ``join_timeout_s``: how long such a device is awaited before round 1 (None: ``ray.placement_timeout_s``). ``availability``,
    ``dropout`` and ``jitter`` are simulated by the virtual clock; of these, policies see only which devices can be reached.
    ``rates``: a file of rates of a device's link, each from a given time on; a packet keeps the rate at which it starts.
    """

    count: Count = 1
    availability: Availability = ALWAYS
    dropout: Dropout = NEVER_LOST
    jitter: Jitter = STEADY
    rates: str | tuple[Rate, ...] | None = None
    label_selector: dict[str, str] | None = None
    resource: str | None = None
    join_timeout_s: NonNegative | None = None

    @property
    def profile(self) -> DeviceProfile:
        """The profile of each device of the class, as policies see it."""
        return DeviceProfile(**{field: getattr(self, field) for field in DeviceProfile.__struct_fields__})

    @property
    def placed(self) -> bool:
        """Whether its devices are real ones, on nodes of their own."""
        return self.label_selector is not None or self.resource is not None


class SharedLink(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A link that several devices share, such as a Wi-Fi access point: its total capacity, bytes per second."""

    up_bytes_per_s: Positive
    down_bytes_per_s: Positive


class HostProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The partition hosts, which train the server's side of a cut model: their number and figures. Links None: unlimited."""

    count: Count = 1
    flop_per_s: Positive = 100e9
    memory_bytes: Bytes = 8 * 10**9
    up_bytes_per_s: Positive | None = None
    down_bytes_per_s: Positive | None = None


class ServerProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server. Its link (up: from the devices, down: to them) is shared by all devices; None: unlimited.

    ``lost_after_s``: seconds after the loss of a device until its plan is ``lost``.
    """

    flop_per_s: Positive = 100e9
    up_bytes_per_s: Positive | None = None
    down_bytes_per_s: Positive | None = None
    lost_after_s: NonNegative = 0.0


class Fleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All devices of a run, their shared links, hosts and server. ``shared_links``: by the name that classes use."""

    name: str = "fleet"
    description: str = ""
    classes: Annotated[tuple[DeviceClass, ...], msgspec.Meta(min_length=1)]
    shared_links: dict[str, SharedLink] = {}
    hosts: HostProfile = HostProfile()
    server: ServerProfile = ServerProfile()

    @property
    def num_devices(self) -> int:
        """Number of devices of all classes."""
        return sum(device_class.count for device_class in self.classes)

    def profiles(self) -> tuple[DeviceProfile, ...]:
        """[device] profile; devices of a class share one object."""
        return tuple(
            profile for device_class in self.classes for profile in [device_class.profile] * device_class.count
        )

    @property
    def simulates_faults(self) -> bool:
        """Whether any class declares availability, dropouts, jitter or rates."""
        defaults = ALWAYS, NEVER_LOST, STEADY
        return any((each.availability, each.dropout, each.jitter) != defaults or each.rates for each in self.classes)

    def class_of(self, device: int) -> DeviceClass:
        """The class of a device. Raises ``IndexError`` for a number of no device."""
        if not 0 <= device < self.num_devices:
            raise IndexError(f"device {device} of a fleet of {self.num_devices}")
        return self.classes[bisect_right(list(accumulate(device_class.count for device_class in self.classes)), device)]

    def group_of(self, device: int) -> str:
        """The group of workers that may run a device: its own one for a real device, "" (any worker) else."""
        device_class = self.class_of(device)
        return f"device {device} (class {device_class.name})" if device_class.placed else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data in base units, every default written out; ``load_fleet`` of it is an equal fleet."""
        plain: dict[str, Any] = msgspec.to_builtins(self, order="deterministic")
        return plain


def names() -> tuple[str, ...]:
    """Names of the built-in fleets, sorted."""
    return tuple(sorted(path.stem for path in BUILT_IN.glob("*.yaml")))


def load_fleet(source: str | Mapping[str, Any]) -> Fleet:
    """The fleet that ``source`` names (a built-in one, or a path to a YAML file) or describes (a mapping).

    Raises ``ValueError`` in one sentence: which field, its value, what is allowed.
    """
    if isinstance(source, Mapping):
        return _check(read_struct(source, Fleet, "fleet"), Path())
    path = BUILT_IN / f"{source}.yaml" if source in names() else Path(source)
    if not path.is_file():
        raise ValueError(
            f"fleet is {source!r}, neither a file nor a built-in fleet; the built-in ones are: {', '.join(names())}"
        )
    try:
        raw = read_yaml(path)
    except (OSError, ValueError) as error:  # the second: not UTF-8, or not YAML
        raise ValueError(f"fleet {source!r} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"fleet {source!r} holds {type(raw).__name__}; a fleet is a mapping with classes")
    return _check(read_struct({"name": path.stem} | raw, Fleet, "fleet"), path.parent)


def describe(fleet: Fleet) -> list[dict[str, str]]:
    """One row for each class, formatted for people: class, devices, speed, memory, up, down, latency and shared link."""
    return [
        {
            "class": device_class.name,
            "devices": str(device_class.count),
            "speed": format_quantity(device_class.flop_per_s, kind="flop_per_s"),
            "memory": format_quantity(device_class.memory_bytes, kind="bytes"),
            "up": format_quantity(device_class.up_bytes_per_s, kind="bytes_per_s"),
            "down": format_quantity(device_class.down_bytes_per_s, kind="bytes_per_s"),
            "latency": format_quantity(device_class.latency_s, kind="s"),
            "shared link": device_class.shared_link or "",
        }
        for device_class in fleet.classes
    ]


def _check(fleet: Fleet, folder: Path) -> Fleet:
    """The fleet with its traces, read from ``folder``. Raises ``ValueError`` where fields contradict each other."""
    if fleet.num_devices > MOST_DEVICES:
        raise ValueError(f"fleet.classes count {fleet.num_devices} devices; it must be at most {MOST_DEVICES:,} in all")
    seen: set[str] = set()
    classes, first = [], 0
    for position, device_class in enumerate(fleet.classes):
        field = f"fleet.classes[{position}]"
        if not device_class.name or device_class.name in seen:
            raise ValueError(f"{field}.name is {device_class.name!r}; each class needs a name of its own")
        seen.add(device_class.name)
        if device_class.shared_link is not None and device_class.shared_link not in fleet.shared_links:
            declared = ", ".join(fleet.shared_links) or "none"
            raise ValueError(
                f"{field}.shared_link is {device_class.shared_link!r}; the links that fleet.shared_links declares: {declared}"
            )
        if device_class.label_selector is not None and device_class.resource is not None:
            raise ValueError(
                f"{field}.resource is {device_class.resource!r} beside a label_selector; a class is placed by one of them"
            )
        if device_class.join_timeout_s is not None and not device_class.placed:
            raise ValueError(
                f"{field}.join_timeout_s is {device_class.join_timeout_s:g}, but the class is simulated; only real devices "
                "(label_selector, resource) are awaited"
            )
        if device_class.label_selector == {} or device_class.resource == "":
            raise ValueError(
                f"{field}.{'resource' if device_class.resource == '' else 'label_selector'} is empty; "
                "leave it out, or name the nodes"
            )
        check_availability(device_class.availability, device_class.dropout, field)
        where: dict[str, Any] = {"num_devices": fleet.num_devices, "folder": folder}
        where["devices"] = range(first, first + device_class.count)
        traced, rates = (
            load_trace(device_class.availability, field, **where),
            load_rates(device_class.rates, field, **where),
        )
        classes.append(msgspec.structs.replace(device_class, availability=traced, rates=rates))
        first += device_class.count
    return msgspec.structs.replace(fleet, classes=tuple(classes))
