"""Bundles of a cluster's resources, each in a placement group of its own; which one finds no place, and why.

Ray places the bundles of one group together or not at all, also those that a dead node has left without a place. In groups of
their own each has a place as soon as a node has room for it, whatever becomes of the others.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ..units import format_quantity
from ..waiting import waiting
from .node import SLACK, Node
from .nodes import cluster_nodes

GRACE_S = 5.0  # even a bundle that fits takes a moment to be placed
_LOOK_EVERY_S = 0.1
_FIRST_LOOK_S = 0.005  # what fits has its place within a few of these
NODE_ID = "ray.io/node-id"  # a label that Ray gives to every node


@dataclass(frozen=True)
class Request:
    """A bundle that is wanted: resource to amount (``{"CPU": 1, "memory": 2e9}``), and its name, for people."""

    name: str
    resources: Mapping[str, float]


class Reservation:
    """A placement group of one bundle for each request, in ``groups``. They die with the process that makes them."""

    def __init__(
        self, requests: Sequence[Request], *, keep_off: Collection[str] = (), order: Sequence[int] | None = None
    ) -> None:
        """Ask for all. ``keep_off``: ids of nodes that are used only where the others could not hold all bundles.

        ``order``: in which Ray finds them places, by index; None: the largest first, which leaves no gaps where none need be.
        """
        self._requests = list(requests)
        rest = [node for node in cluster_nodes() if node.id not in keep_off]
        self._keep_off = sorted(keep_off) if keep_off and _never(self._requests, rest) is None else []
        selector = {NODE_ID: f"!in({','.join(self._keep_off)})"} if self._keep_off else {}
        ranked = order if order is not None else sorted(range(len(requests)), key=lambda i: -_cpus(requests[i]))
        made = {index: _group(requests[index], selector) for index in ranked}
        self.groups = [made[index] for index in range(len(requests))]

    def wait(self, *, timeout_s: float, enough: Callable[[list[bool]], bool] = all) -> Iterator[str]:
        """Wait for their places; yields what is waited for, from time to time.

        ``timeout_s``: how long an autoscaler may take to make room; with 0, what can never fit is refused at once. ``enough``:
        whether those that have places are, if not all have within a moment. Raises ``ValueError`` that says which bundle cannot
        be placed and why.
        """
        if timeout_s == 0 and enough is all and (problem := _never(self._requests, cluster_nodes())):
            raise ValueError(f"{problem} (ray.placement_timeout_s is 0)")
        began, pause_s = time.monotonic(), _FIRST_LOOK_S

        def are_placed() -> bool:
            nonlocal pause_s
            waited, placed = time.monotonic() - began, self._placed()
            if all(placed) or (waited > GRACE_S and enough(placed)):
                return True
            if waited > max(timeout_s, GRACE_S) and (why := self.explain()):
                raise ValueError(f"{why} (ray.placement_timeout_s is {timeout_s:g})")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_EVERY_S)
            return False

        yield from waiting(are_placed, lambda: (why := self.explain()) and f"waiting for a place: {why}")

    def explain(self) -> str:
        """Which bundle has no place, and why: too much for the nodes there are, or for what others leave; "" where all have."""
        placed = self._placed()
        if all(placed):
            return ""
        missing = [None if there else request for request, there in zip(self._requests, placed, strict=True)]
        allowed = [[node for node in nodes if node.id not in self._keep_off] for nodes in (cluster_nodes(), _free())]
        first = placed.index(False)
        return (
            _never(self._requests, allowed[0])
            or _misfit(missing, allowed[1], each_alone=False)
            or f"{_bundle(self._requests, first)} has not been placed yet"
        )

    def close(self) -> None:
        """Release all."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups = []

    def _placed(self) -> list[bool]:
        return [is_placed(group) for group in self.groups]


def is_placed(group: PlacementGroup) -> bool:
    """Whether the bundle of a group of one has a place now."""
    table: dict[str, Any] = ray.util.placement_group_table(group)
    return bool(table["bundles_to_node_id"].get(0)) and table["state"] == "CREATED"


def _free() -> list[Node]:
    return cluster_nodes(free=True)


def _group(request: Request, selector: Mapping[str, str]) -> PlacementGroup:
    return placement_group([dict(request.resources)], strategy="PACK", bundle_label_selector=[dict(selector)])


def _cpus(request: Request) -> float:
    return request.resources.get("CPU", 0.0)


def _never(requests: list[Request], nodes: list[Node]) -> str | None:
    """The bundle that these nodes could not hold even if nobody else used them; None where one cannot be sure."""
    if problem := _misfit(requests, nodes, each_alone=True):
        return problem
    for name in {name for request in requests for name in request.resources}:
        wanted = sum(request.resources.get(name, 0) for request in requests)
        if wanted > sum(node.left.get(name, 0) for node in nodes) + SLACK:
            return _misfit(requests, [_copy(node) for node in nodes], each_alone=False)
    return None


def _misfit(requests: Sequence[Request | None], nodes: list[Node], *, each_alone: bool) -> str | None:
    """The first bundle that finds no node: each with the cluster to itself, or one after another, the largest first.

    None among them is one that has its place already.
    """
    numbered = [(index, request) for index, request in enumerate(requests) if request is not None]
    if not each_alone:
        numbered.sort(key=lambda each: -_cpus(each[1]))
    for index, request in numbered:
        fitting = [node for node in nodes if node.has(request.resources)]
        if not fitting:
            return f"{_bundle(requests, index)} cannot be placed: {_why(request, nodes, each_alone=each_alone)}"
        if not each_alone:
            fitting[0].take(request.resources)
    return None


def _why(request: Request, nodes: list[Node], *, each_alone: bool) -> str:
    """What the nodes lack that may hold the bundle."""
    if not nodes:
        return "there is no node for it"
    wanted = {name: amount for name, amount in request.resources.items() if amount}
    best = max(nodes, key=lambda node: min(node.left.get(name, 0) / amount for name, amount in wanted.items()))
    has = ", ".join(amount_of(name, best.left.get(name, 0)) for name in request.resources)
    return (
        f"the largest node has {has}" if each_alone else f"the most that is left on a node, after the others, is {has}"
    )


def _bundle(requests: Sequence[Request | None], index: int) -> str:
    """A bundle for people: ``bundle 2 of 3 (worker: 4 CPU, 8 GB memory)``."""
    request = requests[index]
    assert request is not None
    wants = ", ".join(amount_of(name, amount) for name, amount in request.resources.items())
    return f"bundle {index + 1} of {len(requests)} ({request.name}: {wants})"


def amount_of(resource: str, amount: float) -> str:
    """An amount of a resource for people."""
    if resource in ("memory", "object_store_memory"):
        return f"{format_quantity(amount, kind='bytes')} {resource}"
    return f"{amount:g} {resource}"


def _copy(node: Node) -> Node:
    return replace(node, left=dict(node.left))
