"""A node of a Ray cluster, as plain data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

SLACK = 1e-4  # Ray counts in ten-thousandths, rounded down: 12 bundles of 11.9 / 12 and one of 0.1 are 12, whatever floats say


@dataclass
class Node:
    """A node that is alive: what it has (or has left) of each resource, its address and its labels."""

    id: str
    address: str
    left: dict[str, float]
    labels: Mapping[str, str]

    def has(self, resources: Mapping[str, float]) -> bool:
        """Whether so much is left of each of these resources."""
        return all(self.left.get(name, 0.0) + SLACK >= amount for name, amount in resources.items())

    def take(self, resources: Mapping[str, float]) -> None:
        """Leave so much less."""
        for name, amount in resources.items():
            self.left[name] = self.left.get(name, 0.0) - amount

    def matches(self, selector: Mapping[str, str]) -> bool:
        """Whether its labels are as Ray's label selector says: ``value``, ``!value``, ``in(a,b)`` or ``!in(a,b)`` for a key."""
        return all(_matches(self.labels.get(key), wanted) for key, wanted in selector.items())


def _matches(label: str | None, wanted: str) -> bool:
    negated, inner = wanted.startswith("!"), wanted.removeprefix("!")
    several = re.fullmatch(r"in\((.*)\)", inner)
    allowed = several[1].split(",") if several else [inner]
    return (label in allowed) != negated
