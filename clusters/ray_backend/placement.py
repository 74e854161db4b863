"""Reserves bundles of a cluster's resources, each in a placement group of its own, and explains why one cannot be placed.

Ray places the bundles of one group together or not at all, also those that have lost their node. In groups of their own each
bundle is placed as soon as a node has room for it, independently of the others.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ..units import format_quantity
from .nodes import SLACK, Node, cluster_nodes, waiting

GRACE_S = 5.0  # even a bundle that fits takes a moment to be placed
_LOOK_EVERY_S = 0.1
_FIRST_LOOK_S = 0.005  # bundles that fit are placed within a few of these
NODE_ID = "ray.io/node-id"  # a label that Ray gives to every node


@dataclass(frozen=True)
class Request:
    """A requested bundle: amounts by resource (``{"CPU": 1, "memory": 2e9}``), and its name, for people."""

    name: str
    resources: Mapping[str, float]


class Reservation:
    """A placement group of one bundle for each request, in ``groups``. They end with the process that created them."""

    def __init__(
        self, requests: Sequence[Request], *, keep_off: Collection[str] = (), order: Sequence[int] | None = None
    ) -> None:
        """Request all bundles. ``keep_off``: ids of nodes that are used only where the others could not hold all bundles.

        ``order``: of the requests to Ray, by index; None: the largest first, which avoids gaps.
        """
        self._requests = list(requests)
        rest = [node for node in cluster_nodes() if node.id not in keep_off]
        self._keep_off = sorted(keep_off) if keep_off and _never(self._requests, rest) is None else []
        selector = {NODE_ID: f"!in({','.join(self._keep_off)})"} if self._keep_off else {}
        ranked = order if order is not None else sorted(range(len(requests)), key=lambda i: -_cpus(requests[i]))
        made = {index: _group(requests[index], selector) for index in ranked}
        self.groups = [made[index] for index in range(len(requests))]

    def wait(self, *, timeout_s: float, enough: Callable[[list[bool]], bool] = all) -> Iterator[str]:
        """Wait until the bundles are placed; yields messages while waiting.

        ``timeout_s``: how long an autoscaler may take to make room; with 0, bundles that can never fit are refused immediately.
        ``enough``: whether the bundles that are placed suffice, where not all are after ``GRACE_S``. Raises ``ValueError`` that
        says which bundle cannot be placed and why.
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
        """Which bundle is not placed, and why: too large for the nodes, or for what others leave; "" where all are placed."""
        placed = self._placed()
        if all(placed):
            return ""
        missing = [None if done else request for request, done in zip(self._requests, placed, strict=True)]
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
    """Whether the bundle of a group of one bundle is placed now."""
    table: dict[str, Any] = ray.util.placement_group_table(group)
    return bool(table["bundles_to_node_id"].get(0)) and table["state"] == "CREATED"


def _free() -> list[Node]:
    return cluster_nodes(free=True)


def _group(request: Request, selector: Mapping[str, str]) -> PlacementGroup:
    return placement_group([dict(request.resources)], strategy="PACK", bundle_label_selector=[dict(selector)])


def _cpus(request: Request) -> float:
    return request.resources.get("CPU", 0.0)


def _never(requests: list[Request], nodes: list[Node]) -> str | None:
    """The bundle that these nodes could not hold even if they were unused; None where that is not certain."""
    if problem := _misfit(requests, nodes, each_alone=True):
        return problem
    for name in {name for request in requests for name in request.resources}:
        requested = sum(request.resources.get(name, 0) for request in requests)
        if requested > sum(node.left.get(name, 0) for node in nodes) + SLACK:
            return _misfit(requests, [_copy(node) for node in nodes], each_alone=False)
    return None


def _misfit(requests: Sequence[Request | None], nodes: list[Node], *, each_alone: bool) -> str | None:
    """Why the first bundle without a node has none: each bundle alone in the cluster, or one after another, the largest first.

    A request that is None has been placed already.
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
    """What the best node has of the resources of the bundle."""
    if not nodes:
        return "there is no node for it"
    requested = {name: amount for name, amount in request.resources.items() if amount}
    best = max(nodes, key=lambda node: min(node.left.get(name, 0) / amount for name, amount in requested.items()))
    has = ", ".join(amount_of(name, best.left.get(name, 0)) for name in request.resources)
    return (
        f"the largest node has {has}" if each_alone else f"the most that is left on a node, after the others, is {has}"
    )


def _bundle(requests: Sequence[Request | None], index: int) -> str:
    """A bundle for people: ``bundle 2 of 3 (worker: 4 CPU, 8 GB memory)``."""
    request = requests[index]
    assert request is not None
    amounts = ", ".join(amount_of(name, amount) for name, amount in request.resources.items())
    return f"bundle {index + 1} of {len(requests)} ({request.name}: {amounts})"


def amount_of(resource: str, amount: float) -> str:
    """An amount of a resource for people."""
    if resource in ("memory", "object_store_memory"):
        return f"{format_quantity(amount, kind='bytes')} {resource}"
    return f"{amount:g} {resource}"


def _copy(node: Node) -> Node:
    return replace(node, left=dict(node.left))
