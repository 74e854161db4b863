"""Where EcoFed and SplitFed cut, who uploads, and whose views are replayed."""

import pytest
from fedbonsai.learning.part import Part
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.ecofed import EcoFed
from fedbonsai.policies.split import SplitFed


def view_of(device, *, age=1, name=None):
    """A buffered view of a device, cut behind conv."""
    return ("trunk", "conv", device, name or f"v{device}", age, 100)


def plans(policy, make_view, make_plan, *, cohort=(0, 1), **changes):
    view = make_view(hosts=2, **changes)
    decision = Decision(plans=tuple(make_plan(device) for device in cohort))
    return policy.decide(view, policy.init(), decision)[0].plans


def told(found):
    return [(plan.device, plan.split.view) for plan in found]


def test_splitfed_shares_the_devices_out_over_the_hosts(make_view, make_plan):
    found = plans(SplitFed(), make_view, make_plan, cohort=(0, 1, 2))
    assert [plan.split.host for plan in found] == [0, 1, 0]
    assert all(plan.part == Part(blocks=("conv",), trained=("conv",)) for plan in found)
    assert {plan.split.mode for plan in found} == {"splitfed"}


def test_in_a_round_of_uploads_all_upload(make_view, make_plan):
    found = plans(EcoFed(period=3), make_view, make_plan, version=3, replay=[view_of(0)])
    assert told(found) == [(0, None), (1, None)]
    for plan in found:
        assert plan.part == Part(blocks=("conv",), trained=())
        assert (plan.split.cut, plan.split.depth, plan.split.mode) == ("conv", "conv", "ecofed")


def test_between_them_as_many_views_as_the_cohort_has_devices_are_drawn_from_all(make_view, make_plan):
    replay = [view_of(device) for device in range(4)]
    drawn = [told(plans(EcoFed(), make_view, make_plan, version=1, seed=seed, replay=replay)) for seed in range(40)]
    assert all(len(found) == 2 and found == sorted(found) for found in drawn)
    assert all(name == f"v{device}" for found in drawn for device, name in found)
    assert {device for found in drawn for device, _ in found} == {0, 1, 2, 3}


def test_the_newest_view_of_a_device_is_taken(make_view, make_plan):
    replay = [view_of(0, age=3, name="old"), view_of(0, age=1, name="new"), view_of(0, age=2, name="middle")]
    assert told(plans(EcoFed(), make_view, make_plan, cohort=(0,), version=1, replay=replay)) == [(0, "new")]


def test_where_there_are_too_few_views_devices_without_one_upload(make_view, make_plan):
    found = plans(EcoFed(), make_view, make_plan, cohort=(0, 1, 2), version=1, replay=[view_of(1)])
    assert told(found) == [(0, None), (1, "v1"), (2, None)]


def test_devices_in_flight_are_left_alone_and_rounds_that_have_begun_too(make_view, make_plan):
    busy = {1: make_plan(1)}
    found = plans(EcoFed(), make_view, make_plan, cohort=(0,), version=1, in_flight=busy, replay=[view_of(1)])
    assert told(found) == [(0, None)]
    (plan,) = plans(EcoFed(), make_view, make_plan, cohort=(0,), dispatched=1)
    assert plan.split is None


@pytest.mark.parametrize(
    ("bits", "names"), [(0, []), (4, ["uniform", "entropy"]), (8, ["uniform", "entropy"])], ids=str
)
def test_the_chain_for_activations(make_view, make_plan, bits, names):
    (plan,) = plans(EcoFed(bits=bits), make_view, make_plan, cohort=(0,))
    assert [codec.name for codec in plan.split.codec_up] == names
    assert list(EcoFed(bits=bits).needs_codecs) == names


def test_one_bit_is_refused():
    with pytest.raises(ValueError, match="bits is 1; it must be 0 or between 2 and 8"):
        EcoFed(bits=1)
