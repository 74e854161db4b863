"""Power of choice: a draw by samples, then the highest last-known loss."""

from collections import Counter

import numpy as np
import pytest
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.selection.candidates import weighted_order
from fedbonsai.policies.selection.power_of_choice import PowerOfChoice


def plans(policy, view):
    return policy.decide(view, policy.init(), Decision())[0].plans


def chosen(policy, view):
    return [plan.device for plan in plans(policy, view)]


def test_of_all_candidates_the_highest_losses_win(make_view, make_report):
    view = make_view(reports=[make_report(device, loss=loss) for device, loss in enumerate((0.5, 2.0, 0.1, 1.0))])
    found = plans(PowerOfChoice(cohort=2, candidates=4), view)
    assert [(plan.device, plan.reasons) for plan in found] == [
        (1, ("power of choice: loss 2",)),
        (3, ("power of choice: loss 1",)),
    ]


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_an_unknown_loss_comes_first(make_view, make_report, unknown):
    view = make_view(reports=[make_report(0, loss=5.0), make_report(1, loss=9.0), make_report(2, loss=unknown)])
    found = plans(PowerOfChoice(cohort=2, candidates=4), view)
    assert [(plan.device, plan.reasons) for plan in found] == [
        (2, ("power of choice: loss unknown",)),
        (3, ("power of choice: loss unknown",)),
    ]


def test_candidates_are_drawn_by_samples(make_view):
    counts = Counter()
    for seed in range(400):
        counts.update(
            chosen(PowerOfChoice(cohort=1, candidates=1), make_view(seconds=(1,) * 3, samples=(10, 30, 60), seed=seed))
        )
    assert [counts[device] / 400 for device in range(3)] == pytest.approx([0.1, 0.3, 0.6], abs=0.05)


def test_a_device_outside_the_draw_is_not_chosen_whatever_its_loss(make_view, make_report):
    losses = [make_report(device, loss=1.0 + device) for device in range(4)]
    found = {
        chosen(PowerOfChoice(cohort=1, candidates=2), make_view(reports=losses, seed=seed))[0] for seed in range(30)
    }
    assert found == {1, 2, 3}  # 0 has the lowest loss of any pair


def test_those_that_do_not_fit_are_not_candidates(make_view, make_report):
    view = make_view(reports=[make_report(3, loss=9.0)], samples=(1, 1, 1, 1000), memory_mb={3: 100})
    assert chosen(PowerOfChoice(cohort=3, candidates=3), view) == [0, 1, 2]


def test_fewer_candidates_than_cohort_is_refused():
    with pytest.raises(ValueError, match=r"^candidates is 3; allowed: at least cohort, which is 4$"):
        PowerOfChoice(cohort=4, candidates=3)


def test_a_share_too_small_for_the_number_is_refused_when_the_fleet_is_known(make_view):
    with pytest.raises(ValueError, match=r"^candidates is 0.5, 2 of 4 devices; allowed: at least the 3 of the cohort"):
        plans(PowerOfChoice(cohort=3, candidates=0.5), make_view())


def test_second_draws_are_proportional_among_those_left():
    """After 2 (weight 0 comes last), P(first = 1) = 3/4, and then the other follows."""
    orders = Counter(
        tuple(weighted_order(np.random.default_rng(seed), [5, 6, 7], np.array([1.0, 3.0, 0.0]))) for seed in range(400)
    )
    assert set(orders) == {(5, 6, 7), (6, 5, 7)}
    assert orders[6, 5, 7] / 400 == pytest.approx(0.75, abs=0.05)
