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


def peak_of(trained, frozen, behind):
    """Memory of a stage: each block has a size where it is trained, and one where it is frozen; each proxy ``behind``."""

    def peak(groups, stage):
        blocks = [name for group in groups for name in group]
        assert blocks == [name for name in NAMES if name in blocks]
        return (
            sum(trained[name] for name in groups[stage])
            + sum(frozen[name] for group in groups[:stage] for name in group)
            + behind * len(groups[stage + 1 :])
        )

    return peak


def worst(groups, peak):
    return max(peak(groups, stage) for stage in range(len(groups)))


def divisions(names, most):
    """All divisions into at most so many groups."""
    for count in range(1, most + 1):
        for inner in combinations(range(1, len(names)), count - 1):
            yield tuple(names[start:end] for start, end in pairwise([0, *inner, len(names)]))


@given(
    trained=st.lists(st.integers(0, 20), min_size=4, max_size=4),
    frozen=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    most=st.integers(1, 6),
)
def test_where_proxies_take_nothing_no_other_division_needs_less(trained, frozen, most):
    peak = peak_of(dict(zip(NAMES, trained, strict=False)), dict(zip(NAMES, frozen, strict=False)), 0)
    found = choose_groups(NAMES, most, peak)
    assert tuple(name for group in found for name in group) == NAMES[:-1]
    assert len(found) <= most
    best = min(worst(groups, peak) for groups in divisions(NAMES[:-1], most))
    assert worst(found, peak) == best
    fewest = min(len(groups) for groups in divisions(NAMES[:-1], most) if worst(groups, peak) == best)
    assert len(found) == fewest


def test_a_division_by_hand():
    # 10 | 2 3 5: the worst is 10; in three groups too, so there are two.
    sizes = {"a": 10, "b": 2, "c": 3, "d": 5}
    assert choose_groups(NAMES, 4, peak_of(sizes, dict.fromkeys(NAMES, 0), 0)) == (("a",), ("b", "c", "d"))
    assert choose_groups(NAMES, 1, peak_of(sizes, dict.fromkeys(NAMES, 0), 0)) == (("a", "b", "c", "d"),)
    # Frozen blocks take memory too: the last stage takes the least where it trains one block behind three.
    even, light = dict.fromkeys(NAMES, 4), dict.fromkeys(NAMES, 3)
    found = choose_groups(NAMES, 4, peak_of(even, light, 0))
    assert worst(found, peak_of(even, light, 0)) == 3 + 3 + 3 + 4


def test_a_boundary_moves_where_proxies_of_several_groups_are_large():
    # The search counts one proxy behind each group; two behind the first take 8 more.
    sizes = {"a": 8, "b": 8, "c": 8, "d": 8}
    peak = peak_of(sizes, dict.fromkeys(NAMES, 0), 8)
    found = choose_groups(NAMES, 3, peak)
    assert worst(found, peak) <= worst((("a",), ("b",), ("c", "d")), peak) == 24


def test_two_blocks_are_one_group():
    assert choose_groups(("a", "head"), 4, lambda groups, stage: 1) == (("a",),)
