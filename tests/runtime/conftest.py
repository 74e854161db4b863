"""Small real parts for the tests of the runtime: plans of one block, fleets for calculations by hand, a scripted pool."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.pool import Finished, Task
from fedbonsai.clusters.fleet import Fleet, load_fleet
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Training
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.report import Outcome, Report

PART = Part(blocks=("all",), trained=("all",))


def make_plan(plan_id: int, device: int = 0, *, version: int = 0, **changes: Any) -> Plan:
    return Plan(id=plan_id, device=device, version=version, part=PART, training=Training(), seed=1, **changes)


def make_fleet(*rates: float, **extras: Any) -> Fleet:
    """One device for each rate (FLOP/s): 100 B/s in each direction, no latency.

    ``extras``: further fields, ``latency_s`` of every class.
    """
    of_class = ("latency_s", "shared_link", "up_bytes_per_s", "availability", "dropout", "jitter", "rates")
    each = {name: extras.pop(name) for name in of_class if name in extras}
    classes = [
        {"name": f"c{i}", "flop_per_s": rate, "memory_bytes": 10**9, "up_bytes_per_s": 100, "down_bytes_per_s": 100}
        | each
        for i, rate in enumerate(rates)
    ]
    return load_fleet({"classes": classes} | extras)


@dataclass
class ScriptedPool:
    """A pool whose plans return updates of given sizes; a plan with size None fails. Records the calls, in order.

    ``away``: real devices that are absent.
    """

    sizes: dict[int, int | None]
    asked: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    queue: list[Plan] = field(default_factory=list)
    away: set[int] = field(default_factory=set)
    waited: list[float] = field(default_factory=list)
    num_workers = 1

    def submit(self, task: Task) -> int:
        self.queue.append(task.plan)
        return len(plan_message(task.plan))

    def result(self, plan_id: int) -> Finished:
        assert plan_id not in self.asked, "a result is asked for once"
        self.asked.append(plan_id)
        plan = next(plan for plan in self.queue if plan.id == plan_id)
        self.queue.remove(plan)
        size = self.sizes[plan_id]
        report = Report(plan=plan, outcome=Outcome.FAILED if size is None else Outcome.DONE, samples=10)
        update = None if size is None else np.zeros(size, np.uint8)
        return Finished(plan=plan, report=report, update=update, state=None, control_bytes=7)

    def next(self, timeout_s: float | None) -> Finished | None:
        return self.result(self.queue[0].id) if self.queue else None

    def cancel(self, plan_id: int) -> None:
        self.cancelled.append(plan_id)
        self.queue = [plan for plan in self.queue if plan.id != plan_id]

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)

    def unreachable(self) -> frozenset[int]:
        return frozenset(self.away)

    def awaited(self) -> frozenset[int]:
        return frozenset(self.away)

    def take_lost_devices(self) -> list[int]:
        return []

    def notices(self) -> list[str]:
        return []

    def close(self) -> None:
        self.queue.clear()


def digits(**changes: Any) -> dict[str, Any]:
    """The bundled digits on three equal devices in this process, small and quick; ``changes`` are merged by section."""
    base: dict[str, Any] = {
        "name": "test",
        "seed": 3,
        "backend": "inline",
        "fleet": {
            "classes": [
                {
                    "name": "board",
                    "count": 3,
                    "flop_per_s": 1e9,
                    "memory_bytes": 10**9,
                    "up_bytes_per_s": 1e6,
                    "down_bytes_per_s": 1e6,
                }
            ]
        },
        "training": {"batch_size": 64, "optimiser": {"learning_rate": 0.05}},
        "stop": {"rounds": 2},
    }
    for section, value in changes.items():
        merged = isinstance(base.get(section), dict) and isinstance(value, dict) and section != "fleet"
        base[section] = base[section] | value if merged else value
    return base


def of_type(events: Iterable[Any], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


@pytest.fixture(name="make_plan")
def make_plan_fixture():
    """``make_plan(plan_id, device, ...)``."""
    return make_plan


@pytest.fixture(name="make_fleet")
def make_fleet_fixture():
    """``make_fleet(rate, rate, latency_s=...)``."""
    return make_fleet


@pytest.fixture(name="scripted_pool")
def scripted_pool_fixture():
    """``scripted_pool({plan id: bytes of its update, or None})``."""
    return ScriptedPool


@pytest.fixture(name="digits")
def digits_fixture():
    """``digits(stop={"rounds": 1})``: a configuration."""
    return digits


@pytest.fixture(name="of_type")
def of_type_fixture():
    """``of_type(events, PlanEnded)``."""
    return of_type
