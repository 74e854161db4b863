"""Which node of a Ray cluster is which real device of the fleet.

A class of real devices names its nodes by labels, or by a custom resource. A node that matches the labels is one device, and
takes part with all of its processors; where ``ray.cpus`` says how many a device has, it is as many devices as have room. A node
is one device for each unit of the resource. A node that joins again with its address is the device that it was before.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..fleet import Fleet
from .node import Node

_ALONE = 0.501  # of the unit of ``node:ADDRESS`` that Ray gives to every node: only one can have it
_UNIT = 10_000  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class RealDevice:
    """One device of a class that is placed.

    ``name``: for people, and of its group of workers. ``join_timeout_s``: how long it is awaited before round 1, and where
    nothing can go on without it.
    """

    number: int
    name: str
    labels: Mapping[str, str]
    resource: str | None
    join_timeout_s: float

    def wants(self, cpus: float | None = None) -> str:
        """Its node, for people. ``cpus``: as in ``locate``."""
        labels = ", ".join(f"{key}={value}" for key, value in self.labels.items())
        what = f"a free unit of the resource {self.resource}" if self.resource is not None else f"the labels {labels}"
        free = f" and {cpus:g} CPU left" if cpus is not None else "" if self.resource is not None else ", not in use,"
        return f"a node with {what}{free}"


@dataclass(frozen=True)
class Site:
    """The node that is a device, and what the device's worker reserves there."""

    node: str
    address: str
    cpus: float
    resources: Mapping[str, float]

    @property
    def told(self) -> str:
        """The node, for people."""
        return f"node {self.address} ({self.node[:8]})"


def real_devices(fleet: Fleet, *, join_timeout_s: float) -> tuple[RealDevice, ...]:
    """The real devices of a fleet; ``join_timeout_s`` where their class does not say it."""
    found, number = [], 0
    for kind in fleet.classes:
        for device in range(number, number + kind.count) if kind.placed else ():
            timeout_s = join_timeout_s if kind.join_timeout_s is None else kind.join_timeout_s
            found.append(
                RealDevice(device, fleet.group_of(device), kind.label_selector or {}, kind.resource, timeout_s)
            )
        number += kind.count
    return tuple(found)


def locate(
    devices: Iterable[RealDevice],
    nodes: Iterable[Node],
    *,
    cpus: float | None,
    before: Mapping[int, str] | None = None,
    in_use: Mapping[str, int] | None = None,
) -> dict[int, Site]:
    """A node for each device that finds one, by number.

    ``nodes``: with what is left of them, which is taken from. ``cpus``: that a device's worker reserves; None: what its node
    has. ``before``: addresses that devices had. ``in_use``: how many devices each node is already, by its id.
    """
    found: dict[int, Site] = {}
    used = Counter(in_use or {})
    devices, nodes = list(devices), sorted(nodes, key=lambda node: (node.address, node.id))
    for again in (True, False):  # who joins again comes first
        for device in devices:
            fitting = [
                node
                for node in nodes
                if node.matches(device.labels)
                and node.has(_needs(device, node, cpus) | {"CPU": cpus or 0.0})
                and (not again or node.address == (before or {}).get(device.number))
            ]
            if fitting and device.number not in found:
                node = min(fitting, key=lambda node: used[node.id])
                needs = _needs(device, node, cpus)
                share = cpus if cpus is not None else _share(device, node)
                found[device.number] = Site(node.id, node.address, share, needs)
                node.take({"CPU": share} | needs)
                used[node.id] += 1
    return found


def _needs(device: RealDevice, node: Node, cpus: float | None) -> dict[str, float]:
    """What makes a node that device's, beside its processors."""
    if device.resource is not None:
        return {device.resource: 1.0}
    return {} if cpus is not None else {f"node:{node.address}": _ALONE}


def _share(device: RealDevice, node: Node) -> float:
    """Processors of a node for one of the devices that it can still be; none where they are all reserved."""
    count = math.floor(node.left[device.resource]) if device.resource is not None else 1
    return max(0, math.floor(node.left.get("CPU", 0.0) / count * _UNIT)) / _UNIT
