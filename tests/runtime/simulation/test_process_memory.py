"""The memory of plans as processes, of a model of 1,000 weights in one block."""

from typing import Any

import msgspec
import pytest
from fedbonsai.actors.enforcement.settings import MemorySettings
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.links.predict import Residual
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.part import whole
from fedbonsai.learning.parts.submodel import compile_part
from fedbonsai.learning.spec import Optimiser, PartCost, Training
from fedbonsai.policies.plan import Plan
from fedbonsai.runtime.simulation.process_memory import ProcessMemory, key
from torch import nn

BLOCKS = cut(nn.Sequential(nn.Linear(100, 10, bias=False)))
PART = whole(BLOCKS.spec)
SUBMODEL = compile_part(PART, BLOCKS)
WEIGHTS = 4_000


def plan(**changes: Any) -> Plan:
    training = changes.pop("training", Training())
    return Plan(id=1, device=0, version=0, part=PART, training=training, seed=1, **changes)


def needed(train: int, memory: ProcessMemory | None = None, **changes: Any) -> int:
    row = PartCost(
        parameters=1000,
        forward_flops=1,
        training_flops=1,
        boundary_items=1,
        peak_memory_bytes=1,
        process_memory_bytes=train,
    )
    return (memory or ProcessMemory(MemorySettings(probe=True))).needed_bytes(plan(**changes), row, SUBMODEL)


LZ4 = (CodecSpec("lz4"),)
RULE = Residual(rule="stationary")


@pytest.mark.parametrize(
    ("train", "changes", "expected"),
    [
        (50_000, {}, 50_000),
        (10_000, {}, 4 * WEIGHTS),  # sealing: the weights, the differences twice, and the packet
        (50_000, {"codec_down": LZ4}, 50_000 + WEIGHTS),  # and what the packet is decoded to
        (10_000, {"codec_down": LZ4}, 5 * WEIGHTS),
        (10_000, {"link_down": RULE, "link_up": RULE}, 6 * WEIGHTS),
    ],
)
def test_the_largest_of_opening_training_and_sealing(train: int, changes: dict[str, Any], expected: int) -> None:
    assert needed(train, **changes) == expected


def test_a_measured_figure_takes_the_place_of_a_prediction_for_the_same_part_and_training_only() -> None:
    memory = ProcessMemory(MemorySettings(probe=True, probed={key(plan()): 70_000}))
    assert needed(50_000, memory) == 70_000
    assert needed(50_000, memory, training=Training(batch_size=64)) == 50_000


@pytest.mark.parametrize(
    ("training", "same"),
    [
        ({"optimiser": Optimiser(learning_rate=0.5)}, True),
        ({"epochs": 7}, True),
        ({"steps": 3}, True),
        ({"batch_size": 64}, False),
        ({"accumulation": 2}, False),
        ({"precision": "bf16"}, False),
        ({"layout": "channels_last"}, False),
        ({"checkpointing": True}, False),
        ({"optimiser": Optimiser(name="adam")}, False),
    ],
    ids=str,
)
def test_plans_that_need_the_same_memory_share_a_key(training: dict[str, Any], same: bool) -> None:
    assert (key(plan(training=Training(**training))) == key(plan())) is same
    frozen = msgspec.structs.replace(PART, trained=())
    assert key(msgspec.structs.replace(plan(), part=frozen)) != key(plan())


@pytest.mark.parametrize(
    ("settings", "counts", "probes", "on_ray", "inline"),
    [
        ({}, False, False, False, False),
        ({"enforce": True}, True, True, True, True),
        ({"enforce": "auto"}, True, True, True, False),
        ({"enforce": "auto", "probe": False}, True, False, True, False),
        ({"probe": True}, True, True, False, False),
    ],
    ids=str,
)
def test_what_the_settings_ask_for(
    settings: dict[str, Any], counts: bool, probes: bool, on_ray: bool, inline: bool
) -> None:
    memory = MemorySettings(**settings)
    assert (ProcessMemory.of(memory) is not None, memory.probes) == (counts, probes)
    assert (memory.is_enforced("ray"), memory.is_enforced("inline")) == (on_ray, inline)
