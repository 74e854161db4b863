"""The nodes of the Ray cluster that this process is connected to, and waiting for them."""

import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node

from .real_devices import RealDevice, Site, locate

# Ray counts resources in ten-thousandths, rounded down: 12 bundles of 11.9 / 12 and one of 0.1 fit in 12, whatever the sum of
# the floats is.
SLACK = 1e-4
FIRST_S, EVERY_S = 20.0, 30.0  # seconds until the first message of ``waiting``, and between later ones
_LOOK_EVERY_S = 0.5


@dataclass
class Node:
    """A node that is alive: the amount that it has (or has left) of each resource, its address and its labels."""

    id: str
    address: str
    left: dict[str, float]
    labels: Mapping[str, str]

    def has(self, resources: Mapping[str, float]) -> bool:
        """Whether these amounts are left."""
        return all(self.left.get(name, 0.0) + SLACK >= amount for name, amount in resources.items())

    def take(self, resources: Mapping[str, float]) -> None:
        """Subtract these amounts from what is left."""
        for name, amount in resources.items():
            self.left[name] = self.left.get(name, 0.0) - amount

    def matches(self, selector: Mapping[str, str]) -> bool:
        """Whether its labels match a label selector of Ray: ``value``, ``!value``, ``in(a,b)`` or ``!in(a,b)`` for each key."""
        return all(_matches(self.labels.get(key), condition) for key, condition in selector.items())


def cluster_nodes(*, free: bool = False) -> list[Node]:
    """The nodes that are alive, with all of their resources or, when ``free``, with those that are not reserved."""
    unused = available_resources_per_node() if free else {}
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            dict(unused.get(node["NodeID"], {}) if free else node["Resources"]),
            node.get("Labels", {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def await_devices(devices: Sequence[RealDevice], *, cpus: float | None) -> Generator[str, None, dict[int, Site]]:
    """The nodes of real devices, when all have joined or their join timeouts have passed; yields messages while waiting.

    ``cpus``: see ``locate``.
    """
    began = time.monotonic()
    sites: dict[int, Site] = {}

    def missing() -> list[RealDevice]:
        return [device for device in devices if device.number not in sites]

    def have_joined() -> bool:
        sites.clear()  # nothing is reserved yet, and a node may have left again
        sites.update(locate(devices, cluster_nodes(free=True), cpus=cpus))
        if all(time.monotonic() - began >= device.join_timeout_s for device in missing()):
            return True
        time.sleep(_LOOK_EVERY_S)
        return False

    yield from waiting(
        have_joined, lambda: f"waiting for {', '.join(f'{d.name}: {d.requirement(cpus)}' for d in missing()[:3])}"
    )
    return sites


def waiting(done: Callable[[], bool], message: Callable[[], str]) -> Iterator[str]:
    """Call ``done``, which pauses by itself, until it returns True; yields ``message()`` from time to time.

    The first message comes after ``FIRST_S`` seconds. One that is "" or equal to the last one is skipped.
    """
    due, last = time.monotonic() + FIRST_S, ""
    while not done():
        if time.monotonic() >= due:
            due = time.monotonic() + EVERY_S
            if (text := message()) not in ("", last):
                last = text
                yield text


def _matches(label: str | None, condition: str) -> bool:
    negated, inner = condition.startswith("!"), condition.removeprefix("!")
    several = re.fullmatch(r"in\((.*)\)", inner)
    allowed = several[1].split(",") if several else [inner]
    return (label in allowed) != negated
