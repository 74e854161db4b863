"""The records of one round."""

from fedbonsai.policies.decision import Decision
from fedbonsai.policies.plan import Objective
from fedbonsai.policies.report import Outcome, Report
from fedbonsai.runtime.engine.round import Round


def ended(make_plan, outcome, *, loss=None, samples=1, error=""):
    return Report(plan=make_plan(1), outcome=outcome, loss=loss, samples=samples, error=error)


def test_the_loss_is_the_mean_over_the_samples_of_folded_updates(make_plan):
    round_ = Round(0.0, dispatched=4)
    for loss, samples, behind in ((1.0, 30, 0), (2.0, 10, 3)):
        report = ended(make_plan, Outcome.DONE, loss=loss, samples=samples)
        round_.ended(report)
        round_.folded(report, fleet_class="board", behind=behind)
    round_.ended(ended(make_plan, Outcome.REJECTED, loss=100.0, samples=10))
    assert round_.staleness == 1.5
    assert round_.loss == 1.25
    assert round_.delivered == {"board": 2}
    assert round_.outstanding == 1


def test_nothing_folded_has_no_loss():
    assert (Round(0.0).loss, Round(0.0).staleness) == (None, None)


def test_the_first_fault_is_kept_and_a_late_plan_is_no_fault(make_plan):
    round_ = Round(0.0, dispatched=3)
    for outcome, error in ((Outcome.LATE, "a"), (Outcome.FAILED, "b"), (Outcome.REJECTED, "c")):
        round_.ended(ended(make_plan, outcome, error=error))
    assert round_.first_fault.error == "b"


def test_the_deadline_counts_from_the_first_plan(make_plan):
    round_ = Round(0.0)
    round_.decided(Decision(close_at=3, close_after_s=5.0))
    assert (round_.close_at, round_.deadline_s) == (3, None)
    round_.sent(make_plan(1), time_s=10.0)
    round_.sent(make_plan(2), time_s=12.0)
    assert round_.deadline_s == 15.0
    round_.decided(Decision())
    assert round_.deadline_s == 15.0
    round_.decided(Decision(close_after_s=7.0))
    assert round_.deadline_s == 17.0


def test_a_round_is_kept_open_until_the_next_decision(make_plan):
    round_ = Round(0.0)
    round_.decided(Decision(keep_open=True))
    assert (round_.keep_open, round_.complete) == (True, False)
    round_.sent(make_plan(1), time_s=0.0)
    assert not round_.complete
    round_.ended(ended(make_plan, Outcome.FAILED))
    round_.decided(Decision())
    assert (round_.keep_open, round_.complete) == (False, True)


def test_plans_are_counted_by_device_and_by_objective(make_plan):
    round_ = Round(0.0)
    for number, device in enumerate((4, 4, 5)):
        round_.sent(make_plan(number, device), time_s=0.0)
    round_.sent(make_plan(3, 6, objective=Objective(kind="evaluate")), time_s=0.0)
    assert (round_.dispatched, round_.trainings) == (4, 3)
    assert round_.plans_of == {4: 2, 5: 1, 6: 1}


def test_outcomes_in_words(make_plan):
    round_ = Round(0.0, dispatched=3)
    for outcome in (Outcome.REJECTED, Outcome.REJECTED):
        round_.ended(ended(make_plan, outcome))
    assert round_.describe_outcomes() == "2 rejected, 1 still out"
    round_.ended(ended(make_plan, Outcome.LOST))
    assert round_.describe_outcomes() == "2 rejected, 1 lost"


def test_devices_left_out_in_words():
    round_ = Round(0.0)
    assert round_.describe_left_out() == ""
    round_.decided(Decision(left_out=((0, "memory: needs 2 MB"), (1, "data: no samples"), (2, "memory: needs 3 MB"))))
    round_.decided(Decision(left_out=((0, "memory: needs 2 MB"),)))
    assert (
        round_.describe_left_out()
        == "; it left out 2 for memory (device 0: needs 2 MB), 1 for data (device 1: no samples)"
    )
