"""The loop: one for synchronous, buffered and asynchronous rounds. It acts; policies decide; consumers watch the events.

    while not stopped:
        view -> policy -> decision -> dispatch each plan
        wait for the clock's next arrival, or the deadline
        fold the update, or count what became of it
        close the version at K folded updates, when no plan of it is outstanding (and none is to come), or at the deadline

``decide`` runs at the start, after every version, and after each outcome that frees a slot. A round is one version. A plan
that arrives after its version closed is ``late``: it is counted, and not folded, unless ``server.staleness`` says what it is
worth; FedBuff and FedAsync are this loop with a policy that keeps devices busy and closes versions at K updates. A version in
which nothing was dispatched yet stays open while plans of earlier ones are out: they free devices for it, and its deadline has
not begun to count.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from types import MappingProxyType
from typing import Any, ClassVar

import msgspec
import numpy as np

from ...actors.lifecycle import PlanLifecycle
from ...actors.messages.messages import Dispatch
from ...actors.messages.plan_message import plan_message
from ...actors.plan_listener import PlanResult
from ...actors.pool import Finished, Pool, Task
from ...actors.server.server import NotFinite, Server
from ...clusters.fleet import Fleet
from ...comms.ledger import Ledger
from ...learning.seeds import derive
from ...learning.spec import CountOrZero
from ...policies.plan import Plan
from ...policies.policy import Policy
from ...policies.report import Outcome, Report
from ...policies.view import View
from ..configuration.config import Config
from ..errors import RunError
from ..events import AnyEvent, Evaluated, Notice, PlanEnded, RoundStarted, RunEnded, VersionClosed
from ..simulation.costs import Costs, share_done
from ..simulation.in_flight import Arrival
from ..simulation.wall_clock import Clock
from .call_policy import call_policy, first_state
from .device_history import DeviceHistory
from .evaluator import Evaluator
from .outcome_counts import OutcomeCounts, fault
from .plan_checks import check_sendable
from .round import Round
from .stopping import Stopping
from .traffic import TrafficRecorder


class Loop:
    """One run's control: which plans are out, what they cost, what came of them."""

    SAVED: ClassVar = {  # by a checkpoint
        "_server": Server,
        "_clock": Clock,
        "_costs": Costs,
        "_evaluator": Evaluator,
        "_ledger": Ledger,
        "_stopping": Stopping,
        "_lifecycle": PlanLifecycle,
        "_seen": DeviceHistory,
        "_tally": OutcomeCounts,
        "_travelled": TrafficRecorder,
        "_policy_state": Any,
        "_in_flight": dict[int, Plan],
        "_busy": dict[int, Plan],
        "_sent": dict[int, Dispatch],
        "_evaluation": dict[str, float],
        "_evaluated": Evaluated | None,
        "_next_id": CountOrZero,
        "_decisions": CountOrZero,
        "_round": Round,
    }
    NOT_SAVED = ("_config", "_fleet", "_policy", "_pool", "_new_plan", "_profiles", "_samples")

    def __init__(
        self,
        config: Config,
        *,
        fleet: Fleet,
        policy: Policy,
        server: Server,
        lifecycle: PlanLifecycle,
        pool: Pool,
        clock: Clock,
        costs: Costs,
        evaluator: Evaluator,
        ledger: Ledger,
        new_plan: Callable[[int, int, int], Plan],
    ) -> None:
        """``new_plan``: the experiment's own plan for (device, version, plans of that version it was sent before)."""
        self._config, self._fleet, self._policy = config, fleet, policy
        self._server, self._lifecycle, self._pool, self._clock, self._costs = server, lifecycle, pool, clock, costs
        self._evaluator, self._ledger, self._new_plan = evaluator, ledger, new_plan
        self._profiles = fleet.profiles()
        self._samples = [server.workload.data.num_samples(device) for device in range(fleet.num_devices)]
        self._policy_state = first_state(policy)
        self._in_flight: dict[int, Plan] = {}  # by plan id
        self._busy: dict[int, Plan] = {}  # by device
        self._sent: dict[int, Dispatch] = {}  # by plan id
        self._evaluation: dict[str, float] = {}
        self._evaluated: Evaluated | None = None
        self._stopping = Stopping(config.stop)
        self._seen, self._tally, self._travelled = DeviceHistory(), OutcomeCounts(), TrafficRecorder(ledger, costs)
        self._next_id = 1
        self._decisions = 0
        self._round = self._open_round()

    def events(self) -> Iterator[AnyEvent]:
        """Run until a stop rule holds; every event of the run but its start.

        Raises ``RunError`` when the run cannot go on. Every plan that was dispatched has come to its one end by then too.
        """
        try:
            reason = yield from self._rounds()
            self._tally.check_delivered(self._version)
        except Exception:
            yield from self._abandon("the run failed")
            raise
        yield from self._abandon("the run ended")
        yield RunEnded(
            time_s=self._clock.time_s,
            reason=reason,
            version=self._version,
            model_hash=self._server.model_hash(),
            up_bytes=self._travelled.total("up"),
            down_bytes=self._travelled.total("down"),
            evaluation_bytes=self._travelled.evaluation,
            host_bytes=self._travelled.hosts,
            up_by_kind=self._ledger.by_kind("up"),
            down_by_kind=self._ledger.by_kind("down"),
            resyncs=self._ledger.messages("down", kind="resync"),
        )

    def _rounds(self) -> Generator[AnyEvent, None, str]:
        """Round after round; why the run ends."""
        every = self._config.evaluation.every
        while True:
            if self._version and self._version % every == 0:  # where a run that is resumed goes on
                yield from self._evaluate()
            if (reason := self._reason()) is not None:
                break
            version = self._version
            while self._version == version:
                yield from self._step()
        evaluated = self._evaluated
        if evaluated is None or evaluated.version != self._version:  # so that the summary speaks of the final model
            yield from self._evaluate()
        return reason

    def resume(self) -> None:
        """All that was saved is in its place: have the pool begin again with what it had not given back."""
        self._round.opened_wall = time.perf_counter()
        for plan_id, sent in self._sent.items():
            journey = self._clock.journeys.get(plan_id)
            if journey is None or journey.finished is None:
                self._submit(sent)

    @property
    def ends(self) -> bool:
        """Whether the version that has just closed is the last, as far as can be known before it is evaluated."""
        return self._reason() is not None

    def _reason(self) -> str | None:
        """Why the run ends with the version that has just closed, or None."""
        evaluated = self._evaluated
        return self._stopping.reason(
            version=self._version,
            time_s=self._clock.time_s,
            num_bytes=self._travelled.both,
            evaluation=evaluated.figures if evaluated and evaluated.version == self._version else None,
        )

    def _step(self) -> Iterator[AnyEvent]:
        """One decision, one arrival, and the version's end if that was it."""
        yield from self._decide()
        if not self._in_flight and (not self._round.complete or self._round.keep_open) and self._wait():
            yield from self._notices()
            return
        if self._round.complete and not (self._round.keep_open and self._in_flight):
            yield from self._close()  # the policy kept it open, and sends nothing more
            return
        if not self._in_flight:
            why = self._round.why_nobody()
            text = f"the policy chose no device while none is in flight, so the run cannot go on{why}"
            raise RunError(text, round_=self._version, stage="decide")
        arrival = self._clock.next(self._round.deadline_s)
        self._note_losses()
        yield from self._notices()
        if arrival is not None:
            yield self._receive(arrival)
            self._tally.check_failures(self._config.max_failures)
        if self._closing(arrival):
            yield from self._close()

    def _wait(self) -> bool:
        """Let time pass until a device may be reached that could not be since the last plan was sent; False: there is none."""
        away = self._clock.unreachable()
        self._round.reached.update(set(range(len(self._profiles))) - away)
        until_s = self._clock.next_reachable_s(away - self._round.reached)
        if until_s == math.inf or until_s > (self._round.deadline_s or math.inf):
            return False
        self._clock.wait(until_s)
        return True

    @property
    def time_s(self) -> float:
        """The clock's second."""
        return self._clock.time_s

    @property
    def _version(self) -> int:
        return self._server.version

    def _open_round(self) -> Round:
        return Round(opened_wall=time.perf_counter())

    def _view(self) -> View:
        """What the policies see now."""
        stop = self._config.stop
        remaining = None if stop.virtual_s is None else max(0.0, stop.virtual_s - self._clock.time_s)
        budget = None if stop.bytes is None else max(0, stop.bytes - self._travelled.both)
        version, plans_of = self._version, self._round.plans_of
        return View(
            time_s=self._clock.time_s,
            version=version,
            seed=derive(self._config.seed, "policy", self._decisions),
            profiles=self._profiles,
            samples=self._samples,
            min_samples=self._server.workload.min_samples,
            hosts=self._fleet.hosts.count,
            unreachable=self._clock.unreachable(),
            in_flight=MappingProxyType(self._busy),
            dispatched=self._round.dispatched,
            last_reports=MappingProxyType(self._seen.reports),
            participation=MappingProxyType(self._seen.participation),
            evaluation=MappingProxyType(self._evaluation),
            remaining_s=remaining,
            remaining_bytes=budget,
            plan_maker=lambda device: self._new_plan(device, version, plans_of[device]),
            estimator=self._costs.estimate,
            **self._lifecycle.view_fields(version),
        )

    def _note_losses(self) -> None:
        """What real devices held that have gone away is not known any more."""
        for device in self._pool.take_lost_devices():
            self._server.lose_link(device)

    def _decide(self) -> Iterator[AnyEvent]:
        """Ask the policies, and dispatch what they decide."""
        self._note_losses()
        decision, self._policy_state = call_policy(self._policy, self._view(), self._policy_state)
        self._decisions += 1
        self._round.decided(decision)
        for plan in decision.plans:
            self._dispatch(plan)
        if decision.plans:
            reasons = Counter(reason.partition(":")[0] for _, reason in decision.left_out)
            yield RoundStarted(
                time_s=self._clock.time_s, version=self._version, plans=len(decision.plans), left_out=dict(reasons)
            )

    def _dispatch(self, wish: Plan) -> None:
        """Send one plan out."""
        plan = msgspec.structs.replace(wish, id=self._next_id)
        try:
            check_sendable(
                plan,
                version=self._version,
                busy=self._busy,
                profiles=self._profiles,
                hosts=self._fleet.hosts.count,
                spec=self._server.workload.spec,
            )
            self._lifecycle.check(plan, self._in_flight.values())
            plan = self._clock.stop_early(plan, self._costs)
            flops, work = self._costs.flops(plan), self._costs.work(plan)
            memory = self._costs.peak_memory_bytes(plan)
        except ValueError as error:
            raise RunError(str(error), device=plan.device, round_=self._version, stage="dispatch") from error
        self._next_id += 1
        sent = self._server.send(plan)
        plan = sent.plan
        self._lifecycle.sent(plan)
        # Of a plan that is lost before it has a result, nothing is worked out.
        wanted = self._clock.dispatch(plan, down_bytes=sent.num_bytes, flops=flops, peak_memory_bytes=memory, work=work)
        control = self._submit(sent) if wanted else len(plan_message(plan))
        self._travelled.sent(sent, control=control)
        self._in_flight[plan.id] = plan
        if wanted:
            self._sent[plan.id] = sent
        self._busy[plan.device] = plan
        self._tally.sent(plan)
        self._round.sent(plan, time_s=self._clock.time_s)

    def _submit(self, sent: Dispatch) -> int:
        """Have the pool work on a plan; the bytes of its message."""
        plan = sent.plan
        return self._pool.submit(
            Task(
                plan=plan,
                packets=sent.packets,
                state=sent.state,
                group=self._fleet.group_of(plan.device),
                host_packets=tuple(message.reference for message in sent.host_messages),
                num_samples=self._samples[plan.device],
                **self._lifecycle.task_fields(plan),
            )
        )

    def _receive(self, arrival: Arrival) -> PlanEnded:
        """A plan has come to its end: fold its update, or count what became of it."""
        finished = arrival.finished
        plan, report = finished.plan, msgspec.structs.replace(finished.report, virtual=arrival.virtual)
        self._in_flight.pop(plan.id)
        self._sent.pop(plan.id, None)
        self._busy.pop(plan.device)
        sound = report.outcome == Outcome.DONE
        self._lifecycle.arrived(PlanResult(plan, finished.stream.up, sound=sound, version=self._version))
        self._travelled.came(plan, arrival)
        behind = self._version - plan.version
        if report.outcome == Outcome.DONE and not self._counts(plan, behind):
            report = msgspec.structs.replace(report, outcome=Outcome.LATE, error="its version had closed")
        if report.outcome == Outcome.DONE:
            report = self._fold(report, finished, behind)
        if report.outcome == Outcome.LOST:  # whether its device holds what it was sent is not known
            self._lifecycle.released(plan)
        else:
            self._lifecycle.ended(plan, report, finished.state)
        self._tally.ended(report)
        if not behind:
            self._round.ended(report)
        if report.outcome == Outcome.DONE:
            self._round.took(report, fleet_class=self._profiles[plan.device].name, behind=behind)
        return self._ended(report, behind=behind)

    def _counts(self, plan: Plan, behind: int) -> bool:
        """Whether an update counts that started so many versions ago; a turn at a shared head is part of its own version."""
        rule = self._config.server.staleness
        return not behind or (rule is not None and rule.counts(behind) and not plan.shares_head)

    def _fold(self, report: Report, finished: Finished, behind: int) -> Report:
        """Fold a sound update; one that is not sound makes the outcome ``rejected``."""
        plan = report.plan
        if plan.objective.kind == "evaluate":  # its metrics are in the report; there is nothing to fold
            return report
        known, update = self._samples[plan.device], finished.update
        rule = self._config.server.staleness
        scale = rule.scale(behind) if rule is not None else 1.0
        problem = ""
        if not isinstance(update, np.ndarray) and plan.part.trained:
            problem = "it came without an update"
        elif not 1 <= report.samples <= known:  # they are its weight
            problem = f"it reports {report.samples} samples; the device has {known}, and at least 1 must be used"
        elif not (share := share_done(report, num_samples=known)) > 0:
            problem = f"it reports {report.steps} steps; a device that stops early makes at least one"
        else:
            try:
                opened = self._server.open(plan, update, host=finished.host_update)
            except Exception as error:  # PacketError, or whatever a codec of the user's raises
                problem = f"{type(error).__name__}: {error}"
        if problem:
            return msgspec.structs.replace(report, outcome=Outcome.REJECTED, stage="fold", error=problem)
        try:
            self._server.fold(plan, opened, weight=report.samples * share, scale=scale)
        except Exception as error:  # a fault of ours: what is half folded must not become a version
            raise RunError.of(error, device=plan.device, round_=plan.version, stage="fold") from error
        return report

    def _ended(self, report: Report, *, behind: int = 0) -> PlanEnded:
        """Note a plan's end, so many versions after its own."""
        self._seen.ended(report)
        fleet_class = self._profiles[report.plan.device].name
        return PlanEnded(time_s=self._clock.time_s, report=report, fleet_class=fleet_class, staleness=behind)

    def _closing(self, arrival: Arrival | None) -> bool:
        """Whether the version closes now."""
        round_ = self._round
        if arrival is None:  # the deadline; it counts from the first plan
            assert round_.dispatched
            return True
        if round_.close_at is not None and self._server.folded >= round_.close_at:
            return True
        return round_.complete and not round_.keep_open

    def _close(self) -> Iterator[AnyEvent]:
        """The version goes up by one, even with nothing folded; but not while no update was ever folded and all have failed."""
        round_, version = self._round, self._version
        folded = self._server.folded
        first = round_.first_fault
        if first is not None and not round_.outstanding and not self._tally.delivered:
            raise fault(f"no device of this round delivered; the first fault: {first.error}", first)
        if round_.trainings and not folded:
            self._check_diverged()
            text = f"round {version} closed with nothing folded: {round_.why_nothing()}"
            yield Notice(time_s=self._clock.time_s, text=text)
        try:
            self._server.close_version(in_flight={plan.version for plan in self._in_flight.values()})
        except NotFinite as error:
            raise RunError(str(error), round_=version, stage="close") from error
        self._round = self._open_round()
        yield VersionClosed(
            time_s=self._clock.time_s,
            version=self._version,
            folded=folded,
            participation=dict(round_.delivered),
            loss=round_.loss,
            staleness=round_.staleness,
            up_bytes=self._travelled.total("up"),
            down_bytes=self._travelled.total("down"),
            evaluation_bytes=self._travelled.evaluation,
            host_bytes=self._travelled.hosts,
            wall_s=self._round.opened_wall - round_.opened_wall,
        )

    def _check_diverged(self) -> None:
        """Raise ``RunError`` where every update holds NaN or infinity because the model itself makes them.

        That is so where its own loss is not finite; without an evaluation, where more than one device was asked.
        """
        round_, version = self._round, self._version
        if not round_.unfit or round_.unfit < round_.trainings:
            return
        evaluated = self._evaluated
        if evaluated is None or evaluated.version != version:
            clock = self._clock
            evaluated = self._evaluator.evaluate(version, time_s=clock.time_s, unreachable=clock.unreachable())
        if evaluated is not None and math.isfinite(evaluated.figures["loss"]):
            return
        if evaluated is None and len(round_.plans_of) < 2:
            return
        loss = f"; its loss is {evaluated.figures['loss']:g}" if evaluated is not None else ""
        rates = (
            f"server.optimiser.learning_rate is {self._config.server.optimiser.learning_rate:g}, "
            f"training.optimiser.learning_rate {self._config.training.optimiser.learning_rate:g}"
        )
        raise RunError(
            f"all {round_.unfit} updates of this round hold NaN or infinity, since the model of version {version} has "
            f"diverged{loss}; {rates}",
            round_=version,
            stage="close",
        )

    def _evaluate(self) -> Iterator[AnyEvent]:
        """Evaluate the current version where the configuration says."""
        clock = self._clock
        evaluated = self._evaluator.evaluate(self._version, time_s=clock.time_s, unreachable=clock.unreachable())
        if evaluated is None:
            return
        self._evaluation = evaluated.figures
        self._evaluated = msgspec.structs.replace(evaluated, best=self._stopping.note(evaluated.figures))
        yield self._evaluated

    def _notices(self) -> Iterator[AnyEvent]:
        """What happened to workers, hosts and links since the last time."""
        for text in (*self._pool.notices(), *self._lifecycle.notices()):
            yield Notice(time_s=self._clock.time_s, text=text)

    def _abandon(self, why: str) -> Iterator[AnyEvent]:
        """The run is over: plans still in flight end as late."""
        yield from self._notices()  # of what has ended it, if that was a fault
        for plan in list(self._in_flight.values()):
            self._pool.cancel(plan.id)
            arrival = self._clock.abandon(plan.id)
            self._travelled.came(plan, arrival)
            self._lifecycle.released(plan)
            report = Report(plan=plan, outcome=Outcome.LATE, error=why)
            yield self._ended(report if arrival is None else msgspec.structs.replace(report, virtual=arrival.virtual))
        for held in (self._in_flight, self._sent, self._busy):
            held.clear()
