"""Plan and Report: printed as one line, changed with a reason, and the same after a round trip through bytes."""

import msgspec
import pytest
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Sparsity
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.plan import Objective, Plan, Split, Upload
from fedbonsai.policies.report import Measured, Outcome, Report


@pytest.fixture
def full_plan(make_plan):
    """A plan with every field set."""
    plan = make_plan(3, version=5)
    return msgspec.structs.replace(
        plan,
        id=7,
        attempt=1,
        part=Part(blocks=("conv", "fc"), trained=("fc",), cached=(("conv", "ab"),), width=0.5, index_map="cd"),
        split=Split(cut="conv", mode="ecofed", view="v1"),
        training=msgspec.structs.replace(plan.training, sparsity=Sparsity(weights=0.9)),
        objective=Objective(kind="imitate"),
        upload=Upload(payload="weights", label_counts=True),
        codec_down=(CodecSpec("lz4"),),
        codec_up=(CodecSpec("top_k", {"density": 0.1}), CodecSpec("lz4")),
        deadline_s=9.5,
    )


def test_prints_as_one_line(make_plan):
    assert str(make_plan(3)) == ("plan 0.0 device 3 v0: 2 blocks, 1 epochs of batch 32, down identity, up identity")


def test_prints_what_differs_from_plain_training(full_plan):
    plan = full_plan.with_("fits").with_("fast", training=msgspec.structs.replace(full_plan.training, steps=4))
    assert str(plan) == (
        "plan 7.1 device 3 v5: 2 blocks, 1 trained, imitate, width 0.5 by prefix, cut conv, sparsity 0.9, "
        "4 steps of batch 32, down lz4, up top_k+lz4 (fits; fast)"
    )


def test_with_notes_the_reason_and_leaves_the_original(make_plan):
    plan = make_plan(3)
    changed = plan.with_("first", deadline_s=2.0).with_("second")
    assert (changed.reasons, changed.deadline_s) == (("first", "second"), 2.0)
    assert (plan.reasons, plan.deadline_s) == ((), None)


def test_cannot_be_changed_in_place(make_plan):
    with pytest.raises(AttributeError):
        make_plan(3).device = 4


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
def test_plan_round_trip(full_plan, codec):
    assert codec.decode(codec.encode(full_plan), type=Plan) == full_plan


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
def test_report_round_trip(full_plan, codec):
    report = Report(
        plan=full_plan,
        outcome=Outcome.OUT_OF_MEMORY,
        samples=10,
        loss=0.5,
        loss_square=0.25,
        metrics={"accuracy": 0.75},
        virtual=Estimate(seconds=1.5, up_bytes=100),
        measured=Measured(wall_s=0.1),
        error="needs 2 MB",
        stage="train",
    )
    assert codec.decode(codec.encode(report), type=Report) == report


def test_a_plan_from_outside_is_checked(make_plan):
    wire = msgspec.to_builtins(make_plan(3))
    wire["training"]["sparsity"] = {"weights": 2.0}
    with pytest.raises(msgspec.ValidationError, match=r"< 1.0 - at `\$.training.sparsity.weights`"):
        msgspec.convert(wire, Plan)
