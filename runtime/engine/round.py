"""The records of the open round: its plans, their outcomes, the updates folded into it, and the conditions of its close."""

from collections import Counter
from dataclasses import dataclass, field

from ...comms.errors import UnfitPacket
from ...learning.spec import CountOrZero
from ...policies.decision import Decision
from ...policies.plan import Plan
from ...policies.report import Outcome, Report


@dataclass
class Round:
    """The records of one version while it is open.

    ``opened_wall``: when it was opened, in seconds of ``time.perf_counter``. ``began_s``: when its first plan was dispatched,
    in seconds of the run's clock. ``dispatched``: number of its plans so far; ``plans_of``: the same by device;
    ``trainings``: those whose updates are to be folded. ``close_at``: folded updates that close it. ``close_after_s``: seconds
    from ``began_s`` to its deadline. ``keep_open``: the newest decision has more plans to come. ``left_out``: by device, the
    reason why it was not chosen. ``delivered``: folded updates by fleet class. ``losses``: of each folded update, the loss and
    its samples. ``behind``: of each folded update, the number of versions between its plan's and this one. ``not_finite``:
    updates rejected because they hold NaN or infinity. ``reached``: devices that were reachable at some time since its last
    plan was dispatched, while no plan was in flight.
    """

    opened_wall: float
    began_s: float | None = None
    dispatched: CountOrZero = 0
    trainings: CountOrZero = 0
    close_at: int | None = None
    close_after_s: float | None = None
    keep_open: bool = False
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    left_out: dict[int, str] = field(default_factory=dict)
    plans_of: Counter[int] = field(default_factory=Counter)
    delivered: Counter[str] = field(default_factory=Counter)
    losses: list[tuple[float, int]] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    first_fault: Report | None = None
    not_finite: int = 0
    reached: set[int] = field(default_factory=set)

    def decided(self, decision: Decision) -> None:
        """Record a decision: when the round closes, and the devices left out."""
        if decision.close_at is not None:
            self.close_at = decision.close_at
        if decision.close_after_s is not None:
            self.close_after_s = decision.close_after_s
        self.keep_open = decision.keep_open
        self.left_out.update(decision.left_out)

    def sent(self, plan: Plan, *, time_s: float) -> None:
        """Record that one of its plans was dispatched."""
        if self.began_s is None:
            self.began_s = time_s
        self.dispatched += 1
        self.reached.clear()
        self.trainings += plan.objective.kind != "evaluate"
        self.plans_of[plan.device] += 1

    def ended(self, report: Report) -> None:
        """Record the end of one of its plans."""
        self.outcomes[report.outcome] += 1
        self.not_finite += report.outcome == Outcome.REJECTED and report.error.startswith(UnfitPacket.__name__)
        if report.outcome in (Outcome.FAILED, Outcome.REJECTED) and self.first_fault is None:
            self.first_fault = report

    def folded(self, report: Report, *, fleet_class: str, behind: int) -> None:
        """Record an update that was folded into it: of one of its own plans, or of a plan ``behind`` versions earlier."""
        self.delivered[fleet_class] += 1
        self.behind.append(behind)
        if report.loss is not None:
            self.losses.append((report.loss, report.samples))

    @property
    def deadline_s(self) -> float | None:
        """The clock's second at which it closes in any case; None without a deadline, and before its first plan."""
        if self.began_s is None or self.close_after_s is None:
            return None
        return self.began_s + self.close_after_s

    @property
    def outstanding(self) -> int:
        """Number of its plans that have not ended."""
        return self.dispatched - sum(self.outcomes.values())

    @property
    def complete(self) -> bool:
        """Whether at least one plan was dispatched, and all of them have ended."""
        return self.dispatched > 0 and not self.outstanding

    @property
    def loss(self) -> float | None:
        """Mean training loss over the samples of the folded updates."""
        total = sum(samples for _, samples in self.losses)
        return sum(loss * samples for loss, samples in self.losses) / total if total else None

    @property
    def staleness(self) -> float | None:
        """Mean number of versions that the folded updates were behind."""
        return sum(self.behind) / len(self.behind) if self.behind else None

    def describe_outcomes(self) -> str:
        """Its plans by outcome, for the notice of a version that closes with nothing folded."""
        counts = [f"{count} {outcome.value}" for outcome, count in self.outcomes.items()]
        return ", ".join([*counts, f"{self.outstanding} still out"] if self.outstanding else counts)

    def describe_left_out(self) -> str:
        """Why devices were left out, the most frequent reason first; "" when no reason was given."""
        counts = Counter(reason.partition(":")[0] for reason in self.left_out.values())
        examples = {reason.partition(":")[0]: (device, reason) for device, reason in reversed(self.left_out.items())}
        reasons = [f"{count} for {name} (device {examples[name][0]}: {examples[name][1].partition(':')[2].strip()})"
                   for name, count in counts.most_common(3)]  # fmt: skip
        return f"; it left out {', '.join(reasons)}" if reasons else ""
