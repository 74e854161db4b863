"""The summary: by hand from a few events, and from the event log of a whole run."""

import json
import math

import fedbonsai
import msgspec
from fedbonsai.policies.report import Measured, Outcome, Report
from fedbonsai.runtime.events import AnyEvent, Evaluated, Notice, PlanEnded, RunEnded, RunStarted, VersionClosed
from fedbonsai.runtime.reporting.summary import Summary

STARTED = RunStarted(
    name="a", preset="p", seed=1, devices=3, classes={"fast": 1, "slow": 2}, parameters=9, blocks=("x",), samples=8, workers=1
)  # fmt: skip
REQUIRED = (
    "name", "preset", "seed", "rounds", "accuracy", "loss", "virtual_s", "wall_s", "up_bytes", "down_bytes",
    "peak_memory_bytes", "outcomes", "model_hash",
)  # fmt: skip


def summary_of(*events):
    summary = Summary()
    for event in events:
        summary.note(event)
    return summary.to_dict()


def test_by_hand(make_plan):
    def ended(plan_id, device, outcome, memory=0):
        report = Report(plan=make_plan(plan_id, device), outcome=outcome, measured=Measured(peak_memory_bytes=memory))
        return PlanEnded(time_s=plan_id, report=report, fleet_class="fast" if device == 0 else "slow")

    closed = {"folded": 1, "loss": 0.1, "up_bytes": 10, "down_bytes": 20}
    found = summary_of(
        STARTED,
        ended(1, 0, Outcome.DONE, memory=7),
        ended(2, 1, Outcome.FAILED, memory=9),
        VersionClosed(time_s=2.0, version=1, wall_s=0.5, **closed),
        Evaluated(time_s=2.0, version=1, server={"accuracy": 0.8, "loss": 0.2}, best=True),
        ended(3, 0, Outcome.DONE),
        Notice(text="a worker died"),
        VersionClosed(time_s=3.0, version=2, wall_s=0.7, **closed),
        Evaluated(time_s=3.0, version=2, server={"accuracy": 0.7, "loss": 0.3}),
        ended(4, 2, Outcome.LATE),
        RunEnded(time_s=4.0, reason="2 rounds", version=2, model_hash="ab", up_bytes=11, down_bytes=21),
    )
    assert found["outcomes"] == {"done": 2, "late": 1, "lost": 0, "out_of_memory": 0, "rejected": 0, "failed": 1}
    assert found["participation"] == {
        "fast": {"devices": 1, "delivered": 1, "plans": 2, "outcomes": {"done": 2}},
        "slow": {"devices": 2, "delivered": 0, "plans": 2, "outcomes": {"failed": 1, "late": 1}},
    }
    assert (found["accuracy"], found["loss"], found["best_accuracy"], found["best_round"]) == (0.7, 0.3, 0.8, 1)
    assert (found["rounds"], found["virtual_s"], found["round_wall_s"]) == (2, 4.0, 0.6)
    assert (found["up_bytes"], found["down_bytes"], found["peak_memory_bytes"]) == (11, 21, 9)
    assert (found["status"], found["reason"], found["model_hash"]) == ("finished", "2 rounds", "ab")
    assert (found["notices"], found["num_notices"]) == (["a worker died"], 1)


def test_what_grows_with_the_rounds_is_bounded():
    """1200 rounds, of which the first 200 took a minute each: the median no longer includes them."""
    summary = Summary()
    for version in range(1, 1201):
        summary.note(Notice(text=f"notice {version}"))
        wall_s = 60.0 if version <= 200 else 0.5
        summary.note(VersionClosed(version=version, folded=1, loss=None, up_bytes=0, down_bytes=0, wall_s=wall_s))
        if version == 200:
            assert summary.to_dict()["round_wall_s"] == 60.0
    found = summary.to_dict()
    assert found["notices"] == [f"notice {number}" for number in range(1, 101)]
    assert (found["num_notices"], found["rounds"], found["round_wall_s"]) == (1200, 1200, 0.5)
    assert len(summary._round_walls) == 1000


def test_a_summary_without_events():
    found = summary_of()
    assert (found["status"], found["rounds"], found["accuracy"], found["model_hash"]) == ("running", 0, None, None)
    assert set(REQUIRED) <= set(found)


def test_a_figure_that_is_not_finite_is_none():
    found = summary_of(STARTED, Evaluated(version=1, server={"loss": math.inf}, devices={"loss": {"mean": math.nan}}))
    assert found["loss"] is None
    assert found["evaluation"]["devices"] == {"loss": {"mean": None}}
    json.dumps(found, allow_nan=False)


def test_the_summary_can_be_recomputed_from_events_jsonl(digits, tmp_path):
    config = digits(data={"test_share": 0.2}, evaluation={"where": "both"})
    with fedbonsai.run(config, out=tmp_path / "run") as run:
        for _ in run:
            pass
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    again = summary_of(*(msgspec.json.decode(line, type=AnyEvent) for line in lines))
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written == run.summary
    assert set(REQUIRED) <= set(written)
    assert written.pop("wall_s") > 0
    assert again.pop("wall_s") == 0
    assert again == written
