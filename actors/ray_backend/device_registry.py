"""The real devices of a run on Ray: which node each one is, and which have left or joined (again).

The nodes are listed once a second; Ray declares a node dead after some 20 s. A node on which no worker can start is not tried
again; if it is repaired and joins anew, it is another node to Ray.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

from ...clusters.ray_backend.nodes import Node, cluster_nodes
from ...clusters.ray_backend.real_devices import RealDevice, Site, locate
from .actor_placement import ActorPlacement

_POLL_S = 1.0


class DeviceRegistry:
    """``numbers``, ``groups``: of all real devices. ``sites``: the nodes of those that have joined, by number."""

    def __init__(
        self,
        devices: Sequence[RealDevice] = (),
        *,
        cpus: float | None = None,
        nodes: Callable[[], list[Node]] = lambda: cluster_nodes(free=True),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``cpus``: that a worker reserves on its node; None: all. ``nodes``: lists the nodes with their free resources."""
        self._devices, self._cpus, self._nodes, self._now = tuple(devices), cpus, nodes, now
        self._addresses: dict[int, str] = {}  # of nodes that devices had
        self._excluded: set[str] = set()  # ids of nodes that have left, or on which no worker could start
        # The newest reason of each.
        self._absences = {device.name: f"{device.requirement(cpus)} has not joined" for device in devices}
        self._absent_since_s = {device.number: now() for device in devices}
        self._polled_s = now() - _POLL_S
        # All, since in a resumed run devices have links from before, and their new workers hold nothing.
        self._lost = [device.number for device in devices]
        self.numbers = frozenset(device.number for device in devices)
        self.groups = frozenset(device.name for device in devices)
        self.sites: dict[int, Site] = {}

    def left_s(self) -> float | None:
        """Seconds until the next ``poll``; None if there are no real devices."""
        return max(0.0, self._polled_s + _POLL_S - self._now()) if self._devices else None

    def poll(self) -> tuple[list[ActorPlacement], list[tuple[ActorPlacement, str]]]:
        """List the nodes, once a second. Placements of devices that have joined, and of those whose nodes are gone, with why.

        A device whose node is gone stays in ``sites`` until ``remove``.
        """
        if (left_s := self.left_s()) is None or left_s > 0:
            return [], []
        self._polled_s = self._now()
        nodes = self._nodes()
        alive = {node.id for node in nodes}
        absent = self._absent()
        gone = [
            device for device in self._devices if device not in absent and self.sites[device.number].node not in alive
        ]
        located = locate(
            absent,
            [node for node in nodes if node.id not in self._excluded],
            cpus=self._cpus,
            before=self._addresses,
            in_use=Counter(site.node for site in self.sites.values()),
        )
        self.sites.update(located)
        self._addresses.update((number, site.address) for number, site in located.items())
        joined = [_placement(device) for device in absent if device.number in located]
        return joined, [(_placement(device), f"{self.sites[device.number].description} is gone") for device in gone]

    def remove(self, device: RealDevice, reason: str) -> None:
        """The node of a device is gone, or no worker can start on it."""
        self._excluded.add(self.sites.pop(device.number).node)
        self._absences[device.name], self._absent_since_s[device.number] = reason, self._now()
        self._lost.append(device.number)

    def restarted(self, device: RealDevice) -> None:
        """The worker of a device was replaced on its node: what it held is gone."""
        self._lost.append(device.number)

    def take_lost(self) -> list[int]:
        """Numbers of the devices whose workers, and what these held, are gone since the last call; at first of all."""
        lost, self._lost = self._lost, []
        return lost

    def absence(self, group: str) -> str:
        """Why the device of a group is absent; "" if it has joined, and for the group of simulated devices."""
        return self._absences[group] if any(device.name == group for device in self._absent()) else ""

    def absences(self) -> str:
        """Why each absent device is absent, in one sentence."""
        return "; ".join(f"{name}: {reason}" for name, reason in self._absences.items() if self.absence(name))

    @property
    def awaited(self) -> frozenset[int]:
        """Numbers of the devices that have been absent for less than the ``join_timeout_s`` of their class."""
        now = self._now()
        return frozenset(
            device.number
            for device in self._absent()
            if now - self._absent_since_s[device.number] < device.join_timeout_s
        )

    def no_device_reset(self) -> str:
        """Why no device is left, if none has joined and none is awaited; else ""."""
        return "" if self.sites or self.awaited else self.absences()

    def _absent(self) -> list[RealDevice]:
        return [device for device in self._devices if device.number not in self.sites]


def _placement(device: RealDevice) -> ActorPlacement:
    return ActorPlacement(name=f"worker of {device.name}", group=device.name, device=device)
