"""Saved index maps must fit each other, the plans in flight and the models of the experiment."""

import copy

import pytest

from .saved_engine import after_a_version, problem_of

WIDTH = {"name": "width", "levels": [0.5], "unit": "width", "min_channels": 2, "warm_up": 0}
POLICY = [{"name": "asynchronous", "buffer": 2, "concurrency": 1.0}, WIDTH]


@pytest.fixture(name="engine", scope="module")
def engine_fixture():
    """In flight: all but two devices, each with the map of its plan."""
    return after_a_version(policy=POLICY, server={"staleness": {"rule": "polynomial"}})


def problem(engine, change):
    saved = engine.saved()["loop"]
    maps = saved["_server"]["maps"]
    for name in ("_maps", "_messages", "_held", "_sent", "_rankings"):
        maps[name] = copy.copy(maps[name])
    change(maps, next(iter(maps["_maps"])))
    return problem_of(engine, saved)


def other_content(maps, name):
    maps["_maps"][name] = ~maps["_maps"][name]


def no_packet(maps, name):
    del maps["_messages"][name]


def gone(maps, name):
    del maps["_maps"][name]
    del maps["_messages"][name]


def not_in_use(maps, name):
    maps["_sent"].clear()


def shorter_ranking(maps, name):
    key = next(iter(maps["_rankings"]))
    maps["_rankings"][key] = maps["_rankings"][key][:-1]


def of_no_family(maps, name):
    key = next(iter(maps["_rankings"]))
    maps["_rankings"][("tiny", *key[1:])] = maps["_rankings"][key]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda maps, name: None, ""),
        (other_content, "the index maps are not those that were sent"),
        (no_packet, "the index maps are not those that were sent"),
        (gone, "is in flight with the index map '"),
        (not_in_use, "the index maps in use are not those of the plans in flight"),
        (shorter_ranking, "a ranking of channels by 'l1' is of no model of this experiment"),
        (of_no_family, "a ranking of channels by 'l1' is of no model of this experiment"),
    ],
)
def test_each_damage_is_described(engine, change, expected):
    found = problem(engine, change)
    assert expected in found
    assert bool(found) == bool(expected)
