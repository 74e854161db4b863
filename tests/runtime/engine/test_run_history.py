"""What a run learns of its devices' memory."""

from typing import Any

import msgspec
import pytest
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.report import Outcome, Report
from fedbonsai.runtime.engine.run_history import DeviceHistory

from ..conftest import make_plan


def report(*, limit: int | None, predicted: int, **changes: Any) -> Report:
    plan = msgspec.structs.replace(make_plan(1, 4, version=2), memory_bytes=limit)
    fields = {"outcome": Outcome.OUT_OF_MEMORY, "enforced": True, "virtual": Estimate(peak_memory_bytes=predicted)}
    return Report(plan=plan, **(fields | changes))


@pytest.mark.parametrize(
    ("limit", "predicted", "learned"),
    [
        (50_000_000, 20_000_000, 18_000_000),  # the prediction was too low: no plan that is predicted as high again
        (50_000_000, 80_000_000, 45_000_000),  # a policy sent it all the same
        (50_000_000, 0, 45_000_000),  # nothing was predicted
    ],
)
def test_a_lack_of_memory_lowers_the_budget(limit: int, predicted: int, learned: int) -> None:
    history = DeviceHistory()
    history.ended(report(limit=limit, predicted=predicted))
    assert history.memory_budgets == {4: learned}
    (notice,) = history.take_notices()
    assert notice == (
        f"device 4 ran out of memory in round 2 under a limit of 50.0 MB, predicted {predicted / 1e6:,.1f} MB; "
        f"its learned budget is {learned / 1e6:,.1f} MB"
    )
    assert history.take_notices() == []


def test_a_budget_falls_with_every_lack_and_never_rises() -> None:
    history, found = DeviceHistory(), []
    for limit, predicted in ((100, 90), (81, 200), (1000, 1000)):
        history.ended(report(limit=limit, predicted=predicted))
        found.append(history.memory_budgets[4])
    assert found == [81, 72, 72]


@pytest.mark.parametrize(
    "changes",
    [{"enforced": False}, {"enforced": None}, {"outcome": Outcome.FAILED}, {"outcome": Outcome.DONE}],
    ids=str,
)
def test_only_an_enforced_limit_teaches_a_budget(changes: dict[str, Any]) -> None:
    history = DeviceHistory()
    history.ended(report(limit=100, predicted=90, **changes))
    assert (history.memory_budgets, history.take_notices()) == ({}, [])
