"""Objects with state: every attribute is declared, and the declared ones are saved and restored by their types."""

import dataclasses

import msgspec
import pytest
from fedbonsai.comms.links.broadcast import Broadcast
from fedbonsai.policies.checks.type_check import fields_of, mismatch
from fedbonsai.runtime.checkpointing.types import CONTAINERS, DATACLASSES, ENUMS, STRUCTS, TAGS
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.policy_checks import configured_policy
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.engine.saved_state import check, collect, has_state
from fedbonsai.runtime.errors import Damaged
from fedbonsai.runtime.execution.save_plan import SavePlan
from fedbonsai.runtime.execution.saver import Saver
from fedbonsai.runtime.execution.service import Service

from ..resuming import BASE


def engine_of(**changes):
    config = load_config(BASE | changes)
    return Engine(config, configured_policy(config))


def objects_with_state(start, seen=None):
    """An object with state, and all such objects that are its attributes or theirs."""
    seen = {} if seen is None else seen
    if id(start) not in seen:
        seen[id(start)] = start
        for value in vars(start).values():
            for each in value.values() if isinstance(value, dict) else [value]:
                if has_state(each):
                    objects_with_state(each, seen)
    return list(seen.values())


@pytest.fixture(name="found", scope="module")
def found_fixture():
    """The objects with state of runs under both clocks, one of them in the middle of a run with links that have a memory."""
    virtual, wall = engine_of(preset="resfed"), engine_of(clock="wall")
    events = virtual.events()
    for _ in range(12):
        next(events)
    return [each for engine in (virtual, wall) for each in objects_with_state(engine._loop)]


def test_every_attribute_is_saved_or_declared_not_to_be(found):
    """A new attribute must be in one of the two lists, so that it is not forgotten."""
    kinds = {type(each).__name__ for each in found}
    assert kinds >= {"Loop", "Server", "Store", "Fold", "Peers", "Downlinks", "Broadcast", "VirtualClock", "WallClock"}
    assert kinds >= {
        "Streams",
        "NetworkLinks",
        "Transfers",
        "Costs",
        "StreamCosts",
        "Evaluator",
        "Ledger",
        "ReplayIndex",
        "DeviceHistory",
        "Stopping",
        "OutcomeCounts",
    }
    for each in found:
        kind, attributes = type(each), set(vars(each))
        assert attributes - set(kind.SAVED) - set(kind.NOT_SAVED) == set(), (
            f"{kind.__name__}: saved, or declared not to be?"
        )
        assert set(kind.SAVED) - attributes == set(), f"{kind.__name__}: no such attribute is there to be saved"
        assert not set(kind.SAVED) & set(kind.NOT_SAVED)


def test_the_attributes_of_services_and_savers_are_known(tmp_path):
    """These save without declarations: a new attribute must be considered here."""
    engine = engine_of()
    assert set(vars(Service(engine))) == {"_engine", "_best", "_closed", "_saver", "_events"}
    assert set(vars(engine)) == {
        "config",
        "channel",
        "workload",
        "server",
        "_advice",
        "pool",
        "replay",
        "_distiller",
        "_fleet",
        "_loop",
        "_measured",
    }
    plan = SavePlan(place=str(tmp_path), settings=engine.config.checkpoint, run="r")
    assert set(vars(Saver(engine, plan))) == {"_engine", "_plan", "_checkpoints", "_views"}


def test_a_value_of_another_type_is_refused_with_its_path_and_changes_nothing():
    engine = engine_of()
    saved = collect(engine._loop)
    before = engine.server.model_hash()
    for place, value, sentence in (
        (("_next_id",), -1, "_next_id is -1; it must be at least 0"),
        (("_server", "version"), "3", "_server.version is '3'; it must be a whole number"),
        (("_clock", "_timers"), [(float("nan"), 1)], "_clock._timers[0][0] is nan; it must be at least 0"),
        (("_ledger", "_bytes"), {("across", "weights", 1): 3}, "_ledger._bytes, key "),
        (("_server", "_fold"), {}, "_server._fold is []; it must hold ['_exact', '_sums', '_weights', 'updates']"),
    ):
        *path, last = place
        held = saved
        for name in path:
            held = held[name]
        good, held[last] = held[last], value
        with pytest.raises(Damaged) as caught:
            check(engine._loop, saved)
        assert str(caught.value).startswith(sentence)
        held[last] = good
    check(engine._loop, saved)
    assert engine.server.model_hash() == before


def test_the_table_of_types_is_closed_and_its_tags_are_those_of_the_format():
    """A tag may be added; changing or removing one makes checkpoints unreadable, and needs a new format number."""
    tags = {*CONTAINERS, *ENUMS, *STRUCTS, *DATACLASSES}
    assert set(TAGS.values()) == tags
    assert len(TAGS) == len(tags) + 1  # two kinds of dicts are "dict"
    assert tags >= {
        "counter", "deque", "dict", "frozenset", "list", "ordered-dict", "set", "tuple", "outcome", "array-spec",
        "device-profile", "evaluated", "plan", "report", "view-key", "dispatch", "disruption", "finished", "host-queue",
        "in-flight-plan", "indexed-view", "packet-queue", "link-memory", "link-model", "link-sent", "load", "message", "peer",
        "round", "sealed", "stream-bytes", "stream-charge", "stream-path", "stream-progress", "transfer", "work",
    }  # fmt: skip
    assert all(dataclasses.is_dataclass(kind.type) for kind in DATACLASSES.values())
    assert all(issubclass(kind, msgspec.Struct) for kind in STRUCTS.values())
    for kind in DATACLASSES.values():
        assert set(fields_of(kind.type)) == {field.name for field in dataclasses.fields(kind.type)}


def test_a_broadcast_is_saved_by_the_downlinks_with_all_declared_attributes(found):
    (broadcast,) = {id(each): each for each in found if isinstance(each, Broadcast)}.values()
    held = {name: getattr(broadcast, name) for name in Broadcast.SAVED}
    assert mismatch(held, Broadcast.SAVED) is None
