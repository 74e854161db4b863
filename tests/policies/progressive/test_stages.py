"""Parts of each stage."""

from fedbonsai.learning.parts.part import Part, path
from fedbonsai.policies.progressive.stages import (
    collect_part,
    grouped,
    head_part,
    imitate_part,
    proxies,
    shrunk_path,
    train_part,
)

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
