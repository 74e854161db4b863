"""The round that is open: what was dispatched in it, what came of that, and when it may close."""

from collections import Counter
from dataclasses import dataclass, field

from ...comms.errors import UnfitPacket
from ...learning.spec import CountOrZero
from ...policies.decision import Decision
from ...policies.plan import Plan
from ...policies.report import Outcome, Report


@dataclass
class Round:
    """One version's book-keeping. ``began_s``: when its first plan was sent, in the clock's seconds; ``opened_wall``: when
    it was opened, in those of this machine.

    ``dispatched``: its plans so far, ``plans_of`` the same by device, and ``trainings`` those whose updates are to be folded.
    ``delivered``: folded updates by fleet class, ``behind``: versions that each of them was behind. ``unfit``: updates that
    were rejected because they hold NaN or infinity. ``close_at``: folded updates that close it. ``close_after_s``: see
    ``deadline_s``. ``keep_open``: the newest decision has more to send.
    ``reached``: the devices that could be reached while it waited for others, since its last plan was sent.
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
    unfit: int = 0
    reached: set[int] = field(default_factory=set)

    def decided(self, decision: Decision) -> None:
        """Note when a decision wants it closed, and whom it left out."""
        if decision.close_at is not None:
            self.close_at = decision.close_at
        if decision.close_after_s is not None:
            self.close_after_s = decision.close_after_s
        self.keep_open = decision.keep_open
        self.left_out.update(decision.left_out)

    def ended(self, report: Report) -> None:
        """Note the end of one of its plans."""
        self.outcomes[report.outcome] += 1
        self.unfit += report.outcome == Outcome.REJECTED and report.error.startswith(UnfitPacket.__name__)
        if report.outcome in (Outcome.FAILED, Outcome.REJECTED) and self.first_fault is None:
            self.first_fault = report

    def took(self, report: Report, *, fleet_class: str, behind: int) -> None:
        """Note what was folded into it, from a device of ``fleet_class``: of its own plans, or of so many versions before."""
        self.delivered[fleet_class] += 1
        self.behind.append(behind)
        if report.loss is not None:
            self.losses.append((report.loss, report.samples))

    def sent(self, plan: Plan, *, time_s: float) -> None:
        """Note that one of its plans was dispatched."""
        if self.began_s is None:
            self.began_s = time_s
        self.dispatched += 1
        self.reached.clear()
        self.trainings += plan.objective.kind != "evaluate"
        self.plans_of[plan.device] += 1

    @property
    def deadline_s(self) -> float | None:
        """The clock's second at which it closes, whoever is missing; None while nothing of it was sent: nobody is awaited."""
        if self.began_s is None or self.close_after_s is None:
            return None
        return self.began_s + self.close_after_s

    @property
    def outstanding(self) -> int:
        """Its plans that have not ended."""
        return self.dispatched - sum(self.outcomes.values())

    @property
    def complete(self) -> bool:
        """Whether something was dispatched, and all of it has ended."""
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

    def why_nothing(self) -> str:
        """What became of its plans, for a version that closes with nothing folded."""
        counts = [f"{count} {outcome.value}" for outcome, count in self.outcomes.items()]
        return ", ".join([*counts, f"{self.outstanding} still out"] if self.outstanding else counts)

    def why_nobody(self) -> str:
        """Why devices were left out, the most frequent reason first; "" when no reason was given."""
        counts = Counter(reason.partition(":")[0] for reason in self.left_out.values())
        examples = {reason.partition(":")[0]: (device, reason) for device, reason in reversed(self.left_out.items())}
        told = [f"{count} for {kind} (device {examples[kind][0]}: {examples[kind][1].partition(':')[2].strip()})"
                for kind, count in counts.most_common(3)]  # fmt: skip
        return f"; it left out {', '.join(told)}" if told else ""
