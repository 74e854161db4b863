"""Assigns the nodes of a Ray cluster to the real devices of the fleet.

A class of real devices names its nodes by labels, or by a custom resource. A node with the labels is one device with all of
its processors; where ``ray.cpus`` sets the processors of a device, it is as many devices as fit. With a resource, a node is
one device for each unit of it. A node that joins again with the same address is the same device as before.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..fleet import Fleet

if TYPE_CHECKING:
    from .nodes import Node  # which imports Ray

_ALONE = (
    0.501  # of the one unit of ``node:ADDRESS`` that Ray gives to every node, so that one device at most can reserve it
)
_UNIT = 10_000  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class RealDevice:
    """One device of a class of real devices.

    ``name``: for people, and of its group of workers. ``join_timeout_s``: how long it is awaited before round 1, and whenever
    the run cannot continue without it.
    """

    number: int
    name: str
    labels: Mapping[str, str]
    resource: str | None
    join_timeout_s: float

    def requirement(self, cpus: float | None = None) -> str:
        """A description of its node, in messages. ``cpus``: see ``locate``."""
        labels = ", ".join(f"{key}={value}" for key, value in self.labels.items())
        needed = f"a free unit of the resource {self.resource}" if self.resource is not None else f"the labels {labels}"
        free = f" and {cpus:g} CPU left" if cpus is not None else "" if self.resource is not None else ", not in use,"
        return f"a node with {needed}{free}"


@dataclass(frozen=True)
class Site:
    """The node of a device, and the resources that the device's worker reserves there."""

    node: str
    address: str
    cpus: float
    resources: Mapping[str, float]

    @property
    def description(self) -> str:
        """The node, in messages."""
        return f"node {self.address} ({self.node[:8]})"


def real_devices(fleet: Fleet, *, join_timeout_s: float) -> tuple[RealDevice, ...]:
    """The real devices of a fleet; ``join_timeout_s``: default for classes without one."""
    devices, first = [], 0
    for each in fleet.classes:
        for number in range(first, first + each.count) if each.placed else ():
            timeout_s = join_timeout_s if each.join_timeout_s is None else each.join_timeout_s
            name, labels = fleet.group_of(number), each.label_selector or {}
            devices.append(RealDevice(number, name, labels, each.resource, timeout_s))
        first += each.count
    return tuple(devices)


def locate(
    devices: Iterable[RealDevice],
    nodes: Iterable["Node"],
    *,
    cpus: float | None,
    before: Mapping[int, str] | None = None,
    in_use: Mapping[str, int] | None = None,
) -> dict[int, Site]:
    """The site of each device that a node could be assigned to, by device number.

    ``nodes``: with the resources that are left, from which those of the devices are subtracted. ``cpus``: processors that the
    worker of a device reserves; None: those of its node. ``before``: former addresses of devices. ``in_use``: number of devices
    already on each node, by its id.
    """
    sites: dict[int, Site] = {}
    used = Counter(in_use or {})
    devices, nodes = list(devices), sorted(nodes, key=lambda node: (node.address, node.id))
    for again in (True, False):  # devices that join again come first
        for device in devices:
            fitting = [
                node
                for node in nodes
                if node.matches(device.labels)
                and node.has(_needs(device, node, cpus) | {"CPU": cpus or 0.0})
                and (not again or node.address == (before or {}).get(device.number))
            ]
            if fitting and device.number not in sites:
                node = min(fitting, key=lambda node: used[node.id])
                needs = _needs(device, node, cpus)
                share = cpus if cpus is not None else _share(device, node)
                sites[device.number] = Site(node.id, node.address, share, needs)
                node.take({"CPU": share} | needs)
                used[node.id] += 1
    return sites


def _needs(device: RealDevice, node: "Node", cpus: float | None) -> dict[str, float]:
    """Resources that the device reserves on its node, beside processors."""
    if device.resource is not None:
        return {device.resource: 1.0}
    return {} if cpus is not None else {f"node:{node.address}": _ALONE}


def _share(device: RealDevice, node: "Node") -> float:
    """Processors of a node for one of the devices that still fit on it; 0 where all are reserved."""
    count = math.floor(node.left[device.resource]) if device.resource is not None else 1
    return max(0, math.floor(node.left.get("CPU", 0.0) / count * _UNIT)) / _UNIT
