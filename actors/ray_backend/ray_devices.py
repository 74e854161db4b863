"""The real devices of a run on Ray: which nodes they are, which of them have gone away, and which have joined (again).

The nodes are looked at once a second; of one that is dead Ray is sure after some 20 s. A node on which no worker can start is
not tried again: where it is mended and joins anew, it is another node to Ray.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

from ...clusters.ray_backend.nodes import Node, cluster_nodes
from ...clusters.ray_backend.real_devices import RealDevice, Site, locate
from .ray_place import ActorPlacement

_LOOK_EVERY_S = 1.0


class RealDevices:
    """``numbers``, ``groups``: of all. ``sites``: of those that are there, by number. ``lost``: went away, until it is read."""

    def __init__(
        self,
        devices: Sequence[RealDevice] = (),
        *,
        cpus: float | None = None,
        nodes: Callable[[], list[Node]] = lambda: cluster_nodes(free=True),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``cpus``: that a worker reserves there; None: what its node has. ``nodes``: with what is left of them."""
        self._devices, self._cpus, self._nodes, self._now = tuple(devices), cpus, nodes, now
        self._before: dict[int, str] = {}  # addresses
        self._refused: set[str] = set()  # ids of nodes
        self._why = {device.name: f"{device.wants(cpus)} has not joined" for device in devices}
        self._since_s = {device.number: now() for device in devices}  # those that are not there
        self._looked_s = now() - _LOOK_EVERY_S
        self.numbers = frozenset(device.number for device in devices)
        self.groups = frozenset(device.name for device in devices)
        self.sites: dict[int, Site] = {}
        self.lost: list[int] = []

    def left_s(self) -> float | None:
        """Seconds until the nodes are to be looked at; None where there are no real devices."""
        return max(0.0, self._looked_s + _LOOK_EVERY_S - self._now()) if self._devices else None

    def look(self) -> tuple[list[ActorPlacement], list[tuple[ActorPlacement, str]]]:
        """Look at the nodes, if it is time: the devices that have joined, and those whose nodes are gone, with a sentence."""
        if (left_s := self.left_s()) is None or left_s > 0:
            return [], []
        self._looked_s = self._now()
        nodes = self._nodes()
        alive = {node.id for node in nodes}
        missing = [device for device in self._devices if device.number not in self.sites]
        gone = [
            device for device in self._devices if device not in missing and self.sites[device.number].node not in alive
        ]
        found = locate(
            missing,
            [node for node in nodes if node.id not in self._refused],
            cpus=self._cpus,
            before=self._before,
            in_use=Counter(site.node for site in self.sites.values()),
        )
        self.sites.update(found)
        self._before.update((number, site.address) for number, site in found.items())
        joined = [_place(device) for device in missing if device.number in found]
        return joined, [(_place(device), f"{self.sites[device.number].told} is gone") for device in gone]

    def forget(self, device: RealDevice, why: str) -> None:
        """The node of a device is gone, or no worker can start there."""
        self._refused.add(self.sites.pop(device.number).node)
        self._why[device.name], self._since_s[device.number] = why, self._now()
        self.lost.append(device.number)

    def why_away(self, group: str) -> str:
        """Why a device is not there, by its group; "" where it is, and for a group of simulated devices."""
        away = any(device.name == group and device.number not in self.sites for device in self._devices)
        return self._why[group] if away else ""

    def why_missing(self) -> str:
        """Why each device is not there that is not, in one sentence."""
        return "; ".join(f"{name}: {why}" for name, why in self._why.items() if self.why_away(name))

    @property
    def awaited(self) -> frozenset[int]:
        """Numbers of those that are not there, for less than the time for which their class is awaited."""
        away = [device for device in self._devices if device.number not in self.sites]
        now = self._now()
        return frozenset(d.number for d in away if now - self._since_s[d.number] < d.join_timeout_s)

    def why_none(self) -> str:
        """Why no device is there, where none is, nor awaited; else ""."""
        return "" if self.sites or self.awaited else self.why_missing()


def _place(device: RealDevice) -> ActorPlacement:
    return ActorPlacement(name=device.name, group=device.name, device=device)
