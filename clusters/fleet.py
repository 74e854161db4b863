"""A fleet: classes of devices with a count each, the links that they share, and the hosts and the server behind them.

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
    """``count`` devices of one profile.

    Simulated devices run on any worker. A class of real devices says where they are, by one of: ``label_selector``, labels of
    Ray nodes (``{board: rpi4}``), or ``resource``, a custom Ray resource; each of its devices has a worker of its own there.
    ``join_timeout_s``: how long such a device is awaited before round 1 (None: ``ray.placement_timeout_s``).
    ``availability``, ``dropout`` and ``jitter`` are for the virtual clock; of them, policies see who can be reached.
    ``rates``: a file of what a device's own link carries from when on; a packet keeps the rate at which it sets out.
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
        """What policies see of each device of the class."""
        return DeviceProfile(**{field: getattr(self, field) for field in DeviceProfile.__struct_fields__})

    @property
    def placed(self) -> bool:
        """Whether its devices are on nodes of their own."""
        return self.label_selector is not None or self.resource is not None


class SharedLink(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A link that several devices divide among them, such as one Wi-Fi access point: all of its capacity, bytes per second."""

    up_bytes_per_s: Positive
    down_bytes_per_s: Positive


class HostProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The partition hosts, which train the server's side of a cut model: how many, and what each is. Links None: unlimited."""

    count: Count = 1
    flop_per_s: Positive = 100e9
    memory_bytes: Bytes = 8 * 10**9
    up_bytes_per_s: Positive | None = None
    down_bytes_per_s: Positive | None = None


class ServerProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server. Its link (up: from the devices, down: to them) is shared by all devices; None means unlimited.

    ``lost_after_s``: how long after a device is gone the server gives up its plan.
    """

    flop_per_s: Positive = 100e9
    up_bytes_per_s: Positive | None = None
    down_bytes_per_s: Positive | None = None
    lost_after_s: NonNegative = 0.0


class Fleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All devices of a run, and what is behind them. ``shared_links`` by the name that classes use."""

    name: str = "fleet"
    description: str = ""
    classes: Annotated[tuple[DeviceClass, ...], msgspec.Meta(min_length=1)]
    shared_links: dict[str, SharedLink] = {}
    hosts: HostProfile = HostProfile()
    server: ServerProfile = ServerProfile()

    @property
    def num_devices(self) -> int:
        """Devices of all classes."""
        return sum(kind.count for kind in self.classes)

    def profiles(self) -> tuple[DeviceProfile, ...]:
        """[device] profiles; devices of a class share one object."""
        return tuple(profile for kind in self.classes for profile in [kind.profile] * kind.count)

    @property
    def simulates_faults(self) -> bool:
        """Whether devices of it come and go, drop out, or vary."""
        quiet = ALWAYS, NEVER_LOST, STEADY
        return any((kind.availability, kind.dropout, kind.jitter) != quiet or kind.rates for kind in self.classes)

    def class_of(self, device: int) -> DeviceClass:
        """The class of a device. Raises ``IndexError`` for a number that no device has."""
        if not 0 <= device < self.num_devices:
            raise IndexError(f"device {device} of a fleet of {self.num_devices}")
        return self.classes[bisect_right(list(accumulate(kind.count for kind in self.classes)), device)]

    def group_of(self, device: int) -> str:
        """The group of workers that may run a device: its own one where its class is placed, "" (any worker) else."""
        kind = self.class_of(device)
        return f"device {device} (class {kind.name})" if kind.placed else ""

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
    """One row a class for people to read: class, devices, speed, memory, up, down, latency and shared link."""
    return [
        {
            "class": kind.name,
            "devices": str(kind.count),
            "speed": format_quantity(kind.flop_per_s, kind="flop_per_s"),
            "memory": format_quantity(kind.memory_bytes, kind="bytes"),
            "up": format_quantity(kind.up_bytes_per_s, kind="bytes_per_s"),
            "down": format_quantity(kind.down_bytes_per_s, kind="bytes_per_s"),
            "latency": format_quantity(kind.latency_s, kind="s"),
            "shared link": kind.shared_link or "",
        }
        for kind in fleet.classes
    ]


def _check(fleet: Fleet, folder: Path) -> Fleet:
    """The fleet, if its classes agree with one another, with the traces that it names in ``folder``."""
    if fleet.num_devices > MOST_DEVICES:
        raise ValueError(f"fleet.classes count {fleet.num_devices} devices; it must be at most {MOST_DEVICES:,} in all")
    seen: set[str] = set()
    classes, first = [], 0
    for position, kind in enumerate(fleet.classes):
        field = f"fleet.classes[{position}]"
        if not kind.name or kind.name in seen:
            raise ValueError(f"{field}.name is {kind.name!r}; each class needs a name of its own")
        seen.add(kind.name)
        if kind.shared_link is not None and kind.shared_link not in fleet.shared_links:
            declared = ", ".join(fleet.shared_links) or "none"
            raise ValueError(
                f"{field}.shared_link is {kind.shared_link!r}; the links that fleet.shared_links declares: {declared}"
            )
        if kind.label_selector is not None and kind.resource is not None:
            raise ValueError(
                f"{field}.resource is {kind.resource!r} beside a label_selector; a class is placed by one of them"
            )
        if kind.join_timeout_s is not None and not kind.placed:
            raise ValueError(
                f"{field}.join_timeout_s is {kind.join_timeout_s:g}, but the class is simulated; only real devices "
                "(label_selector, resource) are awaited"
            )
        if kind.label_selector == {} or kind.resource == "":
            raise ValueError(
                f"{field}.{'resource' if kind.resource == '' else 'label_selector'} is empty; leave it out, or say where"
            )
        check_availability(kind.availability, kind.dropout, field)
        where: dict[str, Any] = {"num_devices": fleet.num_devices, "folder": folder}
        where["devices"] = range(first, first + kind.count)
        traced, rates = load_trace(kind.availability, field, **where), load_rates(kind.rates, field, **where)
        classes.append(msgspec.structs.replace(kind, availability=traced, rates=rates))
        first += kind.count
    return msgspec.structs.replace(fleet, classes=tuple(classes))
