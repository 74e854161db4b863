"""The Python API: ``for event in fedbonsai.run(config): ...``, then ``.summary`` and ``.model()``.

run(config)  ->  Run: an iterator of events
                 inline: the engine in this process
                 ray:    a placement group, the engine in the server's actor, workers in the other bundles
"""

import copy
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import nn

from ..learning.initialisation import Initialisation
from ..learning.workload import Workload
from ..policies.policy import Policy
from ..policies.resolve_policy import make_policy
from .check_policy import check_policy
from .config import Config, load_config
from .describe_policy import describe_policy
from .engine import Engine, workload_settings
from .errors import ConfigError, RunError
from .events import AnyEvent, PlanEnded
from .run_folder import RunFolder
from .service import Fault, Service, Step
from .summary import Summary


class Session(Protocol):
    """Where the engine lives: in process, or behind Ray."""

    def step(self) -> Step:
        """The next batch of events."""
        ...

    def weights(self, which: str, *, timeout_s: float) -> dict[str, torch.Tensor]:
        """Weights by name: "best" or "final". Raises ``RunError`` when they are not there within ``timeout_s``."""
        ...

    def close(self) -> None:
        """Release everything that the run made."""
        ...


class Run:
    """One run: iterate it for its events, once.

    Its end, ``close``, the end of a ``with`` block and dropping it release what it made.

    ``config``: as it was given, with the policy that really acts. ``summary``: what it came to so far. ``folder``: its run
    folder, if it writes one. ``reports``: the last report of each device that took part.
    """

    def __init__(self, config: Config, *, policy: Policy | None = None, out: str | Path | None = None) -> None:
        """Nothing is built until the first event is asked for, but the policy and the folder are checked now."""
        self._policy = policy if policy is not None else _policy(config)
        if policy is not None:
            config = msgspec.structs.replace(config, policy=describe_policy(policy))
        self.config = config
        check_policy(self._policy, config, config.load_fleet())
        target = out if out is not None else config.out
        self.folder = RunFolder(Path(target), config) if target is not None else None
        self.reports: dict[int, PlanEnded] = {}
        self._summary = Summary()
        self._weights: dict[str, dict[str, torch.Tensor]] = {}
        # The generator holds a copy, which shares all that is in here: without a cycle, a run that is dropped ends at once.
        self._events = copy.copy(self)._run()

    def __iter__(self) -> Iterator[AnyEvent]:
        """The events, from where they are."""
        return self

    def __next__(self) -> AnyEvent:
        """The next event."""
        return next(self._events)

    def __enter__(self) -> "Run":
        """For ``with``: the run is closed at its end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the run."""
        self.close()

    @property
    def summary(self) -> dict[str, Any]:
        """What the run has come to so far; see ``runtime.summary`` for the keys."""
        return self._summary.to_dict()

    def close(self) -> None:
        """End the run here, and release what it made; harmless when it is over."""
        self._events.close()
        if self._summary.status == "running":  # it never began
            self._summary.status = "interrupted"
        self._close_folder()

    def weights(self, which: str = "final") -> dict[str, torch.Tensor]:
        """Tensors of the "final" or the "best" model of a run that is over."""
        if which not in self._weights:
            raise RuntimeError(f"the run has no {which!r} weights yet; iterate it to its end first")
        return self._weights[which]

    def model(self, which: str = "final") -> nn.Module:
        """The "final" or the "best" model of a run that is over, in evaluation mode."""
        weights = self.weights(which)
        config = msgspec.structs.replace(self.config, init=Initialisation())  # its file may be gone
        model = Workload(workload_settings(config, num_devices=config.load_fleet().num_devices)).new_model()
        model.load_state_dict(weights)
        return model.eval()

    def _run(self) -> Generator[AnyEvent, None, None]:
        """Open a session, pass its events on, and leave a readable folder whatever happens."""
        started = time.perf_counter()
        session: Session | None = None
        try:
            session = _open(self.config, self._policy)
            over = False
            while not over:
                step = session.step()
                for event in step.events:
                    self._note(event, started)
                    yield event
                if step.fault is not None:
                    raise _exception(step.fault)
                over = step.over
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | GeneratorExit)
            self._summary.status = "interrupted" if interrupted else "failed"
            self._summary.reason = "interrupted" if interrupted else str(error)
            raise
        finally:
            self._summary.wall_s = time.perf_counter() - started
            try:
                if session is not None and self._summary.status != "failed":
                    self._fetch(session)
            finally:
                with closing(session) if session is not None else nullcontext():
                    self._close_folder()

    def _close_folder(self) -> None:
        """Write the summary, the last thing in a run folder."""
        if self.folder is not None and not self.folder.closed:
            with closing(self.folder):
                self.folder.write_summary(self.summary)

    def _note(self, event: AnyEvent, started: float) -> None:
        """Consumers of every run: summary, folder, last reports."""
        self._summary.wall_s = time.perf_counter() - started
        self._summary.note(event)
        if self.folder is not None:
            self.folder.note(event)
        if isinstance(event, PlanEnded):
            self.reports[event.report.plan.device] = event

    def _fetch(self, session: Session) -> None:
        """Bring the weights home."""
        summary, interrupted = self._summary.to_dict(), self._summary.status == "interrupted"
        try:
            for which in ("final", "best"):
                # Whoever presses Ctrl-C wants to leave, even if the server is in the middle of a long plan.
                self._weights[which] = session.weights(which, timeout_s=10.0 if interrupted else 120.0)
                if self.folder is not None:
                    rounds = (summary["best_round"] if which == "best" else None) or summary["rounds"]
                    metadata = {"rounds": str(rounds), "model": self.config.model.name, "name": self.config.name}
                    self.folder.write_weights(which, self._weights[which], metadata=metadata)
        except RunError as error:
            if not interrupted:  # else it ends without weights: the server is busy for long, or gone
                self._summary.status, self._summary.reason = "failed", str(error)
                raise


def run(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    policy: Policy | None = None,
    preset: str | None = None,
    settings: Sequence[str] = (),
    out: str | Path | None = None,
    **overrides: Any,
) -> Run:
    """Start a run: iterate the result for its events.

    ``config``: a YAML file, a mapping, a ``Config``, or None for the bundled digits. ``policy``: a policy object, in place of
    the configured chain. ``settings``: ``"a.b=value"`` strings. ``overrides``: top-level settings by name
    (``seed=1, backend="inline", workers=2``). ``out``: run folder; without one (and none configured) nothing is written.
    Raises ``ConfigError`` for a user's mistake, at once where it can be known, else at the first event.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    return Run(load_config(config, preset=preset, settings=settings, overrides=given), policy=policy, out=out)


class InlineSession:
    """The engine in this process, with one torch thread, as a worker has: the same bits as on Ray."""

    def __init__(self, config: Config, policy: Policy) -> None:
        """Build the engine."""
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._service = Service(Engine(config, policy))
        except BaseException:
            torch.set_num_threads(self._threads)
            raise

    def step(self) -> Step:
        """The next batch of events."""
        return msgspec.msgpack.decode(self._service.step(), type=Step)

    def weights(self, which: str, *, timeout_s: float) -> dict[str, torch.Tensor]:
        """Weights by name, at once."""
        return self._service.weights(which)

    def close(self) -> None:
        """Give the threads back."""
        self._service.close()
        torch.set_num_threads(self._threads)


def _open(config: Config, policy: Policy) -> Session:
    """A session of the configured back end; a user's mistake in what it builds becomes a ``ConfigError``."""
    try:
        if config.backend == "inline":
            return InlineSession(config, policy)
        from .ray_session import RaySession

        return RaySession(config, policy)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _policy(config: Config) -> Policy:
    """The configured chain."""
    try:
        return make_policy(config.policy)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _exception(fault: Fault) -> Exception:
    """A fault as an exception of this process, with its original trace."""
    if fault.kind == "config":
        return ConfigError(fault.text)
    error = RunError(fault.text, device=fault.device, round_=fault.round, stage=fault.stage)
    error.trace = fault.trace
    return error
