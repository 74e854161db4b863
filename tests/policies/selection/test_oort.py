"""Oort: each term of its utility, exploration, and the pacer, checked by hand."""

import math

import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.selection.oort import Oort, statistical_utility

PLAIN = {"clip_percentile": 100.0, "staleness": 0.0, "penalty": 0.0}


def decide(policy, view, state=None):
    return policy.decide(view, state or policy.init(), Decision())


def chosen(policy, view):
    return [plan.device for plan in decide(policy, view)[0].plans]


def test_statistical_utility_is_samples_times_root_mean_square_loss(make_report):
    assert statistical_utility(make_report(0, samples=10, loss=0.5)) == 5.0
    assert statistical_utility(make_report(0, samples=10, loss=None)) == 0.0
    assert statistical_utility(make_report(0, samples=10, loss=math.inf)) == 0.0


def test_utilities_are_shares_of_the_clip(make_report):
    reports = [make_report(device, samples=10, loss=loss) for device, loss in enumerate((0.1, 0.2, 0.4))]
    assert Oort(cohort=1, **PLAIN).utilities(reports, 1, 1.0) == pytest.approx([0.25, 0.5, 1.0])
    median = Oort(cohort=1, **PLAIN | {"clip_percentile": 50.0})
    assert median.utilities(reports, 1, 1.0) == pytest.approx([0.5, 1.0, 1.0])


def test_utilities_of_devices_that_all_fitted_perfectly_are_zero(make_report):
    assert Oort(cohort=1, **PLAIN).utilities([make_report(0, loss=0.0)], 1, 1.0).tolist() == [0.0]


def test_an_older_participation_has_a_higher_utility(make_report):
    """Round 8, last seen in rounds 1 and 4: sqrt(0.1 ln 8 / 1) and half of it."""
    policy = Oort(cohort=1, penalty=0.0)
    reports = [make_report(0, loss=1.0, version=0), make_report(1, loss=1.0, version=3)]
    bonus = math.sqrt(0.1 * math.log(8))
    assert policy.utilities(reports, 7, 1.0) == pytest.approx([1 + bonus, 1 + bonus / 2])


def test_slower_than_preferred_is_penalised_and_faster_is_not_rewarded(make_report):
    policy = Oort(cohort=1, clip_percentile=100.0, staleness=0.0, penalty=2.0)
    reports = [make_report(device, loss=1.0, seconds=seconds) for device, seconds in enumerate((1.0, 2.0, 4.0))]
    assert policy.utilities(reports, 1, 2.0) == pytest.approx([1.0, 1.0, 0.25])


def test_exploitation_takes_the_best_when_the_cut_is_sharp(make_view, make_report):
    reports = [make_report(device, loss=loss) for device, loss in enumerate((0.1, 0.9, 0.2, 1.0))]
    policy = Oort(cohort=2, exploration=0.0, cutoff=1.0, **PLAIN)
    for seed in range(5):
        decision, _ = decide(policy, make_view(version=1, reports=reports, seed=seed))
        assert [(plan.device, plan.reasons) for plan in decision.plans] == [
            (1, ("oort: utility 0.9",)),
            (3, ("oort: utility 1",)),
        ]


def test_exploitation_draws_among_those_near_the_cut(make_view, make_report):
    reports = [make_report(device, loss=loss) for device, loss in enumerate((0.1, 0.9, 0.88, 1.0))]
    policy = Oort(cohort=1, exploration=0.0, cutoff=0.85, **PLAIN)
    found = {chosen(policy, make_view(version=1, reports=reports, seed=seed))[0] for seed in range(30)}
    assert found == {1, 2, 3}


def test_exploitation_goes_below_the_cut_when_the_best_do_not_fit(make_view, make_report):
    reports = [make_report(device, loss=loss) for device, loss in enumerate((0.1, 0.9, 0.2, 1.0))]
    view = make_view(version=1, reports=reports, memory_mb={3: 1})
    assert chosen(Oort(cohort=2, exploration=0.0, cutoff=1.0, **PLAIN), view) == [1, 2]


def test_exploration_takes_its_share_and_prefers_the_fast(make_view, make_report):
    reports = [make_report(device, loss=1.0) for device in range(2)]
    explored = []
    for seed in range(100):
        view = make_view(seconds=(1, 1, 1, 1000), version=1, reports=reports, seed=seed)
        found = chosen(Oort(cohort=2, exploration=0.5, exploration_decay=1.0), view)
        assert len(set(found) & {0, 1}) == 1
        explored += set(found) & {2, 3}
    assert explored.count(2) > 95
    assert len(explored) == 100


def test_in_the_first_round_everyone_is_explored(make_view):
    decision, _ = decide(Oort(cohort=4), make_view())
    assert [plan.reasons for plan in decision.plans] == [(f"oort: explored, {s} s",) for s in (1, 2, 3, 4)]


def test_exploration_decays_to_its_floor():
    policy = Oort(cohort=1, exploration=0.8, exploration_decay=0.5, exploration_floor=0.3)
    assert [policy.explored_share(version) for version in range(4)] == pytest.approx([0.8, 0.4, 0.3, 0.3])
    assert Oort(cohort=1, exploration=0.1).explored_share(0) == 0.1


def test_the_first_preferred_duration_is_the_median_estimate(make_view):
    _, state = decide(Oort(cohort=1), make_view(seconds=(1, 2, 9)))
    assert state == {"version": 0, "preferred_s": 2.0, "step_s": 2.0, "achieved": []}


def test_the_pacer_relaxes_when_a_window_had_less_utility(make_view, make_report):
    policy = Oort(cohort=1, pacer_step_s=1.5, pacer_window=2)
    state = policy.init()
    preferred = []
    for version, loss in enumerate([None, 0.9, 0.8, 0.7, 0.6, 0.9, 0.9]):
        reports = [] if loss is None else [make_report(0, loss=loss, version=version - 1), make_report(1, loss=5.0)]
        _, state = decide(policy, make_view(version=version, reports=reports), state)
        preferred.append(state["preferred_s"])
    # Device 1 took part in version 0 only. At version 4 (9 + 50, 8) against (7, 6) is less, so T grows;
    # at version 6 (7, 6) against (9, 9) is more, so it stays.
    assert preferred == [1.5, 1.5, 1.5, 1.5, 3.0, 3.0, 3.0]
    assert state["achieved"] == pytest.approx([7, 6, 9, 9])


def test_a_version_is_counted_once(make_view, make_report):
    policy = Oort(cohort=1)
    view = make_view(version=1, reports=[make_report(0, loss=0.5)])
    _, once = decide(policy, view)
    _, twice = decide(policy, view, once)
    assert once["achieved"] == twice["achieved"] == [5.0]


def test_fields_are_checked():
    with pytest.raises(ValueError, match=r"^exploration is 3: expected `float` <= 1.0$"):
        Oort(cohort=1, exploration=3)
    with pytest.raises(ValueError, match=r"^pacer_window is 0: expected `int` >= 1$"):
        Oort(cohort=1, pacer_window=0)
