"""The summary of a run, computed from its events, so that it can be recomputed from events.jsonl.

Only three values are set by the caller: ``wall_s``, and ``status`` and ``reason`` of a run that did not end by itself.
"""

import math
from collections import Counter, deque
from typing import Any

import numpy as np

from ...policies.report import Outcome
from ..events import AnyEvent, Evaluated, Notice, PlanEnded, RunEnded, RunStarted, VersionClosed

# Bounds on what grows with the number of rounds.
_FIRST_NOTICES = 100
_LAST_ROUNDS = 1000


class Summary:
    """Accumulates events; ``to_dict`` may be called at any time."""

    def __init__(self, *, name: str = "", preset: str = "", seed: int | None = None) -> None:
        """No events. ``name``, ``preset`` and ``seed``: used until the run has started."""
        self._name, self._preset, self._seed = name, preset, seed
        self.reset()

    def reset(self) -> None:
        """Drop all events."""
        self.status = "running"
        self.reason = ""
        self.wall_s = 0.0
        self.rounds_wall_s = 0.0
        self._started: RunStarted | None = None
        self._ended: RunEnded | None = None
        self._closed: VersionClosed | None = None
        self._evaluated: Evaluated | None = None
        self._best: Evaluated | None = None
        self._outcomes: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._time_s = 0.0
        self._peak = 0
        self._dispatched: dict[str, Counter[str]] = {}
        self._devices: dict[str, set[int]] = {}
        self._notices: list[str] = []
        self._num_notices = 0
        self._round_walls: deque[float] = deque(maxlen=_LAST_ROUNDS)

    @property
    def time_s(self) -> float:
        """The clock's second of the newest event."""
        return self._time_s

    def note(self, event: AnyEvent) -> None:
        """Add an event."""
        self._time_s = max(self._time_s, event.time_s)
        if isinstance(event, RunStarted):
            self._started = event
        elif isinstance(event, PlanEnded):
            outcome = event.report.outcome.value
            self._outcomes[outcome] += 1
            self._lost[event.report.stage] += outcome == "lost"
            self._dispatched.setdefault(event.fleet_class, Counter())[outcome] += 1
            if outcome == "done":
                self._devices.setdefault(event.fleet_class, set()).add(event.report.plan.device)
            self._peak = max(self._peak, event.report.measured.peak_memory_bytes)
        elif isinstance(event, VersionClosed):
            self._closed = event
            self.rounds_wall_s += event.wall_s
            self._round_walls.append(event.wall_s)
        elif isinstance(event, Evaluated):
            self._evaluated = event
            self._best = event if event.best or self._best is None else self._best
        elif isinstance(event, Notice):
            self._num_notices += 1
            if len(self._notices) < _FIRST_NOTICES:
                self._notices.append(event.text)
        elif isinstance(event, RunEnded):
            self._ended = event
            self.status, self.reason = "finished", event.reason

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in summary.json. A figure that is not finite is None."""
        started, ended, closed = self._started, self._ended, self._closed
        last, best = self._evaluated, self._best
        figures = last.figures if last else {}
        latest = ended or closed
        summary = {
            "name": started.name if started else self._name,
            "preset": started.preset if started else self._preset,
            "seed": started.seed if started else self._seed,
            "status": self.status,
            "reason": self.reason,
            "rounds": closed.version if closed else 0,
            "accuracy": figures.get("accuracy"),
            "loss": figures.get("loss"),
            "best_accuracy": best.figures.get("accuracy") if best else None,
            "best_round": best.version if best else None,
            "virtual_s": self._time_s,
            "wall_s": round(self.wall_s, 3),
            "round_wall_s": round(float(np.median(self._round_walls)), 4) if self._round_walls else None,
            "up_bytes": latest.up_bytes if latest else 0,
            "down_bytes": latest.down_bytes if latest else 0,
            "evaluation_bytes": latest.evaluation_bytes if latest else 0,
            "host_bytes": latest.host_bytes if latest else 0,
            "task_bytes": latest.task_bytes if latest else 0,
            "up_by_kind": ended.up_by_kind if ended else {},
            "down_by_kind": ended.down_by_kind if ended else {},
            "resyncs": ended.resyncs if ended else None,
            "peak_memory_bytes": self._peak,
            "outcomes": {outcome.value: self._outcomes[outcome.value] for outcome in Outcome},
            "lost": dict(sorted((+self._lost).items())),
            "participation": self._participation(),
            "evaluation": {
                "server": last.server if last else {},
                "families": last.families if last else {},
                "devices": last.devices if last else {},
                "num_devices": last.num_devices if last else 0,
                "num_failed": last.num_failed if last else 0,
                "first_error": last.first_error if last else "",
            },
            "workers": started.workers if started else 0,
            "parameters": started.parameters if started else 0,
            "frozen_parameters": started.frozen_parameters if started else 0,
            "data": started.data if started else {},
            "init": started.init if started else {},
            "skipped_files": started.skipped_files if started else 0,
            "notices": list(self._notices),
            "num_notices": self._num_notices,
            "model_hash": ended.model_hash if ended else None,
        }
        finite: dict[str, Any] = _finite(summary)
        return finite

    def _participation(self) -> dict[str, dict[str, Any]]:
        """By fleet class: devices, how many of them delivered at least once, plans and their outcomes."""
        if self._started is None:
            return {}
        return {
            name: {
                "devices": count,
                "delivered": len(self._devices.get(name, ())),
                "plans": sum(self._dispatched.get(name, Counter()).values()),
                "outcomes": dict(self._dispatched.get(name, Counter())),
            }
            for name, count in self._started.classes.items()
        }


def _finite(value: Any) -> Any:
    """``value`` with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
