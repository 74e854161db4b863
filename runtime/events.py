"""Events: frozen records that the loop yields in order, and that are written as JSON lines. There are no callbacks.

Progress, summary and run folder are consumers of this stream; users add their own by iterating a run.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from ..policies.report import Report


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """An event. ``time_s``: virtual seconds since the start (wall seconds under the wall clock)."""

    time_s: float = 0.0


class RunStarted(Event, frozen=True, kw_only=True):
    """The run begins: what was built from the configuration. ``init``: see ``provenance.describe_init``.

    ``frozen_parameters``: of the ``parameters``, those that the model's author has frozen. ``measured``: measurements on this
    machine that decide settings, see ``configuration.resolution``.
    """

    name: str
    preset: str
    seed: int
    devices: int
    classes: dict[str, int]
    parameters: int
    frozen_parameters: int = 0
    blocks: tuple[str, ...]
    samples: int
    workers: int
    data: dict[str, str] = {}
    init: dict[str, str] = {}
    skipped_files: int = 0
    block_reason: str = ""
    measured: dict[str, Any] = {}


class RoundStarted(Event, frozen=True, kw_only=True):
    """Plans were dispatched on a version: how many, and the number of devices left out by reason."""

    version: int
    plans: int
    left_out: dict[str, int] = {}


class PlanEnded(Event, frozen=True, kw_only=True):
    """A plan has ended. ``fleet_class``: of its device. ``staleness``: versions that had closed since its own."""

    report: Report
    fleet_class: str
    staleness: int = 0


class VersionClosed(Event, frozen=True, kw_only=True):
    """A round is over: updates folded, mean training loss, bytes so far and the wall seconds of this round.

    ``evaluation_bytes``, ``host_bytes``, ``task_bytes``: of evaluation on devices, between the server and partition hosts, and
    between the server and the actor of its task, in both directions; they are not in ``up_bytes`` and ``down_bytes``.
    ``participation``: folded updates by fleet class. ``staleness``: mean over the folded updates, in versions.
    """

    version: int
    folded: int
    participation: dict[str, int] = {}
    loss: float | None
    staleness: float | None = None
    up_bytes: int
    down_bytes: int
    evaluation_bytes: int = 0
    host_bytes: int = 0
    task_bytes: int = 0
    wall_s: float


class Evaluated(Event, frozen=True, kw_only=True):
    """The global model was evaluated.

    ``server``: metrics on the server's test set; ``families``: the same of each family of models. ``devices``: for each
    metric mean, spread (standard deviation), worst and worst_10 (mean over the worst tenth) over the devices' own test shares,
    ``num_devices`` of them; ``num_failed`` more could not evaluate, the first of them because of ``first_error``. ``best``: no
    earlier evaluation of the run was as good. ``stages``: blocks and proxies of the model that was evaluated, where it is not
    the whole global model (``Decision.path``).
    A figure that is not finite is None in events.jsonl, since JSON lacks such numbers.
    """

    version: int
    server: Mapping[str, float | None] = {}
    families: Mapping[str, Mapping[str, float | None]] = {}
    devices: Mapping[str, Mapping[str, float | None]] = {}
    num_devices: int = 0
    num_failed: int = 0
    first_error: str = ""
    best: bool = False
    stages: tuple[str, ...] = ()

    @property
    def figures(self) -> dict[str, float]:
        """One number per metric: the server's if there is one, else the mean over devices."""
        found = self.server or {name: figures["mean"] for name, figures in self.devices.items()}
        return {name: math.nan if value is None else value for name, value in found.items()}


class StudentFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was distilled; figures before and after, on the held-out share of the public set.

    ``accuracy_...``: None where the public labels are not those of the task. ``best_step``: the step whose weights were kept;
    0: those before.
    """

    steps: int
    best_step: int
    loss_before: float | None
    loss_after: float | None
    accuracy_before: float | None = None
    accuracy_after: float | None = None


class TaskEnded(Event, frozen=True, kw_only=True):
    """A task of the server has changed the model of a version that closes.

    ``teachers``: number of updates that taught. ``students``: by family, "" for the global model. ``flops``, ``seconds``: of
    the server, at its declared speed; plans of the next version are sent after them.
    """

    version: int
    task: str
    teachers: int
    students: dict[str, StudentFigures]
    flops: int
    seconds: float


class BlocksMoved(Event, frozen=True, kw_only=True):
    """The effective movement of some blocks over the last versions, from 0 to 1; see ``learning.movement``."""

    version: int
    label: str
    movement: float


class Notice(Event, frozen=True, kw_only=True):
    """Something an operator should know, such as a worker that died and is replaced."""

    text: str


class RunEnded(Event, frozen=True, kw_only=True):
    """The run has ended: why, and the hash of the final model. ``resyncs``: dense models sent to resynchronise links."""

    reason: str
    version: int
    model_hash: str
    up_bytes: int
    down_bytes: int
    evaluation_bytes: int = 0
    host_bytes: int = 0
    task_bytes: int = 0
    up_by_kind: dict[str, int] = {}
    down_by_kind: dict[str, int] = {}
    resyncs: int = 0


AnyEvent = (
    RunStarted | RoundStarted | PlanEnded | VersionClosed | TaskEnded | BlocksMoved | Evaluated | Notice | RunEnded
)


def read_event(line: bytes) -> AnyEvent:
    """An event from its line of JSON, where null in metrics is NaN. Raises ``ValueError`` for a line without an event."""
    try:
        raw = msgspec.json.decode(line, type=dict[str, Any])
        report = raw.get("report")
        metrics = report.get("metrics") if isinstance(report, dict) else None
        if isinstance(metrics, dict):
            metrics.update({name: math.nan for name, value in metrics.items() if value is None})
        return msgspec.convert(raw, AnyEvent)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"it holds no event: {error}") from error


__all__ = [
    "AnyEvent",
    "BlocksMoved",
    "Evaluated",
    "Event",
    "Notice",
    "PlanEnded",
    "RoundStarted",
    "RunEnded",
    "RunStarted",
    "StudentFigures",
    "TaskEnded",
    "VersionClosed",
]
