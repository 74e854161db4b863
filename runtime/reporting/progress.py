"""Progress of a run: a bar on a terminal, plain lines in a log, and a table of the devices at the end."""

import math
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ...policies.report import Report
from ..configuration.config import Config
from ..events import (
    AnyEvent,
    BlocksMoved,
    Evaluated,
    Notice,
    PlanEnded,
    RunEnded,
    RunStarted,
    StudentFigures,
    TaskEnded,
    VersionClosed,
)

_LINE_EVERY_S = 0.5  # at least, between lines of a log
_COLUMNS = (
    "device",
    "class",
    "model",
    "outcome",
    "samples",
    "loss",
    "down s",
    "compute s",
    "up s",
    "total s",
    "up",
    "memory",
)


class Progress:
    """Shows events. ``quiet``: print to standard error, since standard output is for results."""

    def __init__(self, config: Config, *, quiet: bool) -> None:
        """Choose a bar or lines."""
        # Names and errors are printed literally: brackets in them are not markup, and ":1:" is not an emoji.
        self._console = Console(stderr=quiet, highlight=False, markup=False, emoji=False)
        if not self._console.is_terminal:
            self._console.width = 200  # a log has no width: do not wrap tables
        self._rounds = config.stop.rounds
        self._bar: Bar | None = None
        self._task: Any = None
        self._figures = self._text = ""
        self._of_tasks: list[str] = []  # what tasks tell of the version that closes
        self._closed: VersionClosed | None = None
        self._last_line = 0.0
        self._skipped = ""  # the newest line, if it was not printed

    def __enter__(self) -> "Progress":
        """Show the bar, if there is a terminal."""
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("round"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("run", total=self._rounds, text="starting")
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: AnyEvent) -> None:
        """Show an event."""
        if isinstance(event, RunStarted):
            frozen = f" ({event.frozen_parameters:,} of them frozen)" if event.frozen_parameters else ""
            self._console.print(
                f"{event.name}: {event.preset} on {event.devices} devices ({len(event.classes)} classes), "
                f"{event.parameters:,} parameters{frozen}, {event.samples:,} samples, {event.workers} workers"
            )
            if event.skipped_files:
                self._console.print(f"{event.skipped_files} corrupt files were skipped")
            if event.block_reason:
                self._console.print(f"the model is kept in one block: {event.block_reason}")
        elif isinstance(event, Evaluated):
            figures = ", ".join(f"{name} {value:.4f}" for name, value in event.figures.items())
            self._figures = "; ".join(part for part in (self._figures, figures) if part)
            if event.num_failed:
                self._console.print(
                    f"version {event.version}: {event.num_failed} of {event.num_failed + event.num_devices} devices could not "
                    f"evaluate it; the first: {event.first_error}"
                )
        elif isinstance(event, TaskEnded):
            for family, student in event.students.items():
                self._of_tasks.append(_student_text(family, student, event.teachers))
        elif isinstance(event, BlocksMoved):
            self._of_tasks.append(f"{event.label}: movement {event.movement:.2f}")
        elif isinstance(event, Notice):
            self._console.print(event.text)
        elif isinstance(event, PlanEnded) and event.report.error and event.report.outcome.value != "late":
            report = event.report
            where = f"device {report.plan.device}, round {report.plan.version}"
            where += f", stage {report.stage}" if report.stage else ""
            self._console.print(f"{where}: {report.outcome.value}: {report.error}")
        if isinstance(event, VersionClosed):
            if self._closed is not None:
                self._round(self._closed)
            self._closed = event
            self._figures, self._of_tasks = "; ".join(self._of_tasks), []
            bytes_ = bytes_text(
                event.up_bytes, event.down_bytes, event.evaluation_bytes, event.host_bytes, event.task_bytes
            )
            self._text = f"{bytes_}, {event.time_s:.1f} s simulated"
            if event.loss is not None:
                self._text = f"train loss {event.loss:.4f}, {self._text}"
        # A round is shown once: with its evaluation, or, without one, at the next event.
        elif self._closed is not None:
            self._round(self._closed)
            self._closed = None
        if isinstance(event, RunEnded) and self._skipped:
            self._console.print(self._skipped, soft_wrap=True)

    def finish(self, summary: Mapping[str, Any], reports: Mapping[int, PlanEnded], *, folder: Path | None) -> None:
        """Print the table of the devices, and the results of the run."""
        self._console.print(device_table(reports))
        figures = [f"{summary['rounds']} rounds"]
        for name in ("accuracy", "loss"):
            if summary[name] is not None:
                figures.append(f"{name} {summary[name]:.4f}")
        figures.append(f"{summary['virtual_s']:.1f} s simulated, {summary['wall_s']:.1f} s here")
        figures.append(bytes_text(*(summary[f"{name}_bytes"] for name in ("up", "down", "evaluation", "host", "task"))))
        self._console.print("; ".join(figures) + f" ({summary['reason']})")
        if folder is not None:
            self._console.print(f"run folder: {folder}", soft_wrap=True)

    def _round(self, closed: VersionClosed) -> None:
        """Advance the bar, or print a line (the first, the last, and at most two a second)."""
        text = ", ".join(part for part in (self._figures, self._text) if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=closed.version, text=text)
            return
        line, now = f"round {closed.version}/{self._rounds}: {text}", time.monotonic()
        due = now - self._last_line >= _LINE_EVERY_S or closed.version == 1
        self._skipped = "" if due else line
        if due:
            self._last_line = now
            self._console.print(line, soft_wrap=True)


def _student_text(family: str, student: StudentFigures, teachers: int) -> str:
    """What distillation did to one model."""
    if student.accuracy_after is not None and student.accuracy_before is not None:
        figures = f"accuracy {student.accuracy_before:.4f} to {student.accuracy_after:.4f}"
    else:
        before, after = (math.nan if loss is None else loss for loss in (student.loss_before, student.loss_after))
        figures = f"loss {before:.4f} to {after:.4f}"
    name = f"{family} " if family else ""
    return f"{name}distilled from {teachers}: public {figures}"


def device_table(reports: Mapping[int, PlanEnded], *, most: int = 20) -> Table:
    """The last plan of each device: simulated seconds, bytes and memory; at most ``most`` devices, slowest first."""
    table = Table(title="last plan of each device", title_justify="left", box=None, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in ("class", "model", "outcome") else "right")
    ordered = sorted(reports.values(), key=lambda e: -e.report.virtual.seconds)
    explained = any(_is_partial(event.report) for event in ordered)
    if explained:
        table.add_column("why")  # the one column that may wrap
    common = set.intersection(*(set(event.report.plan.reasons) for event in ordered)) if ordered else set()
    for event in ordered[:most]:
        report, cost, whole = event.report, event.report.virtual, event.report.plan.whole_steps
        table.add_row(
            str(report.plan.device),
            event.fleet_class,
            _model_text(report),
            report.outcome.value + (f" ({report.steps} of {whole} steps)" if whole and report.steps else ""),
            str(report.samples),
            "" if report.loss is None else f"{report.loss:.4f}",
            *(f"{seconds:.2f}" for seconds in (cost.down_s, cost.compute_s, cost.up_s, cost.seconds)),
            size(cost.up_bytes),
            size(cost.peak_memory_bytes),
            *([_why(report, common)] if explained else []),
        )
    if len(ordered) > most:
        table.caption = f"and {len(ordered) - most} more"
    return table


def _is_partial(report: Report) -> bool:
    """Whether a device holds less than the whole model."""
    return report.plan.part.width < 1 or report.plan.split is not None


def _why(report: Report, common: Set[str]) -> str:
    """The reasons of a plan, without that of the selection, which is the first, and those ``common`` to all plans.

    Where none is left, all but the first.
    """
    reasons = report.plan.reasons[1:] or report.plan.reasons
    return "; ".join([reason for reason in reasons if reason not in common] or reasons)


def _model_text(report: Report) -> str:
    """The part of the model that a device holds: its family, width, blocks and parameters."""
    part, split = report.plan.part, report.plan.split
    names = [part.model] if part.model else []
    names += [f"width {part.width:.3g}"] if part.width < 1 else []
    names += [f"to {split.cut}"] if split is not None else []
    names += [count(report.virtual.parameters)] if report.virtual.parameters else []
    return ", ".join(names)


def count(number: int) -> str:
    """A number of parameters as text."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)


def bytes_text(up: int, down: int, evaluation: int, host: int, task: int = 0) -> str:
    """Transferred bytes as text: those of training, then those that are counted separately."""
    separate = [f"{size(evaluation)} for evaluation"] if evaluation else []
    separate += [f"{size(host)} between server and hosts"] if host else []
    separate += [f"{size(task)} between server and its task"] if task else []
    return f"{size(up)} up, {size(down)} down" + (f" (and {', '.join(separate)})" if separate else "")


def size(num_bytes: float) -> str:
    """Bytes as text, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
