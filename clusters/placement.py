"""Placement groups that say which bundle does not fit, and why, instead of waiting for ever."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from .units import format_quantity

SLACK = 1e-4  # Ray counts in ten-thousandths, rounded down: 12 bundles of 11.9 / 12 and one of 0.1 are 12, whatever floats say
GRACE_S = 5.0  # even a bundle that fits takes a moment to be placed
Bundle = Mapping[str, float]
Selector = Mapping[str, str]


@dataclass
class _Node:
    """A node of the cluster: what it has (or has left) of each resource, and its labels."""

    left: dict[str, float]
    labels: Mapping[str, str]


def make_placement_group(
    bundles: Sequence[Bundle],
    *,
    strategy: str,
    timeout_s: float,
    label_selectors: Sequence[Selector] | None = None,
    names: Sequence[str] | None = None,
) -> PlacementGroup:
    """Reserve ``bundles`` (resource to amount: ``{"CPU": 1, "memory": 2e9}``), and wait until they are there.

    ``strategy``: Ray's PACK, SPREAD, STRICT_PACK or STRICT_SPREAD. ``timeout_s``: how long an autoscaler may take to make room;
    with 0, what can never fit is refused at once. ``label_selectors``: for each bundle, the node labels it needs ({}: none).
    ``names``: of the bundles, for errors. Raises ``ValueError`` that says which bundle cannot be placed and why; then nothing
    is left reserved.
    """
    selectors = list(label_selectors or [{}] * len(bundles))
    labelled = [_describe(*each) for each in zip(names or ["bundle"] * len(bundles), bundles, selectors, strict=True)]
    if timeout_s == 0 and (problem := _never(bundles, selectors, labelled)):
        raise ValueError(f"{problem} (ray.placement_timeout_s is 0)")
    group = placement_group(
        [dict(bundle) for bundle in bundles], strategy=strategy, bundle_label_selector=[dict(s) for s in selectors]
    )
    deadline_s = time.monotonic() + max(timeout_s, GRACE_S)
    try:
        while not group.wait(1.0):  # in short steps, so that Ctrl-C is heard
            if time.monotonic() > deadline_s:
                raise ValueError(
                    f"{_explain(bundles, selectors, labelled, strategy)} (ray.placement_timeout_s is {timeout_s:g})"
                )
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _never(bundles: Sequence[Bundle], selectors: Sequence[Selector], labelled: list[str]) -> str | None:
    """The bundle that the nodes there are could not hold even if nobody else used them; None where one cannot be sure."""
    if problem := _misfit(bundles, selectors, _nodes(free=False), labelled, each_alone=True):
        return problem
    nodes = _nodes(free=False)
    for name in {name for bundle in bundles for name in bundle}:
        if sum(bundle.get(name, 0) for bundle in bundles) > sum(node.left.get(name, 0) for node in nodes) + SLACK:
            return _misfit(bundles, selectors, nodes, labelled, each_alone=False)
    return None


def _explain(bundles: Sequence[Bundle], selectors: Sequence[Selector], labelled: list[str], strategy: str) -> str:
    """Why the bundles were not placed: too much for the nodes there are, in use by others, or the strategy."""
    return (
        _never(bundles, selectors, labelled)
        or _misfit(bundles, selectors, _nodes(free=True), labelled, each_alone=False)
        or f"{len(bundles)} bundles, from {labelled[0]} on, cannot be placed together by strategy {strategy}"
    )


def _nodes(*, free: bool) -> list[_Node]:
    """The nodes that are alive, with all they have or, when ``free``, with what nobody has reserved."""
    unused = available_resources_per_node() if free else {}
    return [
        _Node(dict(unused.get(node["NodeID"], {}) if free else node["Resources"]), node.get("Labels", {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _misfit(
    bundles: Sequence[Bundle],
    selectors: Sequence[Selector],
    nodes: list[_Node],
    labelled: list[str],
    *,
    each_alone: bool,
) -> str | None:
    """The first bundle that finds no node: each with the cluster to itself, or one after another, the largest first."""
    order = range(len(bundles)) if each_alone else sorted(range(len(bundles)), key=lambda i: -bundles[i].get("CPU", 0))
    for index in order:
        bundle, selector = bundles[index], selectors[index]
        eligible = [
            node for node in nodes if all(_matches(node.labels, key, wanted) for key, wanted in selector.items())
        ]
        fitting = [
            node
            for node in eligible
            if all(node.left.get(name, 0) + SLACK >= amount for name, amount in bundle.items())
        ]
        if not fitting:
            head = f"bundle {index + 1} of {len(bundles)} ({labelled[index]}) cannot be placed: "
            return head + _why(bundle, eligible, each_alone=each_alone)
        if not each_alone:
            for name, amount in bundle.items():
                fitting[0].left[name] -= amount
    return None


def _why(bundle: Bundle, eligible: list[_Node], *, each_alone: bool) -> str:
    """What the nodes that may hold the bundle lack."""
    if not eligible:
        return "no node has these labels"
    best = max(
        eligible, key=lambda node: min(node.left.get(name, 0) / amount for name, amount in bundle.items() if amount)
    )
    has = ", ".join(_amount(name, best.left.get(name, 0)) for name in bundle)
    return (
        f"the largest node has {has}" if each_alone else f"the most that is left on a node, after the others, is {has}"
    )


def _matches(labels: Mapping[str, str], key: str, wanted: str) -> bool:
    """Ray's label selector: ``value``, ``!value``, ``in(a,b)`` or ``!in(a,b)``."""
    negated, inner = wanted.startswith("!"), wanted.removeprefix("!")
    several = re.fullmatch(r"in\((.*)\)", inner)
    allowed = several[1].split(",") if several else [inner]
    return (labels.get(key) in allowed) != negated


def _describe(name: str, bundle: Bundle, selector: Mapping[str, str]) -> str:
    """A bundle for people: ``worker: 4 CPU, 8 GB memory, board=rpi4``."""
    parts = [_amount(resource, amount) for resource, amount in bundle.items()] + [
        f"{k}={v}" for k, v in selector.items()
    ]
    return f"{name}: {', '.join(parts)}"


def _amount(resource: str, amount: float) -> str:
    if resource in ("memory", "object_store_memory"):
        return f"{format_quantity(amount, kind='bytes')} {resource}"
    return f"{amount:g} {resource}"
