"""The bytes in the reports of plans add up to those of the ledger, for every outcome of the plans."""

import fedbonsai
import pytest
from fedbonsai.policies.report import Outcome
from fedbonsai.runtime.events import PlanEnded, VersionClosed

from .resuming import BASE, METHODS

APART = (
    "control",
    "evaluation",
    "host",
)  # the clock charges the first as latency; the others are not part of plans of devices
ALL = ["fedavg", "resfed", "fedbuff", "deadline, late plans", "splitfed, in flight", "ecofed, in flight",
       "devices that come and go", "residuals, in flight", "residuals, narrow", "residuals, narrow, in flight",
       "shared links"]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_the_sum_of_the_plans_is_the_ledger(name):
    """Also for plans that are lost in flight, and for plans still in flight at the end of the run."""
    run = fedbonsai.run(BASE | METHODS[name] | {"stop": {"rounds": 6}})
    events = list(run)
    reports = [event.report for event in events if isinstance(event, PlanEnded)]
    for direction in ("up", "down"):
        told = run.summary[f"{direction}_by_kind"]
        plans = sum(getattr(report.virtual, f"{direction}_bytes") for report in reports)
        assert plans == sum(size for kind, size in told.items() if kind not in APART), direction
        totals = [getattr(event, f"{direction}_bytes") for event in events if isinstance(event, VersionClosed)]
        assert totals[-1] <= run.summary[f"{direction}_bytes"] + 10**6 * (direction == "down")
    outcomes = {report.outcome for report in reports}
    if name in ("fedbuff", "splitfed, in flight", "shared links"):
        late = [report for report in reports if report.outcome == Outcome.LATE and report.error == "the run ended"]
        assert any(report.virtual.down_bytes for report in late)
    if name == "devices that come and go":
        assert Outcome.LOST in outcomes
    if name == "resfed":
        assert run.summary["down_by_kind"]["agreed"] == 64 * 6
        assert run.summary["down_by_kind"]["weights"] + 64 * 6 == sum(report.virtual.down_bytes for report in reports)


def test_under_the_wall_clock_nothing_is_missing_from_the_ledger():
    """There the figures of plans are estimates; packets to plans in flight at the end are counted in full."""
    run = fedbonsai.run(BASE | {"preset": "fedbuff", "clock": "wall", "stop": {"rounds": 3}})
    events = list(run)
    ended = [event.report for event in events if isinstance(event, PlanEnded)]
    weights = run.summary["down_by_kind"]["weights"]
    assert weights % len(ended) == 0  # each plan received the model once
    assert run.summary["down_bytes"] == weights + run.summary["down_by_kind"]["control"]
