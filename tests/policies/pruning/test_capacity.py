"""The search for a width, against the best of all 1024 widths; and estimates that devices share."""

import math

import pytest
from fedbonsai.policies.plan import Split
from fedbonsai.policies.pruning.capacity import ENOUGH, GRID, MOST_TRIED, NarrowCosts, widest
from msgspec.structs import replace

from .network import WEIGHTS, make_fleet, make_plan, weights


class Recorded:
    """A load, with the widths for which it was called."""

    def __init__(self, load):
        self.load = load
        self.widths = []

    def __call__(self, width):
        self.widths.append(width)
        return self.load(width)


def search(cost, budget):
    """The width that is found, and the widths that were tried."""
    load = Recorded(lambda width: cost(width) / budget)
    return widest(load), load.widths


def test_the_whole_width_is_tried_first_and_alone_where_it_fits():
    assert search(weights, WEIGHTS) == (1.0, [1.0])
    assert search(weights, 2 * WEIGHTS) == (1.0, [1.0])


def test_the_second_guess_is_near_the_square_root_of_the_ratio():
    width, tried = search(weights, WEIGHTS / 4)
    assert tried[1] == pytest.approx(0.5, rel=0.02)
    assert weights(width) <= WEIGHTS / 4  # sqrt(1/4) itself has 11616 weights, of 10928


@pytest.mark.parametrize("floor", [1, 8])
@pytest.mark.parametrize("fixed", [0, 0.3])
def test_never_above_the_budget_and_within_five_percent_of_it_or_the_best_there_is(floor, fixed):
    def cost(width):
        return weights(width, floor) + fixed * WEIGHTS

    every_cost = [cost(number / GRID) for number in range(1, GRID + 1)]
    short, counts = 0, []
    for percent in range(1, 100):
        budget = percent / 100 * cost(1.0)
        width, tried = search(cost, budget)
        counts.append(len(tried))
        fitting = [each for each in every_cost if each <= budget]
        assert (width is None) is (not fitting)
        if width is None:
            continue
        assert width * GRID == int(width * GRID)
        assert cost(width) <= budget
        if cost(width) < ENOUGH * budget:
            short += 1
            assert cost(width) == max(fitting)  # a stair: no width is nearer
    assert short <= 2
    assert max(counts) <= 1 + MOST_TRIED
    assert sum(counts) / len(counts) < 4


@pytest.mark.parametrize(("sizes", "least"), [((512, 512), 0.99), ((16, 32), 0.9), ((8, 16), 0.6)])
def test_on_coarse_stairs_it_comes_near_the_best_width(sizes, least):
    first, second = sizes

    def cost(width):
        return math.ceil(width * first) * math.ceil(width * second)

    every_cost = [cost(number / GRID) for number in range(1, GRID + 1)]
    shares = []
    for percent in range(5, 100):
        budget = percent / 100 * first * second
        width, tried = search(cost, budget)
        assert len(tried) == len(set(tried)) <= 1 + MOST_TRIED
        best = max(each for each in every_cost if each <= budget)
        shares.append(min(1.0, cost(width) / min(best, ENOUGH * budget)))
        assert cost(width) <= budget
    assert min(shares) >= least
    assert sum(shares) / len(shares) > 0.99


def test_nothing_fits():
    assert search(lambda width: 5.0 + width, 4.0)[0] is None
    width, tried = search(lambda width: 5.0, 4.0)  # a cost that no width changes
    assert width is None
    assert len(tried) <= 1 + MOST_TRIED


def test_the_last_estimate_is_that_of_the_narrowest():
    width, tried = search(lambda width: 1.0 if width == 1 / GRID else 2.0, 1.0)
    assert width == 1 / GRID
    assert tried[-1] == 1 / GRID
    assert len(tried) <= 1 + MOST_TRIED


def narrow(plan, width):
    return plan if width == 1 else replace(plan, part=replace(plan.part, width=width))


def test_devices_that_cost_the_same_share_their_estimates():
    fleet = make_fleet(seconds=(1, 2))
    view = make_fleet(
        seconds=(1,) * 6,
        samples=(10, 10, 20, 10, 10, 10),
        profiles=[fleet.profiles[0]] * 4 + [fleet.profiles[1]] * 2,
        links={3: 7},
    )
    costs = NarrowCosts(view, narrow)
    plans = [make_plan(device, reasons=(f"of {device}",)) for device in view.devices]
    found = [costs.of(plan)(0.5) for plan in plans]
    assert found == [view.estimate(plan.device, narrow(plan, 0.5)) for plan in plans]
    assert view.estimator.calls[:4] == [(0, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]  # samples, link, profile


def test_plans_that_differ_in_more_than_their_host_do_not_share():
    view = make_fleet(seconds=(1,) * 3)
    view = make_fleet(seconds=(1,) * 3, profiles=[view.profiles[0]] * 3)
    costs = NarrowCosts(view, narrow)
    plan = make_plan(0)
    front = replace(plan, part=replace(plan.part, blocks=("front",)), split=Split(cut="front", host=0))
    other_host = replace(front, device=1, split=Split(cut="front", host=1))
    assert costs.of(plan)(1.0).flops == 2 * costs.of(front)(1.0).flops
    assert costs.of(other_host)(1.0).flops == costs.of(front)(1.0).flops
    assert len(view.estimator.calls) == 2
    more = replace(plan, training=replace(plan.training, epochs=2))
    assert costs.of(more)(1.0).flops == 2 * costs.of(plan)(1.0).flops


def test_a_deadline_of_the_plan_itself_hides_no_cost():
    view = make_fleet(seconds=(8,))
    plan = make_plan(0, deadline_s=2.0)
    assert view.estimate(0, plan).seconds == 2.0
    assert NarrowCosts(view, narrow).of(plan)(1.0).seconds == 8.0


def test_widths_of_shares_of_the_flops():
    view = make_fleet(seconds=(1, 2), samples=(10, 30))
    costs = NarrowCosts(view, narrow)
    shares = (1.0, 0.5, 0.25, 0.125, 0.0625)
    widths = costs.widths(make_plan(0), shares)
    assert widths[0] == 1.0
    for width, share in zip(widths, shares, strict=True):
        assert 0.95 * share < weights(width) / WEIGHTS <= share
    tried = len(view.estimator.calls)
    assert tried <= 4 * 4
    assert costs.widths(make_plan(1), shares) == widths  # shares do not depend on device or samples
    assert len(view.estimator.calls) == tried


def test_shares_that_the_floor_does_not_allow_are_the_narrowest_part():
    def floored(plan, width):
        return plan if width == 1 else replace(plan, part=replace(plan.part, width=width, min_channels=64))

    view = make_fleet(seconds=(1,))
    # 64 channels in each layer: 3*64 + 64*64 + 64*64 + 64*10 = 9024 weights, 20.6 %
    widths = NarrowCosts(view, floored).widths(make_plan(0), (0.5, 0.2, 0.1))
    assert len(widths) == 2
    assert widths[-1] == 1 / GRID
    assert NarrowCosts(view, floored).of(make_plan(0))(widths[-1]).flops == 6 * 9024 * 10
