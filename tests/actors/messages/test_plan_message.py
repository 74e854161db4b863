"""The control message down: it holds all of a plan but its reasons."""

import msgspec
import pytest
from fedbonsai.actors.messages.plan_message import plan_message, read_plan
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.links.predict import Residual
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Plan, Split

from ..steps import IMAGES, make_plan

SPARSE = (CodecSpec("topk", {"density": 0.01, "scope": "global"}), CodecSpec("ternary"), CodecSpec("entropy"))


@pytest.fixture(name="plan")
def plan_fixture() -> Plan:
    return make_plan(
        Workload(IMAGES),
        training=Training(optimiser=Optimiser(learning_rate=0.25), epochs=3),
        codec_up=SPARSE,
        codec_down=SPARSE,
        link_up=Residual(rule="delta", feedback=True),
        acknowledged=7,
        reasons=("random: 1 of 10",),
    )


def test_a_plan_arrives_as_it_was_but_for_its_reasons(plan: Plan) -> None:
    assert read_plan(plan_message(plan)) == msgspec.structs.replace(plan, reasons=())


def test_a_plan_takes_less_than_half_of_its_plain_encoding(plan: Plan) -> None:
    assert len(plan_message(plan)) < len(msgspec.msgpack.encode(plan)) / 2


def test_an_equal_string_of_another_origin_costs_no_more_bytes(plan: Plan) -> None:
    ours, theirs = Split(cut="conv"), Split(cut="conv", head="-slots"[1:])  # type: ignore[arg-type]
    assert theirs.head is not ours.head
    messages = [plan_message(msgspec.structs.replace(plan, split=split)) for split in (ours, theirs)]
    assert messages[0] == messages[1]
    shared = msgspec.structs.replace(plan, split=Split(cut="conv", head="shared", window=2), reasons=())
    assert read_plan(plan_message(shared)) == shared


@pytest.mark.parametrize("message", [b"", b"junk", b"\x00" * 40])
def test_a_message_that_is_no_plan_is_one_sentence(message: bytes) -> None:
    with pytest.raises(ValueError, match=f"a plan's message of {len(message)} bytes cannot be read"):
        read_plan(message)


def test_a_message_cut_short_is_no_plan(plan: Plan) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_plan(plan_message(plan)[:-5])
