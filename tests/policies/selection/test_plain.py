"""All, RandomCohort, Fastest, ByDeadline: their rules, and the allowed cohorts."""

from collections import Counter

import pytest
from fedbonsai.policies.checks.fields import cohort_size
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.selection.candidates import Candidates
from fedbonsai.policies.selection.deadline import ByDeadline
from fedbonsai.policies.selection.plain import All, Fastest, RandomCohort


def decide(policy, view):
    return policy.decide(view, policy.init(), Decision())[0]


def chosen(policy, view):
    return [plan.device for plan in decide(policy, view).plans]


def test_all_takes_all_devices_in_order(make_view):
    decision = decide(All(), make_view(seconds=(4, 3, 2)))
    assert [plan.device for plan in decision.plans] == [0, 1, 2]
    assert decision.plans[0].reasons == ("all",)
    assert decision.left_out == ()


def test_memory_is_the_learned_budget_where_there_is_one(make_view):
    decision = decide(All(), make_view(seconds=(1, 1, 1), memory_mb={1: 512}, memory_budgets={2: 511_900_000}))
    assert [plan.device for plan in decision.plans] == [0, 1]
    assert decision.left_out == ((2, "memory: needs 512 MB, has 511 MB"),)


def test_a_margin_on_predictions_is_taken_from_declared_and_learned_budgets(make_view):
    """512 MB are needed; with a margin of 1.1, 563.2 MB must be there."""
    budgets = {"memory_mb": {0: 563, 1: 564, 2: 600}, "memory_budgets": {2: 563_000_000}}
    decision = decide(All(), make_view(seconds=(1, 1, 1), memory_margin=1.1, **budgets))
    assert [plan.device for plan in decision.plans] == [1]
    reason = "memory: needs 512 MB, has 511 MB, less a margin of 1.1"
    assert list(decision.left_out) == [(0, reason), (2, reason)]


def test_a_device_without_samples_is_left_out(make_view):
    decision = decide(All(), make_view(seconds=(1, 1), samples=(0, 10)))
    assert [plan.device for plan in decision.plans] == [1]
    assert decision.left_out == ((0, "data: no training samples"),)


def test_random_cohort_is_uniform_over_those_that_fit(make_view):
    counts = Counter()
    for seed in range(300):
        counts.update(chosen(RandomCohort(cohort=2), make_view(seconds=(1, 1, 1, 1), memory_mb={3: 1}, seed=seed)))
    assert sum(counts.values()) == 600
    assert set(counts) == {0, 1, 2}
    assert all(170 < counts[device] < 230 for device in counts)  # 200 each; the seeds are fixed, so is the outcome


def test_the_reason_of_random_cohort_has_both_numbers(make_view):
    assert decide(RandomCohort(cohort=0.5), make_view()).plans[0].reasons == ("random: 2 of 4",)


def test_only_devices_that_were_drawn_are_checked(make_view):
    view = make_view(seconds=range(1, 101))
    chosen(RandomCohort(cohort=3), view)
    assert len(view.estimator.calls) == 3


def test_devices_of_one_class_share_an_estimate(make_view):
    view = make_view(seconds=(1, 2))
    crowd = make_view(
        seconds=(1,) * 6,
        samples=(10, 10, 10, 20, 10, 10),
        profiles=[view.profiles[0]] * 4 + [view.profiles[1]] * 2,
        links={5: 3},
    )
    pool = Candidates(crowd, Decision())
    costs = [pool.estimate(device).seconds for device in crowd.devices]
    assert costs == [crowd.estimate(device, crowd.new_plan(device)).seconds for device in crowd.devices]
    assert crowd.estimator.calls[:4] == [0, 3, 4, 5]  # another's samples, profile, link state


def test_fastest_takes_the_quickest_and_its_reason_has_the_seconds(make_view):
    decision = decide(Fastest(cohort=2), make_view(seconds=(4, 1, 3, 1.5)))
    assert [(plan.device, plan.reasons) for plan in decision.plans] == [
        (1, ("fastest: 1 s",)),
        (3, ("fastest: 1.5 s",)),
    ]


def test_fastest_skips_devices_without_the_memory_and_breaks_ties_by_number(make_view):
    assert chosen(Fastest(cohort=2), make_view(seconds=(1, 2, 2, 2), memory_mb={0: 1})) == [1, 2]


def test_deadline_takes_all_that_fit_and_lists_the_others(make_view):
    decision = decide(ByDeadline(deadline_s=2.5), make_view(seconds=(4, 1, 2.5, 1), memory_mb={3: 100}))
    assert [plan.device for plan in decision.plans] == [1, 2]
    assert decision.plans[0].reasons == ("deadline: 1 s of 2.5 s",)
    assert decision.left_out == (
        (0, "deadline: needs 4 s, has 2.5 s"),
        (3, "memory: needs 512 MB, has 100 MB"),
    )
    assert decision.close_after_s is None


def test_deadline_may_draw_a_cohort(make_view):
    seen = set()
    for seed in range(20):
        decision = decide(ByDeadline(deadline_s=2, cohort=1), make_view(seconds=(1, 2, 9), seed=seed))
        seen.update(plan.device for plan in decision.plans)
    assert seen == {0, 1}


@pytest.mark.parametrize(
    ("cohort", "num_devices", "size"),
    [(3, 8, 3), (1, 8, 1), (9, 8, 8), (1.0, 8, 8), (0.1, 8, 1), (0.01, 8, 1), (0.3, 8, 2), (0.5, 5, 3), (0.1, 100, 10)],
)
def test_a_cohort_is_a_number_or_a_share_of_all_devices(cohort, num_devices, size):
    assert cohort_size(cohort, num_devices) == size


@pytest.mark.parametrize("cohort", [0, -1, 0.0, 1.5, float("nan"), True, "ten", None])
@pytest.mark.parametrize("kind", [RandomCohort, Fastest])
def test_any_other_cohort_is_refused_by_name_and_value(kind, cohort):
    with pytest.raises(ValueError, match=f"^cohort is {cohort!r}"):
        kind(cohort=cohort)


def test_deadlines_are_checked():
    with pytest.raises(ValueError, match=r"^deadline_s is 0: expected `float` > 0.0$"):
        ByDeadline(deadline_s=0)
    with pytest.raises(ValueError, match=r"^cohort is 0; allowed: a whole number of devices"):
        ByDeadline(deadline_s=10, cohort=0)
