"""Parts of each stage, and the division into groups, which is compared with all divisions."""

from itertools import combinations, pairwise

from fedbonsai.learning.parts.part import Part, path
from fedbonsai.policies.progressive.stages import (
    choose_groups,
    collect_part,
    grouped,
    head_part,
    imitate_part,
    proxies,
    shrunk_path,
    train_part,
)
from hypothesis import given
from hypothesis import strategies as st

NAMES = ("a", "b", "c", "d", "head")
GROUPS = (("a",), ("b", "c"), ("d",))


def test_groups_end_with_the_named_blocks_and_the_head_is_in_none():
    assert grouped(NAMES, ("a", "c")) == GROUPS
    assert grouped(NAMES, ()) == (("a", "b", "c", "d"),)
    assert grouped(NAMES, ("a", "b", "c")) == (("a",), ("b",), ("c",), ("d",))
    assert grouped(NAMES, ("d",)) == (("a", "b", "c", "d"),)
    assert grouped(NAMES, ("a", "a")) == (("a",), ("b", "c", "d"))


def test_a_stage_trains_its_group_behind_frozen_ones_and_before_proxies():
    assert proxies(GROUPS, 1) == ("proxy@b..c", "proxy@d..d")
    assert [train_part(GROUPS, "head", stage) for stage in (0, 1, 2)] == [
        Part(blocks=("a", "head"), trained=("a", "head"), auxiliaries=("proxy@b..c", "proxy@d..d")),
        Part(blocks=("a", "b", "c", "head"), trained=("b", "c", "head"), auxiliaries=("proxy@d..d",)),
        Part(blocks=NAMES, trained=("d", "head")),
    ]
    assert [path(train_part(GROUPS, "head", stage), NAMES) for stage in (0, 1, 2)] == [
        ("a", "proxy@b..c", "proxy@d..d", "head"),
        ("a", "b", "c", "proxy@d..d", "head"),
        NAMES,
    ]


def test_with_the_head_alone_no_proxy_is_trained():
    part = head_part(GROUPS, "head", 0)
    assert (part.blocks, part.trained, part.auxiliaries) == (("a", "head"), ("head",), ("proxy@b..c", "proxy@d..d"))
    assert (part.trained_auxiliaries, part.learns) == ((), True)


def test_a_proxy_is_taught_by_the_blocks_that_it_will_replace():
    assert imitate_part(GROUPS, 2) == Part(blocks=("a", "b", "c", "d"), trained=(), auxiliaries=("proxy@d..d",))
    assert imitate_part(GROUPS, 1) == Part(blocks=("a", "b", "c"), trained=(), auxiliaries=("proxy@b..c",))


def test_statistics_are_of_all_groups_but_the_last():
    assert collect_part(GROUPS) == Part(blocks=("a", "b", "c"), trained=())


def test_while_a_proxy_is_taught_it_stands_for_its_group():
    assert path(shrunk_path(GROUPS, "head", 2), NAMES) == ("a", "b", "c", "proxy@d..d", "head")
    assert path(shrunk_path(GROUPS, "head", 1), NAMES) == ("a", "proxy@b..c", "proxy@d..d", "head")
    assert shrunk_path(GROUPS, "head", 1).trained == ()


BASE = 7


def peak_of(trained, frozen=0, behind=0):
    """Memory of a stage: a base, the sizes of its trained blocks, so much for each frozen one and for each proxy."""

    def peak(groups, stage):
        blocks = [name for group in groups for name in group]
        assert blocks == [name for name in NAMES if name in blocks]
        held = frozen * sum(len(group) for group in groups[:stage])
        return BASE + sum(trained[name] for name in groups[stage]) + held + behind * len(groups[stage + 1 :])

    return peak


def chosen(names, most, peak):
    return choose_groups(names, most, peak=peak, frozen=BASE)


def worst(groups, peak):
    return max(peak(groups, stage) for stage in range(len(groups)))


def divisions(names, most):
    """All divisions into at most so many groups."""
    for count in range(1, most + 1):
        for inner in combinations(range(1, len(names)), count - 1):
            yield tuple(names[start:end] for start, end in pairwise([0, *inner, len(names)]))


def sized(sizes):
    return dict(zip(NAMES, sizes, strict=False))


sizes_of_four = st.lists(st.integers(0, 20), min_size=4, max_size=4).map(sized)


@given(trained=sizes_of_four, most=st.integers(1, 6))
def test_where_memory_is_a_sum_no_other_division_needs_less(trained, most):
    peak = peak_of(trained)
    found = chosen(NAMES, most, peak)
    assert tuple(name for group in found for name in group) == NAMES[:-1]
    assert len(found) <= most
    best = min(worst(groups, peak) for groups in divisions(NAMES[:-1], most))
    assert worst(found, peak) == best
    assert len(found) == min(len(groups) for groups in divisions(NAMES[:-1], most) if worst(groups, peak) == best)


@given(trained=sizes_of_four, frozen=st.integers(0, 5), behind=st.integers(0, 5), most=st.integers(1, 6))
def test_elsewhere_no_single_boundary_can_move_to_need_less(trained, frozen, behind, most):
    peak = peak_of(trained, frozen, behind)
    found = chosen(NAMES, most, peak)
    assert tuple(name for group in found for name in group) == NAMES[:-1]
    assert worst(found, peak) <= worst((NAMES[:-1],), peak)
    ends = [sum(map(len, found[:number])) for number in range(len(found) + 1)]
    for number in range(1, len(found)):
        for step in (-1, 1):
            moved = [*ends[:number], ends[number] + step, *ends[number + 1 :]]
            if moved == sorted(set(moved)):
                groups = tuple(NAMES[start:end] for start, end in pairwise(moved))
                assert worst(groups, peak) >= worst(found, peak)


def test_a_division_by_hand():
    # 10 | 2 3 5: the worst is 10; in three groups too, so there are two.
    sizes = sized([10, 2, 3, 5])
    assert chosen(NAMES, 4, peak_of(sizes)) == (("a",), ("b", "c", "d"))
    assert chosen(NAMES, 1, peak_of(sizes)) == (("a", "b", "c", "d"),)
    # With 8 for each proxy 8 | 8 | 8 8 needs 8 + 16 at worst, as does 8 8 | 8 8, which has one group less.
    assert chosen(NAMES, 3, peak_of(sized([8, 8, 8, 8]), behind=8)) == (("a", "b"), ("c", "d"))


def test_a_large_block_is_alone():
    # 16 | 1 2 3 has 16 and 6; any other boundary has more at worst.
    found = chosen(NAMES, 2, peak_of(sized([16, 1, 2, 3])))
    assert found == (("a",), ("b", "c", "d"))


def test_two_blocks_are_one_group():
    assert chosen(("a", "head"), 4, peak_of({"a": 1})) == (("a",),)
