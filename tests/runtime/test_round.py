"""The book-keeping of one round."""

from fedbonsai.policies.decision import Decision
from fedbonsai.policies.report import Outcome, Report
from fedbonsai.runtime.round import Round


def ended(make_plan, outcome, *, loss=None, samples=1, error=""):
    return Report(plan=make_plan(1), outcome=outcome, loss=loss, samples=samples, error=error)


def test_the_loss_is_the_mean_over_samples_of_what_was_folded(make_plan):
    round_ = Round(0.0, 0.0, dispatched=4)
    round_.ended(ended(make_plan, Outcome.DONE, loss=1.0, samples=30), fleet_class="board")
    round_.ended(ended(make_plan, Outcome.DONE, loss=2.0, samples=10), fleet_class="board")
    round_.ended(ended(make_plan, Outcome.REJECTED, loss=100.0, samples=10), fleet_class="board")
    assert round_.loss == 1.25
    assert round_.delivered == {"board": 2}
    assert round_.outstanding == 1


def test_nothing_folded_has_no_loss():
    assert Round(0.0, 0.0).loss is None


def test_the_first_fault_is_kept_and_lateness_is_none(make_plan):
    round_ = Round(0.0, 0.0, dispatched=3)
    for outcome, error in ((Outcome.LATE, "a"), (Outcome.FAILED, "b"), (Outcome.REJECTED, "c")):
        round_.ended(ended(make_plan, outcome, error=error), fleet_class="board")
    assert round_.first_fault.error == "b"


def test_the_deadline_counts_from_the_opening():
    round_ = Round(10.0, 0.0)
    round_.decided(Decision(close_at=3, close_after_s=5.0))
    round_.decided(Decision())
    assert (round_.close_at, round_.deadline_s) == (3, 15.0)


def test_why_nobody_was_chosen():
    round_ = Round(0.0, 0.0)
    assert round_.why_nobody() == ""
    round_.decided(Decision(left_out=((0, "memory: needs 2 MB"), (1, "data: no samples"), (2, "memory: needs 3 MB"))))
    round_.decided(Decision(left_out=((0, "memory: needs 2 MB"),)))
    assert round_.why_nobody() == "; it left out 2 for memory (device 0: needs 2 MB), 1 for data (device 1: no samples)"
