"""The loop of rounds, one for synchronous, buffered and asynchronous training.

    while not stopped:
        view -> policy -> decision -> dispatch each plan
        wait for the clock's next arrival, or the deadline
        fold the update, or count the plan's outcome
        close the version at K folded updates, when none of its plans is outstanding (nor to come), or at the deadline

``decide`` is called at the start, after every version, and after every outcome. A round is one version. A plan that arrives
after its version closed is ``late``: it is counted and not folded, unless ``server.staleness`` gives it a weight. FedBuff and
FedAsync are this loop with a policy that keeps devices busy and closes versions at K updates. A version in which nothing was
dispatched yet stays open while plans of earlier ones are in flight: these free devices for it, and its deadline has not begun
to count.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import msgspec

from ...actors.lifecycle import PlanLifecycle
from ...actors.messages.messages import Dispatch
from ...actors.messages.plan_message import plan_message
from ...actors.plan_listener import PlanResult
from ...actors.pool import Pool, Task
from ...actors.server.server import NotFinite, Server
from ...clusters.fleet import Fleet
from ...comms.ledger import Ledger
from ...learning.parts.part import Part
from ...learning.seeds import derive
from ...learning.spec import CountOrZero
from ...policies.plan import Plan
from ...policies.policy import Policy
from ...policies.report import Outcome, Report
from ...policies.view import View
from ..configuration.config import Config
from ..errors import RunError
from ..events import AnyEvent, Evaluated, Notice, PlanEnded, RoundStarted, RunEnded, TaskEnded, VersionClosed
from ..simulation.costs import Costs
from ..simulation.in_flight import Arrival
from ..simulation.wall_clock import Clock
from .call_policy import call_policy, check_sendable, first_state
from .closing import check_diverged, check_first_fault, must_close
from .evaluator import Evaluator
from .folding import fold_update, late
from .round import Round
from .run_history import DeviceHistory, OutcomeCounts
from .stopping import Stopping
from .tasks.server_tasks import ServerTasks
from .traffic import TrafficRecorder


class Loop:
    """The control of one run: the plans in flight, and the steps that dispatch, fold, close and evaluate."""

    SAVED: ClassVar = {  # in a checkpoint
        "_server": Server,
        "_clock": Clock,
        "_costs": Costs,
        "_evaluator": Evaluator,
        "_ledger": Ledger,
        "_stopping": Stopping,
        "_lifecycle": PlanLifecycle,
        "_device_history": DeviceHistory,
        "_outcome_counts": OutcomeCounts,
        "_traffic": TrafficRecorder,
        "_tasks": ServerTasks,
        "_policy_state": Any,
        "_in_flight": dict[int, Plan],
        "_busy": dict[int, Plan],
        "_sent": dict[int, Dispatch],
        "_evaluation": dict[str, float],
        "_evaluated": Evaluated | None,
        "_next_id": CountOrZero,
        "_decisions": CountOrZero,
        "_round": Round,
        "_path": Part | None,
    }
    NOT_SAVED = ("_config", "_fleet", "_policy", "_pool", "_new_plan", "_profiles", "_samples", "_statistics")

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
        tasks: ServerTasks,
        new_plan: Callable[[int, int, int], Plan],
    ) -> None:
        """``new_plan``: the experiment's default plan for (device, version, number of its earlier plans of that version)."""
        self._config, self._fleet, self._policy = config, fleet, policy
        self._server, self._lifecycle, self._pool, self._clock, self._costs = server, lifecycle, pool, clock, costs
        self._evaluator, self._ledger, self._tasks, self._new_plan = evaluator, ledger, tasks, new_plan
        self._profiles = fleet.profiles()
        spec = server.workload.spec
        self._statistics = frozenset(
            block.name for block in spec.blocks if any(t.role == "statistic" and not t.frozen for t in block.tensors)
        )
        self._samples = [server.workload.data.num_samples(device) for device in range(fleet.num_devices)]
        self._policy_state = first_state(policy)
        self._in_flight: dict[int, Plan] = {}  # by plan id
        self._busy: dict[int, Plan] = {}  # the same plans by device
        self._sent: dict[int, Dispatch] = {}  # by plan id: the messages of plans in flight that the pool works on
        self._evaluation: dict[str, float] = {}  # figures of the newest evaluation
        self._evaluated: Evaluated | None = None
        self._stopping = Stopping(config.stop)
        self._device_history, self._outcome_counts = DeviceHistory(), OutcomeCounts()
        self._traffic = TrafficRecorder(ledger, costs)
        self._next_id = 1
        self._decisions = 0
        self._path: Part | None = None  # the part that stands for the model; None: the whole model
        self._round = self._open_round()

    def events(self) -> Iterator[AnyEvent]:
        """Run until a stop rule holds; yields every event of the run except its start.

        Raises ``RunError`` when the run cannot go on. By then too every plan that was dispatched has ended.
        """
        try:
            reason = yield from self._rounds()
            self._outcome_counts.check_delivered(self._version)
        except Exception:
            yield from self._abandon("the run failed")
            raise
        yield from self._abandon("the run ended")
        yield RunEnded(
            time_s=self._clock.time_s,
            reason=reason,
            version=self._version,
            model_hash=self._server.model_hash(),
            up_bytes=self._traffic.total("up"),
            down_bytes=self._traffic.total("down"),
            evaluation_bytes=self._traffic.evaluation_bytes,
            host_bytes=self._traffic.host_bytes,
            task_bytes=self._traffic.task_bytes,
            up_by_kind=self._ledger.by_kind("up"),
            down_by_kind=self._ledger.by_kind("down"),
            resyncs=self._ledger.messages("down", kind="resync"),
        )

    def _rounds(self) -> Generator[AnyEvent, None, str]:
        """Run round after round; returns the reason why the run ends."""
        every = self._config.evaluation.every
        while True:
            if self._version and self._version % every == 0:  # a resumed run begins here
                yield from self._evaluate()
            if (reason := self._stop_reason()) is not None:
                break
            version = self._version
            while self._version == version:
                yield from self._step()
        evaluated = self._evaluated
        if evaluated is None or evaluated.version != self._version:  # the summary reports the final model
            yield from self._evaluate()
        return reason

    def _step(self) -> Iterator[AnyEvent]:
        """One decision, one arrival, and the close of the version if it is due."""
        yield from self._decide()
        if self._round.close_at == 0:  # for its tasks alone
            yield from self._close()
            return
        if not self._in_flight and (not self._round.complete or self._round.keep_open) and self._wait():
            yield from self._notices()
            return
        if self._round.complete and not (self._round.keep_open and self._in_flight):
            yield from self._close()  # the policy kept it open, and has no more plans
            return
        if not self._in_flight:
            why = self._round.describe_left_out()
            text = f"the policy chose no device while none is in flight, so the run cannot go on{why}"
            raise RunError(text, round_=self._version, stage="decide")
        arrival = self._clock.next(self._round.deadline_s)
        self._report_lost_devices()
        yield from self._notices()
        if arrival is not None:
            yield self._receive(arrival)
            self._outcome_counts.check_failures(self._config.max_failures)
        if must_close(self._round, deadline_passed=arrival is None, folded=self._server.folded):
            yield from self._close()

    def _decide(self) -> Iterator[AnyEvent]:
        """Call the policy, and dispatch the plans of its decision."""
        self._report_lost_devices()
        decision, self._policy_state = call_policy(self._policy, self._view(), self._policy_state)
        self._decisions += 1
        self._round.decided(decision)
        self._path = decision.path or self._path
        for task in decision.tasks:
            try:
                self._tasks.begin(task)
            except ValueError as error:
                raise RunError(str(error), round_=self._version, stage="task") from error
        for plan in decision.plans:
            self._dispatch(plan)
        if decision.plans:
            reasons = Counter(reason.partition(":")[0] for _, reason in decision.left_out)
            yield RoundStarted(
                time_s=self._clock.time_s, version=self._version, plans=len(decision.plans), left_out=dict(reasons)
            )

    def _view(self) -> View:
        """The view of the policy at this moment."""
        stop = self._config.stop
        remaining = None if stop.virtual_s is None else max(0.0, stop.virtual_s - self._clock.time_s)
        budget = None if stop.bytes is None else max(0, stop.bytes - self._traffic.training_bytes)
        version, plans_of = self._version, self._round.plans_of
        return View(
            clock=self._config.clock,
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
            last_reports=MappingProxyType(self._device_history.reports),
            participation=MappingProxyType(self._device_history.participation),
            memory_budgets=MappingProxyType(self._device_history.memory_budgets),
            memory_margin=self._costs.memory_margin,
            fits_later=not self._config.memory.admission,
            evaluation=MappingProxyType(self._evaluation),
            movement=MappingProxyType(self._tasks.movement),
            statistics=self._statistics,
            remaining_s=remaining,
            remaining_bytes=budget,
            plan_maker=lambda device: self._new_plan(device, version, plans_of[device]),
            estimator=self._costs.estimate,
            **self._lifecycle.view_fields(version),
        )

    def _dispatch(self, decided: Plan) -> None:
        """Send one plan of a decision to its device."""
        plan = msgspec.structs.replace(decided, id=self._next_id)
        try:
            check_sendable(
                plan,
                version=self._version,
                busy=self._busy,
                profiles=self._profiles,
                hosts=self._fleet.hosts.count,
                workload=self._server.workload,
            )
            self._lifecycle.check(plan, self._in_flight.values())
            plan = self._with_budget(self._clock.stop_early(plan, self._costs))
            flops, work = self._costs.flops(plan), self._costs.work(plan)
            memory = self._costs.peak_memory_bytes(plan)
        except ValueError as error:
            raise RunError(str(error), device=plan.device, round_=self._version, stage="dispatch") from error
        self._next_id += 1
        sent = self._server.send(plan)
        plan = sent.plan
        self._lifecycle.sent(plan)
        # A plan that will be lost before it has a result is not computed.
        needed = self._clock.dispatch(plan, down_bytes=sent.num_bytes, flops=flops, peak_memory_bytes=memory, work=work)
        control = self._submit(sent) if needed else len(plan_message(plan))
        self._traffic.sent(sent, control=control)
        self._in_flight[plan.id] = plan
        if needed:
            self._sent[plan.id] = sent
        self._busy[plan.device] = plan
        self._outcome_counts.sent(plan)
        self._round.sent(plan, time_s=self._clock.sends_s)

    def _with_budget(self, plan: Plan) -> Plan:
        """The plan with its device's memory budget, if budgets are enforced; evaluations, as instruments, have none."""
        if (
            not self._config.memory.is_enforced(self._config.backend)
            or plan.objective.kind == "evaluate"
            or plan.replays
        ):
            return plan
        declared = self._profiles[plan.device].memory_bytes
        budget = self._device_history.memory_budgets.get(plan.device, declared)
        return msgspec.structs.replace(plan, memory_bytes=budget)

    def _submit(self, sent: Dispatch) -> int:
        """Submit a plan to the pool; returns the bytes of its plan message."""
        plan = sent.plan
        group = self._fleet.group_of(plan.device)
        return self._pool.submit(
            Task(
                plan=plan,
                packets=sent.packets_for(simulated=not group),
                state=sent.state,
                group=group,
                host_packets=tuple(message.reference for message in sent.host_messages),
                num_samples=self._samples[plan.device],
                **self._lifecycle.task_fields(plan),
            )
        )

    def _wait(self) -> bool:
        """Wait for a device to become reachable that was not so since the last plan; False if there is none in time."""
        away = self._clock.unreachable()
        self._round.reached.update(set(range(len(self._profiles))) - away)
        until_s = self._clock.next_reachable_s(away - self._round.reached)
        if until_s == math.inf or until_s > (self._round.deadline_s or math.inf):
            return False
        self._clock.wait(until_s)
        return True

    def _receive(self, arrival: Arrival) -> PlanEnded:
        """End a plan: fold its update, or count its outcome."""
        finished = arrival.finished
        plan = finished.plan
        virtual = msgspec.structs.replace(arrival.virtual, parameters=self._costs.parameters(plan))
        report = msgspec.structs.replace(finished.report, virtual=virtual)
        self._in_flight.pop(plan.id)
        self._sent.pop(plan.id, None)
        self._busy.pop(plan.device)
        sound = report.outcome == Outcome.DONE
        self._lifecycle.arrived(PlanResult(plan, finished.stream.up, sound=sound, version=self._version))
        self._traffic.ended(plan, arrival)
        behind, staleness = self._version - plan.version, self._config.server.staleness
        if report.outcome == Outcome.DONE and (why := late(plan, behind=behind, staleness=staleness, path=self._path)):
            report = msgspec.structs.replace(report, outcome=Outcome.LATE, error=why)
        if report.outcome == Outcome.DONE:
            known = self._samples[plan.device]
            report = fold_update(
                self._server,
                report,
                finished,
                behind=behind,
                num_samples=known,
                staleness=staleness,
                before=self._tasks.folded,
            )
        if report.outcome == Outcome.LOST:  # it is not known whether the device holds what was sent
            self._lifecycle.released(plan)
        else:
            self._lifecycle.ended(plan, report, finished.state)
        self._outcome_counts.ended(report)
        if not behind:
            self._round.ended(report)
        if report.outcome == Outcome.DONE:
            self._round.folded(report, fleet_class=self._profiles[plan.device].name, behind=behind)
        return self._ended(report, behind=behind)

    def _ended(self, report: Report, *, behind: int = 0) -> PlanEnded:
        """The event of a plan that ended ``behind`` versions after its own; recorded in the history of its device."""
        self._device_history.ended(report)
        fleet_class = self._profiles[report.plan.device].name
        return PlanEnded(time_s=self._clock.time_s, report=report, fleet_class=fleet_class, staleness=behind)

    def _close(self) -> Iterator[AnyEvent]:
        """Close the version, also with nothing folded, and open the next; ``closing`` says which errors end the run instead."""
        round_, version = self._round, self._version
        folded = self._server.folded
        check_first_fault(round_, self._outcome_counts)
        if round_.trainings and not folded:
            check_diverged(
                round_, version, evaluated=self._evaluated, evaluate=self._evaluate_model, config=self._config
            )
            text = f"round {version} closed with nothing folded: {round_.describe_outcomes()}"
            yield Notice(time_s=self._clock.time_s, text=text)
        try:
            in_flight = {plan.version for plan in self._in_flight.values()}
            self._server.close_version(in_flight=in_flight, refine=self._tasks.refine)
        except NotFinite as error:
            raise RunError(str(error), round_=version, stage="close") from error
        self._round = self._open_round()
        for event in self._tasks.ended():
            if isinstance(event, TaskEnded):
                self._clock.spend(event.seconds)
            yield msgspec.structs.replace(event, time_s=self._clock.time_s)
        yield VersionClosed(
            time_s=self._clock.time_s,
            version=self._version,
            folded=folded,
            participation=dict(round_.delivered),
            loss=round_.loss,
            staleness=round_.staleness,
            up_bytes=self._traffic.total("up"),
            down_bytes=self._traffic.total("down"),
            evaluation_bytes=self._traffic.evaluation_bytes,
            host_bytes=self._traffic.host_bytes,
            task_bytes=self._traffic.task_bytes,
            wall_s=self._round.opened_wall - round_.opened_wall,
        )

    def _open_round(self) -> Round:
        return Round(opened_wall=time.perf_counter())

    def _evaluate(self) -> Iterator[AnyEvent]:
        """Evaluate the current version as configured, and record whether it is the best so far."""
        evaluated = self._evaluate_model()
        if evaluated is None:
            return
        self._evaluation = evaluated.figures
        self._evaluated = msgspec.structs.replace(evaluated, best=self._stopping.note(evaluated.figures))
        yield self._evaluated

    def _evaluate_model(self) -> Evaluated | None:
        """The figures of the current version, which are not recorded; None if nothing can be evaluated."""
        clock = self._clock
        return self._evaluator.evaluate(
            self._version, time_s=clock.time_s, unreachable=clock.unreachable(), path=self._path
        )

    def _abandon(self, why: str) -> Iterator[AnyEvent]:
        """End the plans still in flight as late, since the run is over."""
        yield from self._notices()  # after an error, these may tell its cause
        for plan in list(self._in_flight.values()):
            self._pool.cancel(plan.id)
            arrival = self._clock.abandon(plan.id)
            self._traffic.ended(plan, arrival)
            self._lifecycle.released(plan)
            report = Report(plan=plan, outcome=Outcome.LATE, error=why)
            yield self._ended(report if arrival is None else msgspec.structs.replace(report, virtual=arrival.virtual))
        for plans in (self._in_flight, self._sent, self._busy):
            plans.clear()

    def _report_lost_devices(self) -> None:
        """Pass on which real devices hold nothing any more."""
        for device in self._pool.take_lost_devices():
            self._lifecycle.device_reset(device)

    def _notices(self) -> Iterator[AnyEvent]:
        """Notices of workers, hosts and links since the last call."""
        history = self._device_history
        for text in (
            *self._pool.notices(),
            *self._tasks.notices(),
            *self._lifecycle.notices(),
            *history.take_notices(),
        ):
            yield Notice(time_s=self._clock.time_s, text=text)

    def _stop_reason(self) -> str | None:
        """Why the run ends with the version that has just closed, or None."""
        evaluated = self._evaluated
        return self._stopping.reason(
            version=self._version,
            time_s=self._clock.time_s,
            num_bytes=self._traffic.training_bytes,
            evaluation=evaluated.figures if evaluated and evaluated.version == self._version else None,
        )

    def resume(self) -> None:
        """Submit the plans in flight that have no result yet, after the saved state was restored."""
        self._round.opened_wall = time.perf_counter()
        for plan_id, sent in self._sent.items():
            entry = self._clock.plans_in_flight.get(plan_id)
            if entry is None or entry.finished is None:
                self._submit(sent)

    def first_plans(self) -> Sequence[Plan]:
        """The plans of the first decision. It is not acted on: the run begins with a decision of its own."""
        decision, _ = call_policy(self._policy, self._view(), first_state(self._policy))
        return decision.plans

    @property
    def ends(self) -> bool:
        """Whether the version that has just closed is the last, as far as this is known before its evaluation."""
        return self._stop_reason() is not None

    @property
    def time_s(self) -> float:
        """The clock's second."""
        return self._clock.time_s

    @property
    def _version(self) -> int:
        return self._server.version
