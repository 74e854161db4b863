"""Progress: lines in a log, a bar on a terminal."""

import re
from pathlib import Path

import msgspec
import pytest
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.report import Outcome, Report
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.events import (
    Evaluated,
    Notice,
    PlanEnded,
    RoundStarted,
    RunEnded,
    RunStarted,
    StudentFigures,
    TaskEnded,
    VersionClosed,
)
from fedbonsai.runtime.reporting import progress
from fedbonsai.runtime.reporting.progress import Progress, bytes_text, device_table, size

STARTED = RunStarted(
    name="a", preset="p", seed=1, devices=3, classes={"fast": 1, "slow": 2}, parameters=9000, blocks=("x",), samples=8,
    workers=1,
)  # fmt: skip
ENDED = RunEnded(time_s=9.0, reason="", version=3, model_hash="", up_bytes=0, down_bytes=0)


def closed(version, *, loss=0.5):
    return VersionClosed(time_s=2.0, version=version, folded=1, loss=loss, up_bytes=1500, down_bytes=2, wall_s=0.1)


def evaluated(version, accuracy=0.5):
    return Evaluated(time_s=2.0, version=version, server={"accuracy": accuracy, "loss": 1.0})


def show(*events, quiet=False, rounds=3):
    with Progress(load_config({"stop": {"rounds": rounds}}), quiet=quiet) as shown:
        for event in events:
            shown.show(event)
    return shown


@pytest.fixture(name="every_line")
def every_line_fixture(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)


def test_a_log_has_one_plain_line_a_round(every_line, capsys):
    show(STARTED, closed(1), evaluated(1), closed(2), evaluated(2), ENDED)
    assert capsys.readouterr().out.splitlines() == [
        "a: p on 3 devices (2 classes), 9,000 parameters, 8 samples, 1 workers",
        "round 1/3: accuracy 0.5000, loss 1.0000, train loss 0.5000, 1.5 kB up, 2 B down, 2.0 s simulated",
        "round 2/3: accuracy 0.5000, loss 1.0000, train loss 0.5000, 1.5 kB up, 2 B down, 2.0 s simulated",
    ]


def test_a_round_without_an_evaluation_is_shown_at_the_next_event(every_line, capsys):
    show(closed(1), evaluated(1), closed(2, loss=None), RoundStarted(version=2, plans=1), closed(3), ENDED)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[2].strip() for line in lines] == [
        "accuracy 0.5000, loss 1.0000, train loss 0.5000, 1.5 kB up, 2 B down, 2.0 s simulated",
        "1.5 kB up, 2 B down, 2.0 s simulated",  # no figures of another round
        "train loss 0.5000, 1.5 kB up, 2 B down, 2.0 s simulated",
    ]


def test_a_log_of_many_quick_rounds_keeps_the_first_and_the_last(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 1e9)
    show(*(event for v in range(1, 8) for event in (closed(v), evaluated(v))), ENDED, rounds=99)
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["round 1/99", "round 7/99"]


def test_a_fault_names_device_round_and_stage(capsys, make_plan):
    report = Report(plan=make_plan(1, 2, version=3), outcome=Outcome.FAILED, stage="train", error="ValueError: no")
    late = Report(plan=make_plan(2, 1), outcome=Outcome.LATE, error="its version had closed")
    show(
        PlanEnded(report=report, fleet_class="b"), PlanEnded(report=late, fleet_class="b"), Notice(text="a worker died")
    )
    assert capsys.readouterr().out.splitlines() == [
        "device 2, round 3, stage train: failed: ValueError: no",
        "a worker died",
    ]


def test_devices_that_could_not_evaluate_are_shown(capsys):
    show(Evaluated(version=4, devices={"loss": {"mean": 1.0}}, num_devices=3, num_failed=2, first_error="device 7: no"))
    assert capsys.readouterr().out == "version 4: 2 of 5 devices could not evaluate it; the first: device 7: no\n"


def test_findings_at_the_start_are_shown(capsys):
    show(msgspec.structs.replace(STARTED, skipped_files=2, block_reason="it cannot be traced"))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "2 corrupt files were skipped",
        "the model is kept in one block: it cannot be traced",
    ]


def test_quiet_leaves_standard_output_alone(capsys):
    show(STARTED, closed(1), evaluated(1), quiet=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert "round 1/3" in output.err


def test_a_terminal_gets_a_bar_that_is_removed(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = show(STARTED, closed(1), evaluated(1, 0.25))
    output = capsys.readouterr().out
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "1/3" in text
    assert "accuracy 0.2500" in text
    assert "━" in text
    assert "round 1/3:" not in text  # no line of a log
    assert output.endswith(("\x1b[2K", "\x1b[?25h"))  # erased; cursor shown again
    assert shown._bar.finished is False


def test_the_end_shows_devices_figures_and_folder(capsys, make_plan):
    report = Report(
        plan=make_plan(1, 2),
        samples=5,
        loss=0.25,
        virtual=Estimate(
            seconds=3.0,
            down_s=1.0,
            compute_s=1.5,
            up_s=0.5,
            up_bytes=2000,
            peak_memory_bytes=3 * 10**6,
            parameters=38_282,
        ),
    )
    shown = show()
    summary = {
        "rounds": 2,
        "accuracy": 0.5,
        "loss": None,
        "virtual_s": 3.0,
        "wall_s": 1.0,
        "up_bytes": 10,
        "down_bytes": 5000,
        "evaluation_bytes": 1_500_000,
        "host_bytes": 0,
        "task_bytes": 0,
    }
    shown.finish(
        summary | {"reason": "2 rounds"}, {2: PlanEnded(report=report, fleet_class="b")}, folder=Path("runs/a")
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert re.split(" {2,}", lines[1]) == [
        *(
            "device",
            "class",
            "model",
            "outcome",
            "samples",
            "loss",
            "down s",
            "compute s",
            "up s",
            "total s",
            "up",
            "memory",
        )
    ]
    assert re.split(" {2,}", lines[2].strip()) == [
        *("2", "b", "38.3k", "done", "5", "0.2500", "1.00", "1.50", "0.50", "3.00", "2.0 kB", "3.0 MB")
    ]
    figures = "2 rounds; accuracy 0.5000; 3.0 s simulated, 1.0 s here"
    figures += "; 10 B up, 5.0 kB down (and 1.5 MB for evaluation) (2 rounds)"
    assert lines[3:] == [figures, "run folder: runs/a"]


def test_a_table_of_many_devices_shows_the_slowest(make_plan):
    def slow(device):
        report = Report(plan=make_plan(device, device), virtual=Estimate(seconds=float(device)))
        return PlanEnded(report=report, fleet_class="b")

    table = device_table({device: slow(device) for device in range(30)}, most=3)
    assert list(table.columns[0].cells) == ["29", "28", "27"]
    assert table.caption == "and 27 more"


def test_a_device_that_stopped_early_is_marked(make_plan):
    report = Report(plan=make_plan(1, 1, whole_steps=5), steps=2)
    table = device_table({1: PlanEnded(report=report, fleet_class="b")})
    assert list(table.columns[3].cells) == ["done (2 of 5 steps)"]


def test_reasons_that_all_plans_share_are_not_repeated(make_plan):
    def narrow(device, *reasons):
        plan = make_plan(device, device, reasons=("random: 2 of 2", *reasons))
        plan = msgspec.structs.replace(plan, part=msgspec.structs.replace(plan.part, width=0.5))
        return PlanEnded(report=Report(plan=plan, virtual=Estimate(seconds=9.0 - device)), fleet_class="b")

    def why(*events):
        (column,) = (c for c in device_table(dict(enumerate(events))).columns if c.header == "why")
        return list(column.cells)

    own, labels = ["width: half, 1 of 2 s", "width: half, 2 of 2 s"], "distillation: label counts"
    assert why(*(narrow(device, reason, labels) for device, reason in enumerate(own))) == own
    assert why(narrow(0, own[0], labels)) == [f"{own[0]}; {labels}"]  # of one device none is repeated
    assert why(narrow(0, own[0], labels), narrow(1, labels)) == [own[0], labels]
    assert why(narrow(0, own[0]), narrow(1, own[0])) == [own[0]] * 2


def test_bytes_that_are_counted_separately_are_shown_beside_the_totals():
    assert bytes_text(10, 2000, 0, 0) == "10 B up, 2.0 kB down"
    assert bytes_text(1, 2, 3, 4000) == "1 B up, 2 B down (and 3 B for evaluation, 4.0 kB between server and hosts)"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_250_000, "1.2 MB"), (3e9, "3.0 GB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


@pytest.mark.parametrize("text", ["no [/such] tag", "shape [batch] of [red]", "stage :1: of :smile:"])
def test_text_that_looks_like_markup_is_printed_literally(capsys, make_plan, text):
    report = Report(plan=make_plan(1), outcome=Outcome.FAILED, error=text)
    shown = show(Notice(text=text), PlanEnded(report=report, fleet_class="[/b]"))
    shown._console.print(device_table({0: PlanEnded(report=report, fleet_class="[/b]")}))
    output = capsys.readouterr().out
    assert output.count(text) == 2
    assert "[/b]" in output


def task(version, **students):
    return TaskEnded(version=version, task="distil", teachers=3, students=students, flops=1, seconds=0.5)


def student(**figures):
    return StudentFigures(**{"steps": 3, "best_step": 2, "loss_before": 1.5, "loss_after": 0.0} | figures)


def test_what_the_server_distilled_is_in_the_line_of_its_round(every_line, capsys):
    both = task(1, **{"": student(accuracy_before=0.25, accuracy_after=0.5), "tiny": student()})
    show(
        both,
        closed(1),
        evaluated(1),
        task(2),
        closed(2),
        evaluated(2),
        task(3, tiny=student(loss_before=None)),
        closed(3),
        ENDED,
    )
    lines = [line.partition(":")[2].partition(", train")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "distilled from 3: public accuracy 0.2500 to 0.5000; tiny distilled from 3: public loss 1.5000 to 0.0000; "
        "accuracy 0.5000, loss 1.0000",
        "accuracy 0.5000, loss 1.0000",
        "tiny distilled from 3: public loss nan to 0.0000",
    ]
