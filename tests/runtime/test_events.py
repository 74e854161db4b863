"""Every event is equal after a round trip through a line of JSON, and to another process."""

import math

import msgspec
import pytest
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.report import Measured, Outcome, Report
from fedbonsai.runtime import events
from fedbonsai.runtime.events import (
    AnyEvent,
    BlocksMoved,
    Evaluated,
    Notice,
    PlanEnded,
    RoundStarted,
    RunEnded,
    RunStarted,
    StudentFigures,
    TaskEnded,
    VersionClosed,
    read_event,
)


@pytest.fixture(name="examples")
def examples_fixture(make_plan):
    report = Report(
        plan=make_plan(4, 2).with_("because"),
        outcome=Outcome.LATE,
        samples=3,
        loss=0.5,
        metrics={"accuracy": 0.5},
        virtual=Estimate(seconds=0.1),
        measured=Measured(wall_s=0.2),
        error="slow",
    )
    return [
        RunStarted(
            name="a", preset="p", seed=2**61, devices=2, classes={"b": 2}, parameters=9, blocks=("x",), samples=8, workers=1
        ),
        RoundStarted(time_s=1.5, version=1, plans=2, left_out={"memory": 1}),
        PlanEnded(time_s=0.1, report=report, fleet_class="b"),
        VersionClosed(time_s=3.0, version=2, folded=1, loss=None, up_bytes=5, down_bytes=6, wall_s=0.25),
        TaskEnded(
            time_s=3.0,
            version=2,
            task="distil",
            teachers=2,
            students={"": StudentFigures(steps=9, best_step=4, loss_before=2.0, loss_after=1.0, accuracy_before=0.5)},
            flops=12,
            seconds=0.5,
        ),
        BlocksMoved(time_s=3.0, version=2, label="grow 1", movement=0.5),
        Evaluated(time_s=3.0, version=2, server={"loss": 0.5}, devices={"loss": {"mean": 1.0}}, num_devices=2, best=True),
        Notice(time_s=3.0, text="a worker died"),
        RunEnded(time_s=4.0, reason="2 rounds", version=2, model_hash="ab", up_bytes=5, down_bytes=6, up_by_kind={"w": 5}),
    ]  # fmt: skip


def test_there_is_an_example_of_each(examples):
    assert {type(event) for event in examples} == set(AnyEvent.__args__)
    assert set(events.__all__) == {
        "AnyEvent",
        "Event",
        "StudentFigures",
        *(kind.__name__ for kind in AnyEvent.__args__),
    }


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
def test_round_trip(examples, codec):
    for event in examples:
        line = codec.encode(event)
        assert codec.decode(line, type=AnyEvent) == event
        assert b"\n" not in msgspec.json.encode(event)


def test_the_type_is_named_in_the_line(examples):
    assert [msgspec.json.decode(msgspec.json.encode(event))["type"] for event in examples] == [
        "RunStarted",
        "RoundStarted",
        "PlanEnded",
        "VersionClosed",
        "TaskEnded",
        "BlocksMoved",
        "Evaluated",
        "Notice",
        "RunEnded",
    ]


def test_events_are_frozen(examples):
    for event in examples:
        with pytest.raises(AttributeError):
            event.time_s = 9.0


def test_figures_are_those_of_the_server_or_else_the_mean_of_devices():
    devices = {"accuracy": {"mean": 0.5, "worst": 0.1}}
    assert Evaluated(version=1, server={"accuracy": 0.9}, devices=devices).figures == {"accuracy": 0.9}
    assert Evaluated(version=1, devices=devices).figures == {"accuracy": 0.5}


def test_a_loss_that_is_not_finite_can_be_read_back():
    line = msgspec.json.encode(Evaluated(version=1, server={"loss": math.nan, "accuracy": 0.5}))
    read = msgspec.json.decode(line, type=AnyEvent)
    assert read.server == {"loss": None, "accuracy": 0.5}
    assert math.isnan(read.figures["loss"])


def test_a_line_of_the_log_can_be_read_back(examples):
    for event in examples:
        assert read_event(msgspec.json.encode(event)) == event


def test_metrics_that_are_not_finite_can_be_read_back(make_plan):
    event = PlanEnded(report=Report(plan=make_plan(1), metrics={"loss": math.nan, "accuracy": 0.5}), fleet_class="b")
    found = read_event(msgspec.json.encode(event)).report.metrics
    assert math.isnan(found["loss"])
    assert found["accuracy"] == 0.5
