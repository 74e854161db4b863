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


@pytest.fixture(name="engine", scope="module")
def engine_fixture():
    """After the first version, of which all devices hold the model; half of the records are on disk."""
    server = {"statistics": "batch", "link_memory_bytes": 400_000}
    config = load_config(BASE | {"preset": "resfed", "server": server})
    engine = Engine(config, configured_policy(config))
    for event in engine.events():
        if isinstance(event, VersionClosed):
            yield engine
            engine.close()
            return
    raise AssertionError("no version has closed")


def problem(engine, change):
    saved = engine.saved()["loop"]
    peers = saved["_server"]["links"]["peers"]
    for holder in (peers["shared"], peers):
        for name, value in holder.items():
            if isinstance(value, dict):
                holder[name] = copy.copy(value)
    change(peers, next(iter(peers["shared"]["_messages"])))
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
