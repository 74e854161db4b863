"""Forged checkpoints with correct hashes: reading one either gives a valid state of this run or raises ``Damaged``."""

import json
import shutil

import fedbonsai
import msgspec
import numpy as np
import pytest
import safetensors.numpy
from fedbonsai.actors.messages.messages import Message
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.runtime.checkpointing.folder import decode_manifest, newest_first
from fedbonsai.runtime.checkpointing.restore import StateDecoder
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.policy_checks import configured_policy
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.errors import ConfigError, Damaged, UnfitCheckpoint
from fedbonsai.runtime.execution.save_plan import SavePlan
from fedbonsai.runtime.execution.saver import Saver
from fedbonsai.runtime.storage import marker

from .forging import forge, graph, mutated
from .resuming import BASE, METHODS, facts, started, told, uninterrupted

IN_FLIGHT = ["fedbuff", "residuals, in flight", "residuals, narrow, in flight", "splitfed, in flight", "ecofed, in flight",
             "deadline, late plans"]  # fmt: skip


def newest(folder):
    """The newest manifest in a folder of checkpoints."""
    name = newest_first(path.name for path in folder.iterdir())[0]
    run = json.loads((folder / name).read_bytes().partition(b"\n")[2])["run"]
    return decode_manifest((folder / name).read_bytes(), name=name, run=run)


def saver_of(config, folder, manifest):
    """A saver that restores a checkpoint into a new engine."""
    engine = Engine(config, configured_policy(config))
    token = marker.decode((folder / marker.NAME).read_bytes()).token
    plan = SavePlan(place=str(folder), settings=config.checkpoint, run=manifest.run, token=token, manifest=manifest)
    return Saver(engine, plan)


@pytest.mark.parametrize("name", IN_FLIGHT)
def test_a_mutated_checkpoint_is_valid_or_damaged(name, tmp_path):
    started(BASE | METHODS[name], tmp_path / "run", stops=2)
    folder, config = tmp_path / "run" / "checkpoints", load_config(BASE | METHODS[name])
    sound = newest(folder)
    root, nodes = graph(folder, sound)
    checking = saver_of(config, folder, sound)
    counts = {"damaged": 0, "value": 0}
    for seed in range(150):
        _, data = mutated(root, nodes, seed)
        forged = forge(folder, sound, data)
        try:
            saved = checking._checkpoints.read(forged)
            checking.check(saved)
        except Damaged:
            counts["damaged"] += 1
            continue
        counts["value"] += 1
        if counts["value"] <= 3:  # a state that passes the checks can be restored
            saver_of(config, folder, forged).start()
    assert counts["damaged"] > 50
    assert counts["value"] > 5
    saver_of(config, folder, sound).start()  # the original is valid


NESTED = [["list"], *(["list", [number]] for number in range(50_000))]
BOMB = [["tuple"], *(["tuple", [number], [number]] for number in range(60)), ["dict", [60], 1]]
ARRAY = safetensors.numpy.save({"": np.zeros(3, np.uint8)})
GRAPHS = {
    "a node that refers to itself": ([0], [["list", [0]]]),
    "a node that refers to one behind it": ([1], [["list", [1]], ["list"]]),
    "a root that refers to no node": ([7], [["list"]]),
    "a negative number of a node": ([-1], [["list"]]),
    "a number of a node that is not whole": ([1.0], [["list"], ["list"]]),
    "true for a number of a node": ([True], [["list"], ["list"]]),
    "two numbers of nodes": ([0, 0], [["list"]]),
    "no graph": (None, 3),
    "a node without a tag": ([0], [[]]),
    "a node whose tag is a number": ([0], [[3]]),
    "code for a tag": ([0], [["os:system", "true"]]),
    "a module of ours for a tag": ([0], [["object", "fedbonsai.actors.messages.messages:Message", "kind", "weights"]]),
    "a list for a key": ([1], [["list"], ["dict", [0], 1]]),
    "a key that takes forever to hash": ([61], BOMB),
    "a key that is nested deeply": (
        [50_001],
        [["tuple"], *(["tuple", [n]] for n in range(50_000)), ["dict", [50_000], 1]],
    ),
    "a key without a value": ([0], [["dict", 1]]),
    "a key twice": ([0], [["dict", 1, 2, 1, 3]]),
    "a member of a set twice": ([0], [["set", 1, 1]]),
    "a field that is missing": ([0], [["stream-bytes", "up", None]]),
    "a field that is not there": ([1], [["tuple"], ["stream-bytes", "up", [0], "down", [0], "__class__", "x"]]),
    "fields in another order": ([1], [["tuple"], ["stream-bytes", "down", [0], "up", [0]]]),
    "a field of another type": ([0], [["stream-bytes", "up", 1, "down", 2]]),
    "a negative size": ([2], [["tuple", -1], ["tuple"], ["stream-bytes", "up", [0], "down", [1]]]),
    "a packet of another length": (
        [1],
        [["array", ARRAY], ["message", "reference", [0], "num_bytes", 4, "kind", "weights", "typical", True]],
    ),
    "a packet that is text": (
        [0],
        [["message", "reference", "packet", "num_bytes", 6, "kind", "weights", "typical", True]],
    ),
    "an array of random bytes": ([0], [["array", b"\xff" * 16]]),
    "two arrays": ([0], [["array", safetensors.numpy.save({"": np.zeros(1), "b": np.zeros(1)})]]),
    "an array in no file": ([0], [["array", None, "/etc/passwd"]]),
    "an array in no file of the checkpoint": ([0], [["tensor", None, "0" * 32 + ".data"]]),
    "bytes in no file": ([0], [["stored", "../../secret"]]),
    "a plan that is an empty mapping": ([0], [["plan", b"\x80"]]),
    "a plan of nothing but depth": ([0], [["plan", b"\x91" * 100_000]]),
    "an unknown outcome": ([0], [["outcome", "won"]]),
    "an outcome that is a list": ([1], [["list"], ["outcome", [0]]]),
    "a date": (msgspec.msgpack.Ext(-1, b"\0" * 4), []),
    "a type of msgpack's own": (msgspec.msgpack.Ext(5, b"x"), []),
}
HEADERS = {
    "nothing": b"",
    "a list of four thousand million nodes": b"\x92\xc0\xdd\xff\xff\xff\xff",
    "a node of four thousand million items": b"\x92\xc0\x91\xdd\xff\xff\xff\xff",
    "four thousand million bytes": b"\x92\xc6\xff\xff\xff\xff",
    "nothing but depth": b"\x91" * 1_000_000,
    "more than a graph": msgspec.msgpack.encode([None, []]) + b"\0",
    "a graph and more": msgspec.msgpack.encode([None, [], []]),
    "text that is not UTF-8": b"\x92\xa1\xff\x90",
}


@pytest.mark.parametrize("data", [*(msgspec.msgpack.encode(held) for held in GRAPHS.values()), *HEADERS.values()],
                         ids=[*GRAPHS, *HEADERS])  # fmt: skip
def test_a_graph_that_was_never_written_is_damaged(data):
    def read(name):
        raise AssertionError(f"{name} was read")

    with pytest.raises(Damaged) as caught:
        StateDecoder(LocalChannel(), files=(), read=read).decode(data)
    assert len(str(caught.value)) < 1000


def test_a_deep_graph_is_read():
    value = StateDecoder(LocalChannel(), files=(), read=bytes).decode(msgspec.msgpack.encode([[50_000], NESTED]))
    for _ in range(50_000):
        (value,) = value
    assert value == []


def test_a_valid_packet_passes_the_channel():
    held = [["array", ARRAY], ["message", "reference", [0], "num_bytes", 3, "kind", "weights", "typical", True]]
    found = StateDecoder(LocalChannel(), files=(), read=bytes).decode(msgspec.msgpack.encode([[1], held]))
    assert isinstance(found, Message)
    assert not found.reference.flags.writeable


def forged_newest(folder, change):
    """Replace the graph of the newest checkpoint of a folder, with correct hashes."""
    sound = newest(folder)
    root, nodes = graph(folder, sound)
    change(nodes)
    forge(folder, sound, msgspec.msgpack.encode([root, nodes]))


def other_model(nodes):
    """The first tensor with more than a few elements gets another shape."""
    node = next(node for node in nodes if node[0] == "tensor" and len(node) == 2)
    node[1] = safetensors.numpy.save({"": np.zeros((7, 7), np.float32)})


def other_tag(nodes):
    next(node for node in nodes if node[0] == "round")[0] = "os:system"


@pytest.mark.parametrize("change", [other_model, other_tag])
def test_the_checkpoint_before_a_forged_one_is_used_and_gives_the_same_bits(change, tmp_path):
    expected = uninterrupted(BASE, tmp_path / "whole")
    started(BASE, tmp_path / "run", stops=3)
    forged_newest(tmp_path / "run" / "checkpoints", change)
    run = fedbonsai.run(BASE, resume=tmp_path / "run")
    notices = [event.text for event in run if type(event).__name__ == "Notice"]
    assert notices[0].startswith("checkpoint 00000003.checkpoint is damaged (")
    assert notices[0].endswith("); the one before it is used")
    assert notices[1] == "the run goes on after version 2, from its checkpoint"
    assert told(run.summary) == told(expected)
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def test_if_all_are_forged_one_sentence_says_so(tmp_path):
    started(BASE, tmp_path / "run", stops=2)
    folder = tmp_path / "run" / "checkpoints"
    for _ in range(2):
        forged_newest(folder, other_tag)
        name = newest(folder).name
        shutil.move(folder / name, tmp_path / name)
    for name in ("00000001.checkpoint", "00000002.checkpoint"):
        shutil.move(tmp_path / name, folder / name)
    run = fedbonsai.run(BASE, resume=tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"^of 2 checkpoints none can be used; the newest: checkpoint 00000002\.checkpoint is"
    ):
        list(run)


def test_an_unfit_checkpoints_error_can_be_pickled():
    import pickle

    error = pickle.loads(pickle.dumps(UnfitCheckpoint(3, "why")))
    assert (error.version, error.why, str(error)) == (
        3,
        "why",
        "stage checkpoint: the checkpoint of version 3 is damaged (why)",
    )
