"""Saved models that links share must be those that the states of devices name, as often as they do."""

import copy

import numpy as np
import pytest

from .saved_engine import after_a_version, problem_of


def linked(link_memory_bytes):
    """An engine after the first version, of which all devices hold the model."""
    return after_a_version(preset="resfed", server={"statistics": "batch", "link_memory_bytes": link_memory_bytes})


@pytest.fixture(name="engine", scope="module")
def engine_fixture():
    """Half of the records are on disk."""
    engine = linked(400_000)
    yield engine
    engine.close()


def problem(engine, change):
    saved = engine.saved()["loop"]
    peers = saved["_server"]["links"]["peers"]
    for holder in (peers["shared"], peers):
        for name, value in holder.items():
            if isinstance(value, dict):
                holder[name] = copy.copy(value)
    change(peers, next(iter(peers["shared"]["_messages"]), None))
    return problem_of(engine, saved)


def not_named(peers, name):
    device = next(device for device in peers["_named"] if device not in peers["_files"])
    del peers["_named"][device]


def named_twice(peers, name):
    device = next(iter(peers["_files"]))
    peers["_named"][device] *= 2


def not_held(peers, name):
    peers["shared"]["_holders"][name] -= 1


def no_packet(peers, name):
    del peers["shared"]["_messages"][name]


def other_size(peers, name):
    peers["shared"]["memory_bytes"] += 1


def damaged_state(peers, name):
    device = next(device for device in peers["_named"] if device not in peers["_files"])
    peers["_entries"][device] = copy.copy(peers["_entries"][device])
    peers["_entries"][device].state = {"head": np.zeros(3, np.uint8)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda peers, name: None, ""),
        (not_named, "link are not those that its state names"),
        (named_twice, "are not counted as often as devices hold them"),
        (not_held, "are not counted as often as devices hold them"),
        (no_packet, "are not those that devices hold"),
        (other_size, "do not add up to their totals"),
        (damaged_state, "the state of the device's end of its link cannot be read"),
    ],
)
def test_each_damage_is_described(engine, change, expected):
    found = problem(engine, change)
    assert expected in found
    assert bool(found) == bool(expected)


@pytest.mark.parametrize("link_memory_bytes", [0, 200_000], ids=["none", "for one record"])
def test_a_budget_without_room_for_a_record_and_its_model_can_be_resumed(link_memory_bytes):
    """The model goes to disk with the first record, before the other devices hold it."""
    engine = linked(link_memory_bytes)
    try:
        assert problem(engine, lambda peers, name: None) == ""
    finally:
        engine.close()
