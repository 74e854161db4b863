"""The cuts of EcoFed and SplitFed, the devices that upload, and the views that are replayed."""

import pytest
from fedbonsai.learning.parts.part import Part
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.splitfed import SplitFed


def view_of(device, *, age=1, name=None):
    """A buffered view of a device, cut behind conv."""
    return ("trunk", "conv", device, name or f"v{device}", age, 100)


def plans(policy, make_view, make_plan, *, cohort=(0, 1), **changes):
    view = make_view(hosts=2, **changes)
    decision = Decision(plans=tuple(make_plan(device) for device in cohort))
    return policy.decide(view, policy.init(), decision)[0].plans


def told(found):
    return [(plan.device, plan.split.view) for plan in found]


def test_splitfed_distributes_the_devices_over_the_hosts(make_view, make_plan):
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


def test_views_of_devices_in_flight_are_not_replayed(make_view, make_plan):
    busy = {1: make_plan(1)}
    found = plans(EcoFed(), make_view, make_plan, cohort=(0,), version=1, in_flight=busy, replay=[view_of(1)])
    assert told(found) == [(0, None)]


def test_plans_of_a_round_that_has_begun_are_cut_too(make_view, make_plan):
    (plan,) = plans(EcoFed(), make_view, make_plan, cohort=(0,), dispatched=1)
    assert (plan.split.mode, plan.part.trained) == ("ecofed", ())


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


def by_views(make_view, make_plan, *, cohort, replay=(), refresh=0, period=2, **changes):
    """Devices that upload, and devices whose views are replayed."""
    policy = EcoFed(uploads="views", refresh=refresh, period=period)
    changes = {"seconds": (1,) * 8} | changes
    found = plans(policy, make_view, make_plan, cohort=cohort, replay=replay, **changes)
    assert [plan.device for plan in found] == sorted({plan.device for plan in found})
    assert len(found) == len(cohort)
    return (
        [plan.device for plan in found if plan.split.view is None],
        [plan.device for plan in found if plan.split.view is not None],
    )


def test_by_views_all_upload_while_nothing_is_buffered(make_view, make_plan):
    assert by_views(make_view, make_plan, cohort=(0, 1, 2)) == ([0, 1, 2], [])


def test_by_views_one_of_a_period_uploads_in_even_and_odd_rounds(make_view, make_plan):
    replay = [view_of(device) for device in (4, 5, 6, 7)]
    for version in (1, 2, 3):
        uploads, replays = by_views(make_view, make_plan, cohort=(0, 1, 2), replay=replay, version=version)
        assert len(uploads) == 2  # half of three, rounded up
        assert set(uploads) <= {0, 1, 2}
        assert set(replays) <= {4, 5, 6, 7}
    uploads, _ = by_views(make_view, make_plan, cohort=(0, 1, 2), replay=replay, version=1, period=3)
    assert len(uploads) == 1


def test_by_views_devices_without_one_come_first_then_the_oldest_that_is_old_enough(make_view, make_plan):
    replay = [view_of(0, age=3), view_of(1, age=5), view_of(2, age=4), view_of(6), view_of(7)]
    given = {"replay": replay, "version": 9}
    assert by_views(make_view, make_plan, cohort=(0, 1, 2, 3), refresh=3, **given)[0] == [1, 3]
    assert by_views(make_view, make_plan, cohort=(0, 1, 2), refresh=3, **given)[0] == [1, 2]
    assert by_views(make_view, make_plan, cohort=(0, 1, 2), refresh=5, **given)[0] == [1]
    assert by_views(make_view, make_plan, cohort=(0, 1, 2), refresh=6, **given)[0] == []
    assert by_views(make_view, make_plan, cohort=(0, 1, 2), **given)[0] == []  # 0: never again


def test_by_views_more_upload_where_too_few_views_are_buffered(make_view, make_plan):
    found = by_views(make_view, make_plan, cohort=(0, 1, 2, 3), replay=[view_of(3)], version=1)
    assert found == ([0, 1, 2], [3])


def walk(make_view, make_plan, policy, cohorts, *, evict=None):
    """Uploads of each round; ``evict``: a round, and the device whose view is lost before it."""
    since, rounds = {}, []
    for version, cohort in enumerate(cohorts):
        if evict and version == evict[0]:
            del since[evict[1]]
        replay = [view_of(device, age=version - at) for device, at in since.items()]
        found = plans(
            policy, make_view, make_plan, cohort=cohort, replay=replay, version=version, seed=version, seconds=(1,) * 8
        )
        assert len(found) == len(cohort)
        rounds.append([plan.device for plan in found if plan.split.view is None])
        since.update(dict.fromkeys(rounds[-1], version))
    return rounds


def test_devices_drawn_in_odd_rounds_only_upload_by_views_but_not_by_period(make_view, make_plan):
    cohorts = [(0, 1), (2, 3)] * 4
    by_period = walk(make_view, make_plan, EcoFed(), cohorts)
    assert {device for found in by_period for device in found} == {0, 1}
    found = walk(make_view, make_plan, EcoFed(uploads="views"), cohorts)
    assert sorted(device for uploads in found for device in uploads) == [0, 1, 2, 3]  # each once
    assert [len(uploads) for uploads in found] == [2, 1, 0, 1, 0, 0, 0, 0]


def test_over_many_rounds_as_many_upload_by_views_as_by_period(make_view, make_plan):
    cohorts = [(0, 1, 2, 3)] * 20
    by_period = walk(make_view, make_plan, EcoFed(), cohorts)
    by_views = walk(make_view, make_plan, EcoFed(uploads="views", refresh=2), cohorts)
    assert sum(map(len, by_period)) == 40
    assert sum(map(len, by_views)) == 40  # all four at the start, none right after, then two in each round
    assert [len(uploads) for uploads in by_views] == [4, 0, *[2] * 18]
    assert by_views[4:] == [by_views[2], by_views[3]] * 8


def test_a_view_that_is_lost_is_uploaded_again(make_view, make_plan):
    found = walk(make_view, make_plan, EcoFed(uploads="views"), [(0, 1, 2)] * 5, evict=(3, 1))
    assert found == [[0, 1, 2], [], [], [1], []]
