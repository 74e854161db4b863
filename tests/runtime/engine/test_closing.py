"""When a version closes, which rounds end a run, and which updates are folded."""

import math

import pytest
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Staleness
from fedbonsai.policies.plan import Objective, Split
from fedbonsai.policies.report import Outcome, Report
from fedbonsai.runtime.configuration.config import Config
from fedbonsai.runtime.engine.closing import check_diverged, check_first_fault, must_close
from fedbonsai.runtime.engine.folding import late
from fedbonsai.runtime.engine.round import Round
from fedbonsai.runtime.engine.run_history import OutcomeCounts
from fedbonsai.runtime.errors import RunError
from fedbonsai.runtime.events import Evaluated
from msgspec.structs import replace


def round_of(dispatched, ended=0, **changes):
    return Round(0.0, dispatched=dispatched, outcomes={Outcome.DONE: ended}, **changes)


@pytest.mark.parametrize(
    ("round_", "folded", "deadline_passed", "expected"),
    [
        (round_of(3, 2), 2, False, False),
        (round_of(3, 3), 3, False, True),
        (round_of(3, 3, keep_open=True), 3, False, False),
        (round_of(3, 2, close_at=2), 2, False, True),
        (round_of(3, 2, close_at=2, keep_open=True), 2, False, True),
        (round_of(3, 2, close_at=3), 2, False, False),
        (round_of(0), 0, False, False),
        (round_of(3, 1, keep_open=True), 1, True, True),
    ],
)
def test_a_version_closes_at_k_updates_when_complete_or_at_its_deadline(round_, folded, deadline_passed, expected):
    assert must_close(round_, deadline_passed=deadline_passed, folded=folded) is expected


def test_a_round_of_faults_ends_a_run_that_has_delivered_nothing(make_plan):
    fault = Report(plan=make_plan(1, 2, version=3), outcome=Outcome.FAILED, stage="train", error="no")
    round_, counts = Round(0.0, dispatched=2), OutcomeCounts()
    round_.ended(fault)
    check_first_fault(round_, counts)  # one plan is outstanding
    round_.ended(Report(plan=make_plan(2), outcome=Outcome.LATE))
    with pytest.raises(RunError) as caught:
        check_first_fault(round_, counts)
    assert str(caught.value) == (
        "device 2, round 3, stage train: no device of this round delivered; the first fault: no"
    )
    counts.ended(Report(plan=make_plan(3), outcome=Outcome.DONE))
    check_first_fault(round_, counts)


def evaluated(loss, version=4):
    return Evaluated(time_s=0.0, version=version, server={"loss": loss}, devices={}, num_devices=0, num_failed=0)


@pytest.mark.parametrize(
    ("not_finite", "devices", "known", "new", "diverged"),
    [
        (2, 2, evaluated(math.nan), None, True),
        (2, 2, evaluated(1.0), None, False),
        (1, 2, evaluated(math.nan), None, False),  # one of two updates was finite
        (2, 2, evaluated(1.0, version=3), evaluated(math.inf), True),  # the newest evaluation is too old
        (2, 2, None, None, True),
        (1, 1, None, None, False),  # without an evaluation it may be the fault of the only device
    ],
)
def test_a_model_has_diverged_if_its_own_loss_is_not_finite(make_plan, not_finite, devices, known, new, diverged):
    round_ = Round(0.0, not_finite=not_finite)
    for device in range(devices):
        round_.sent(make_plan(device, device), time_s=0.0)
    problem = ""
    try:
        check_diverged(round_, 4, evaluated=known, evaluate=lambda: new, config=Config())
    except RunError as error:
        problem = error.message
    assert problem.startswith("all 2 updates of this round hold NaN or infinity") is diverged


CLOSED = "its version had closed"


def test_late_updates_are_folded_by_the_rule_for_staleness(make_plan):
    plan, rule = make_plan(1), Staleness(most=2)
    assert late(plan, behind=0, staleness=None, path=None) == ""
    assert late(plan, behind=1, staleness=None, path=None) == CLOSED
    assert [late(plan, behind=behind, staleness=rule, path=None) for behind in (1, 2, 3)] == ["", "", CLOSED]
    turn = make_plan(1, split=Split(cut="all", head="shared"))
    assert [late(turn, behind=behind, staleness=rule, path=None) for behind in (0, 1)] == ["", CLOSED]


def test_an_update_of_a_block_that_was_frozen_meanwhile_is_late(make_plan):
    rule, plan = Staleness(), make_plan(1)
    plan = replace(plan, part=Part(blocks=("a", "z"), trained=("a", "z"), auxiliaries=("proxy@b..b",)))
    same = Part(blocks=("a", "z"), trained=("a", "z"), auxiliaries=("proxy@b..b",))
    grown = Part(blocks=("a", "b", "z"), trained=("b", "z"))
    assert late(plan, behind=2, staleness=rule, path=same) == ""
    assert late(plan, behind=2, staleness=rule, path=grown) == "'a' was frozen meanwhile"
    head = replace(plan, part=replace(plan.part, trained=("z",), untrained=plan.part.auxiliaries))
    assert late(head, behind=2, staleness=rule, path=grown) == ""
    proxies = replace(plan, part=replace(plan.part, trained=("z",)))
    assert late(proxies, behind=2, staleness=rule, path=grown) == "'proxy@b..b' was frozen meanwhile"
    statistics = replace(plan, objective=Objective(kind="collect"), part=Part(blocks=("a",), trained=()))
    assert late(statistics, behind=1, staleness=rule, path=grown) == "'a' was frozen meanwhile"
