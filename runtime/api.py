"""The Python API: ``for event in fedbonsai.run(config): ...``, then ``.summary`` and ``.model()``.

run(config)  ->  Run: an iterator of events
                 inline: the engine in this process
                 ray:    a bundle for each actor, the engine in the server's actor, workers in the other bundles
"""

import copy
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..comms.codec import Array
from ..learning.workload_settings import Initialisation
from ..policies.policy import Policy
from .configuration.config import Config, load_config
from .configuration.convert import convert
from .configuration.policy_checks import check_policy, configured_policy, described
from .configuration.resolution import MachineMeasurements, apply_measurements, workload_settings
from .configuration.user_modules import find_named_modules
from .errors import ClusterError, ConfigError, RunError, ServerDied, UnfitCheckpoint
from .events import AnyEvent, Notice, PlanEnded, RunStarted, VersionClosed
from .execution.resume import Resume, going_on, open_folder
from .execution.save_plan import Recovery, discard
from .execution.session import Session, open_session
from .execution.step import exception
from .reporting.summary import Summary

if TYPE_CHECKING:  # a run on Ray needs no torch in this process
    import torch
    from torch import nn


class Run:
    """One run: an iterator of its events, which can be iterated once.

    The resources of a run are released when it ends, by ``close``, at the end of a ``with`` block, and when it is dropped.

    ``config``: the configuration as it was given, with the policy that acts. ``summary``: the results so far. ``folder``: its
    run folder, if it writes one. ``reports``: the last report of each device that took part.
    """

    def __init__(
        self,
        config: Config,
        *,
        policy: Policy | None = None,
        out: str | Path | None = None,
        resume: Resume = None,
    ) -> None:
        """Check the policy and the folder. Everything else is built when the first event is asked for.

        ``resume``: the folder of a run to resume, or "auto"; see ``runtime.execution.resume``.
        """
        if policy is not None:
            config = msgspec.structs.replace(config, policy=described(policy))
        self._policy = policy if policy is not None else configured_policy(config)
        check_policy(self._policy, config, config.load_fleet())
        named = out if out is not None else config.out
        self.folder, resumes = open_folder(config, resume, target=Path(named) if named is not None else None)
        if self.folder is not None and resumes:
            config = going_on(config, self.folder.path)
        self.config = config
        self.reports: dict[int, PlanEnded] = {}
        self._summary = Summary(name=config.name, preset=config.preset, seed=config.seed)
        self._logged = 0  # events of the run that are in its log so far
        self._leaves, self._begun = threading.Event(), threading.Event()  # shared with the copy below
        try:
            self._recovery = Recovery(config, self.folder, resumes=resumes)
            self._replay_log()
        except BaseException:
            if self.folder is not None:
                self.folder.close() if resumes else self.folder.discard()
            raise
        if resumes:
            self._begun.set()
        self._weights: dict[str, Array] = {}  # as bytes of a safetensors file
        # The generator holds a copy, which shares all attributes: without a reference cycle, a dropped run is closed at once.
        self._events = copy.copy(self)._run()

    def __iter__(self) -> Iterator[AnyEvent]:
        """The run itself: iteration continues where it stopped."""
        return self

    def __next__(self) -> AnyEvent:
        """The next event."""
        return next(self._events)

    def __enter__(self) -> "Run":
        """The run; it is closed at the end of the ``with`` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the run."""
        self.close()

    @property
    def summary(self) -> dict[str, Any]:
        """The results so far; see ``runtime.reporting.summary`` for the keys."""
        return self._summary.to_dict()

    def leave(self) -> bool:
        """End the run as interrupted when the next version has closed, with a checkpoint of that version.

        False if waiting gains nothing: no checkpoints are written, or one of every version, or the run is over.
        """
        settings = self.config.checkpoint
        each = settings.every == 1 and settings.share is None
        if self._recovery.plan is None or each or self._summary.status != "running":
            return False
        self._leaves.set()
        return True

    def close(self) -> None:
        """End the run and release its resources; does nothing if it is over."""
        self._events.close()
        if self._summary.status == "running":  # it has not begun
            self._summary.status = "interrupted"
        self._close_folder()

    def weights(self, which: str = "final", *, family: str = "") -> "dict[str, torch.Tensor]":
        """The tensors of the "final" or the "best" model, when the run is over. ``family``: a name in ``models``.

        Weights of sparse layers (``training.sparsity``) are as evaluation uses them, with zeros in place of those that are left
        out; "final.master" and "best.master" are the dense ones that training continues from.
        Raises ``RuntimeError`` before the end, and ``ValueError`` for a family that the run does not have.
        """
        import safetensors.torch

        if which not in self._weights:
            raise RuntimeError(f"the run has no {which!r} weights yet; iterate it to its end first")
        if family and family not in self.config.models:
            raise ValueError(f"family is {family!r}; the families in models: {', '.join(self.config.models) or 'none'}")
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(self._weights[which].tobytes())
        prefixes = tuple(f"{name}:" for name in self.config.models)
        if not family:
            return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
        return {n.removeprefix(f"{family}:"): tensor for n, tensor in tensors.items() if n.startswith(f"{family}:")}

    def model(self, which: str = "final", *, family: str = "") -> "nn.Module":
        """The "final" or the "best" model in evaluation mode, when the run is over. Raises as ``weights``."""
        from ..learning.workload import Workload

        weights = self.weights(which, family=family)
        config = msgspec.structs.replace(self.config, init=Initialisation())  # its file may be gone
        workload = Workload(workload_settings(config, num_devices=config.load_fleet().num_devices))
        model = workload.family(family).new_model()
        model.load_state_dict(weights)
        return model.eval()

    def _replay_log(self) -> None:
        """Restore summary and reports from the log of a run that is resumed."""
        self._summary.reset()
        self.reports.clear()
        self._logged = 0
        for event in self.folder.log.events() if self.folder is not None else ():
            self._logged += 1
            self._summary.note(event)
            if isinstance(event, PlanEnded):
                self.reports[event.report.plan.device] = event

    def _run(self) -> Generator[AnyEvent, None, None]:
        """Open a session and yield its events; the run folder is left complete, whatever ends the run."""
        started = time.perf_counter() - self._summary.rounds_wall_s
        session: Session | None = None
        died: ServerDied | None = None
        over = settled = answers = False  # settled: all events of the session are in the log
        try:
            while not over:
                try:
                    session = session or (yield from self._open(started, died))
                    step = session.step(self._logged)
                    if step.events:
                        self._begun.set()
                    for event in step.events:
                        self._note(event, started)
                        settled = event is step.events[-1]
                        yield event
                    if step.fault is not None:
                        answers = True
                        raise exception(step.fault)
                    if step.over:
                        self._fetch(session, settled=False)
                except (ServerDied, UnfitCheckpoint) as error:
                    if session is not None:
                        session.close()
                    self._recovery.go_back(error)
                    self._replay_log()
                    session, died = None, error if isinstance(error, ServerDied) else died
                    continue
                over = step.over
                if self._leaves.is_set() and step.events and isinstance(step.events[-1], VersionClosed):
                    raise KeyboardInterrupt
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | GeneratorExit)
            self._summary.status = "interrupted" if interrupted else "failed"
            self._summary.reason = "interrupted" if interrupted else str(error)
            raise
        finally:
            self._summary.wall_s = time.perf_counter() - started
            try:
                if session is not None and not over and (answers or self._summary.status != "failed"):
                    self._fetch(session, settled=settled)
            finally:
                with closing(session) if session is not None else nullcontext():
                    self._close_folder()

    def _open(self, started: float, died: ServerDied | None) -> Generator[AnyEvent, None, Session]:
        """Open a session; yields notices of what is waited for. ``died``: the death of the server that is replaced."""
        opening = open_session(self._settled(), self._policy, self._recovery.plan, replaces=died is not None)
        try:
            while True:
                try:
                    text = next(opening)
                except StopIteration as opened:
                    session: Session = opened.value
                    return session
                notice = Notice(time_s=self._summary.time_s, text=text)
                self._note(notice, started)
                yield notice
        except (ClusterError, ConfigError) as error:
            if died is None:
                raise
            assert self.folder is not None, "only a run with checkpoints goes on"
            text = f"{died.message}, and no other can take its place: {error}; go on with --resume {str(self.folder.path)!r}"
            raise RunError(text, stage="server") from error
        finally:
            opening.close()

    def _close_folder(self) -> None:
        """Write the summary, the last file of a run folder; the folder of a run that has not begun is removed."""
        if not self._begun.is_set():
            discard(self.folder, self._recovery.plan)
        elif self.folder is not None and not self.folder.closed:
            with closing(self.folder):
                self.folder.write_summary(self.summary)

    def _note(self, event: AnyEvent, started: float) -> None:
        """Pass an event to the consumers of every run: summary, folder, last reports."""
        self._summary.wall_s = time.perf_counter() - started
        self._summary.note(event)
        self._logged += 1
        if self.folder is not None:
            if isinstance(event, RunStarted) and event.measured:
                # What a server that began anew was given is not measured again, and stays.
                self.folder.write_measured(self.folder.measured | event.measured)
            self.folder.note(event)
        if isinstance(event, PlanEnded):
            self.reports[event.report.plan.device] = event

    def _settled(self) -> Config:
        """The configuration, with what a resumed run had measured when it began."""
        if self.folder is None:
            return self.config
        return apply_measurements(self.config, convert(self.folder.measured, MachineMeasurements))

    def _fetch(self, session: Session, *, settled: bool) -> None:
        """Fetch the weights; of a run that failed, those of its newest version.

        Of an interrupted run, the checkpoint that it can be resumed from is written first. ``settled``: as in ``_run``.
        """
        summary, interrupted = self._summary.to_dict(), self._summary.status == "interrupted"
        cut_short = interrupted or self._summary.status == "failed"
        try:
            if interrupted and settled:
                session.save(self._logged, timeout_s=20.0)
            masters = ("final.master", "best.master") if self.config.training.sparsity is not None else ()
            for which in ("final", "best", *masters):
                is_best = which.startswith("best")
                rounds = (summary["best_round"] if is_best else None) or summary["rounds"]
                metadata = {"rounds": str(rounds), "model": self.config.model.name, "name": self.config.name}
                # After Ctrl-C the command should end soon, even if the server is in the middle of a long plan.
                self._weights[which] = session.weights(which, metadata, timeout_s=10.0 if cut_short else 120.0)
                if self.folder is not None:
                    self.folder.write_weights(which, self._weights[which])
        except RunError as error:
            if not cut_short:  # else it ends without weights: the server is busy, or has died
                self._summary.status, self._summary.reason = "failed", str(error)
                raise


def run(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    policy: Policy | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | str | None = None,
    preset: str | None = None,
    settings: Sequence[str] = (),
    out: str | Path | None = None,
    resume: Resume = None,
    **overrides: Any,
) -> Run:
    """Start a run. Iterate the result for its events.

    ``config``: a YAML file, a mapping, a ``Config``, or None for the bundled digits. ``policy``: a policy object, or the
    setting ``policy`` as in YAML, in place of the configured chain. ``settings``: ``"a.b=value"`` strings. ``overrides``:
    top-level settings by name (``seed=1, backend="inline", workers=2``). ``out``: run folder; without one (and none
    configured) nothing is written. ``resume``: the folder of a run to resume from its newest checkpoint, or "auto", which
    starts the run if there is none to resume. Raises ``ConfigError`` for a user's mistake, at once if possible, else at the
    first event.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    chosen: Policy | None = None
    if isinstance(policy, str | Mapping | Sequence):
        given["policy"] = policy
    else:
        chosen = policy
    loaded = load_config(config, preset=preset, settings=settings, overrides=given)
    find_named_modules(config, loaded)
    return Run(loaded, policy=chosen, out=out, resume=resume)
