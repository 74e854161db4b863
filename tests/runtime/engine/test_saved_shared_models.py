"""Saved models that links share must be those that the states of devices name, as often as they do."""

import copy

import numpy as np
import pytest
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.policy_checks import configured_policy
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.engine.saved_loop import state_problem
from fedbonsai.runtime.events import VersionClosed

from ..resuming import BASE


def after_a_version(link_memory_bytes):
    """An engine after the first version, of which all devices hold the model."""
    server = {"statistics": "batch", "link_memory_bytes": link_memory_bytes}
    config = load_config(BASE | {"preset": "resfed", "server": server})
    engine = Engine(config, configured_policy(config))
    assert any(isinstance(event, VersionClosed) for event in engine.events())
    return engine


@pytest.fixture(name="engine", scope="module")
def engine_fixture():
    """Half of the records are on disk."""
    engine = after_a_version(400_000)
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
    return state_problem(
        saved,
        model=engine.server.store["model"],
        workload=engine.workload,
        profiles=engine._fleet.profiles(),
        hosts=engine.num_hosts,
    )


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
    engine = after_a_version(link_memory_bytes)
    try:
        assert problem(engine, lambda peers, name: None) == ""
    finally:
        engine.close()
