"""The cut that a device gets, of four blocks with costs from a table."""

from dataclasses import dataclass, field

import pytest
from fedbonsai.learning.parts.part import Part
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.partitioning.cuts import MOST_TRIED, allowed_cuts, cheapest
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.local_loss import LocalLoss
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.plan import Split
from fedbonsai.policies.policy import chain
from fedbonsai.policies.selection.plain import All, RandomCohort
from msgspec.structs import replace

BLOCKS = ("a", "b", "c", "d")
WHOLE = Part(blocks=BLOCKS, trained=BLOCKS)
MB = 1_000_000


@dataclass
class Table:
    """Seconds, bytes and megabytes of memory of a plan by its cut, "" for a whole model."""

    rows: dict[str, tuple[float, int, int]]
    asked: list[tuple[int, str]] = field(default_factory=list)

    def __call__(self, device, plan):
        cut = plan.split.cut if plan.split else ""
        self.asked.append((device, cut))
        seconds, num_bytes, memory = self.rows[cut]
        return Estimate(seconds=seconds, up_bytes=num_bytes, down_bytes=num_bytes, peak_memory_bytes=memory * MB)


COSTS = {"a": (4.0, 9, 1), "b": (3.0, 8, 2), "c": (2.0, 7, 3), "": (1.0, 6, 9)}


@pytest.fixture(name="decide")
def decide_fixture(make_view, make_plan):
    """``decide(policy, costs)``: cuts by device, and the devices left out."""

    def decide(policy, costs, *, cohort=(0,), memory_mb=1000, **changes):
        estimator = Table(costs)
        devices = max(cohort) + 1
        view = make_view(
            seconds=(1,) * devices,
            memory_mb=dict.fromkeys(range(devices), memory_mb),
            estimator=estimator,
            plan_maker=lambda device: replace(make_plan(device), part=WHOLE),
            **changes,
        )
        plans = tuple(replace(make_plan(device), part=WHOLE) for device in cohort)
        decision, _ = policy.decide(view, policy.init(), Decision(plans=plans))
        cuts = {plan.device: plan.split.cut if plan.split else "" for plan in decision.plans}
        return cuts, decision.left_out, estimator.asked

    return decide


def test_the_fewest_seconds_that_fit(decide):
    assert decide(SplitFed(cut="auto"), COSTS)[0] == {0: "c"}
    assert decide(SplitFed(cut="auto"), COSTS, memory_mb=2)[0] == {0: "b"}
    assert decide(SplitFed(cut="auto"), COSTS, memory_mb=1)[0] == {0: "a"}


def test_a_model_stays_whole_only_where_that_is_allowed_faster_and_fits(decide):
    whole = SplitFed(cut="auto", whole=True)
    assert decide(whole, COSTS)[0] == {0: ""}
    assert decide(whole, COSTS, memory_mb=8)[0] == {0: "c"}
    assert decide(whole, COSTS | {"": (5.0, 6, 9)})[0] == {0: "c"}
    assert decide(whole, COSTS | {"": (2.0, 7, 9)})[0] == {0: "c"}  # a tie: the first


def test_no_cut_before_the_first_or_behind_the_trunk(decide):
    slow_behind = {"a": (1.0, 1, 1), "b": (2.0, 1, 1), "c": (3.0, 1, 1)}
    assert decide(SplitFed(cut="auto", first="b"), slow_behind)[0] == {0: "b"}
    assert decide(SplitFed(first="b"), slow_behind)[0] == {0: "b"}
    cuts, _, asked = decide(EcoFed(cut="auto", depth="b"), COSTS)
    assert (cuts, asked) == ({0: "b"}, [(0, "a"), (0, "b")])
    assert decide(EcoFed(cut="auto", first="b", depth="c"), slow_behind)[0] == {0: "b"}


def test_ties_go_to_the_fewest_bytes_then_to_the_shallowest(decide):
    assert decide(SplitFed(cut="auto"), {"a": (1.0, 9, 1), "b": (1.0, 5, 1), "c": (1.0, 7, 1)})[0] == {0: "b"}
    assert decide(SplitFed(cut="auto"), {"a": (2.0, 5, 1), "b": (1.0, 5, 1), "c": (1.0, 5, 1)})[0] == {0: "b"}


@pytest.mark.parametrize(
    "policy", [SplitFed(cut="auto"), LocalLoss(cut="auto"), EcoFed(cut="auto", depth="c")], ids=repr
)
def test_a_device_that_no_cut_fits_is_left_out_with_the_least_memory_needed(decide, policy):
    costs = {"a": (1.0, 1, 30), "b": (1.0, 1, 20), "c": (1.0, 1, 40)}
    cuts, left_out, _ = decide(policy, costs, cohort=(0, 1), memory_mb=10, memory_budgets={1: 25 * MB})
    assert cuts == {1: "b"}  # the learned memory budget takes precedence over the profile
    assert left_out == ((0, "memory: needs at least 20 MB, has 10 MB"),)


@pytest.mark.parametrize("policy", [SplitFed(cut="b"), LocalLoss(cut="b"), EcoFed(cut="b")], ids=repr)
def test_a_given_cut_must_fit_too(decide, policy):
    cuts, left_out, _ = decide(policy, COSTS, memory_mb=1)
    assert (cuts, left_out) == ({}, ((0, "memory: needs 2 MB, has 1 MB"),))


@pytest.mark.parametrize("selection", [All(), RandomCohort(cohort=1.0), chain(All(), RandomCohort(cohort=3))], ids=repr)
def test_a_selection_leaves_memory_to_a_policy_behind_it_that_cuts(make_view, make_plan, selection):
    view = make_view(
        seconds=(1, 1, 1),
        samples=(10, 0, 10),
        memory_mb={0: 3, 1: 3, 2: 9},
        estimator=Table(COSTS),
        plan_maker=lambda device: replace(make_plan(device), part=WHOLE),
    )
    for both in (chain(selection, SplitFed(cut="c")), chain(chain(selection), chain(SplitFed(cut="c")))):
        decision, _ = both.decide(view, both.init(), Decision())
        assert [plan.device for plan in decision.plans] == [0, 2]
        assert decision.left_out == ((1, "data: no training samples"),)
    decision, _ = selection.decide(view, selection.init(), Decision())
    assert [plan.device for plan in decision.plans] == [2]


def test_only_devices_of_the_cohort_are_estimated(decide):
    assert {device for device, _ in decide(SplitFed(cut="auto"), COSTS, cohort=(1, 4))[2]} == {1, 4}


def test_allowed_cuts():
    assert allowed_cuts(BLOCKS, "auto") == ("a", "b", "c")
    assert allowed_cuts(BLOCKS, "auto", first="b", last="b") == ("b",)
    assert allowed_cuts(BLOCKS, "", first="b") == ("b",)
    assert allowed_cuts(BLOCKS, "c", first="b", last="c") == ("c",)
    for cut, first, last, sentence in (
        ("d", "", "", "cut is 'd'; this model can be cut behind: a, b, c"),
        ("auto", "x", "", "cut is 'x'; this model can be cut behind: a, b, c"),
        ("a", "b", "", "cut is 'a'; it may be behind: b, c"),
        ("c", "", "b", "cut is 'c'; it may be behind: a, b"),
        ("auto", "c", "b", "cut is 'auto' from 'c' to 'b'; it may be behind: no block"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            allowed_cuts(BLOCKS, cut, first=first, last=last)
    with pytest.raises(ValueError, match="this model can be cut behind: no block"):
        allowed_cuts(("a",), "auto")


def test_the_first_of_equal_plans_is_taken(make_view, make_plan):
    plans = [make_plan(0, reasons=("one",)), make_plan(0, reasons=("two",))]
    assert cheapest(make_view(), plans).reasons == ("one",)


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        (SplitFed, {"whole": True}, "whole is true and cut is ''; models stay whole only where cut is 'auto'"),
        (EcoFed, {"cut": "auto"}, "cut is 'auto' and depth is ''; depth must name"),
        (EcoFed, {"refresh": 2}, "refresh is 2; it counts only where uploads is 'views'"),
        (EcoFed, {"uploads": "all"}, "uploads is 'all'"),
    ],
)
def test_fields_that_contradict_each_other(kind, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**fields)


@pytest.mark.parametrize("best", [0, 1, 40, 97, 98, 99])
def test_of_very_many_cuts_a_part_is_estimated_and_the_best_of_a_valley_is_found(make_view, make_plan, best):
    blocks = tuple(f"b{number:02}" for number in range(100))
    estimator = Table({name: (1.0 + abs(number - best), 1, 1) for number, name in enumerate(blocks)})
    view = make_view(seconds=(1,), memory_mb={0: 1000}, estimator=estimator)
    plan = make_plan(0)
    alternatives = [replace(plan, split=Split(cut=name)) for name in blocks]
    found = cheapest(view, alternatives)
    assert found.split.cut == blocks[best]
    assert len(estimator.asked) == len(set(estimator.asked)) <= MOST_TRIED + 8


def test_where_no_cut_fits_the_least_memory_of_all_estimates_is_reported(make_view, make_plan):
    estimator = Table({"a": (1.0, 1, 30), "b": (2.0, 1, 20), "c": (3.0, 1, 40)})
    view = make_view(seconds=(1,), memory_mb={0: 10}, estimator=estimator)
    told = cheapest(view, [replace(make_plan(0), split=Split(cut=name)) for name in "abc"])
    assert told == "memory: needs at least 20 MB, has 10 MB"
