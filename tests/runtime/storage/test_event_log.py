"""The log: numbered lines, read back as far as their numbers are consecutive."""

import json

import fedbonsai
import pytest
from fedbonsai.runtime.events import Notice, VersionClosed, read_event
from fedbonsai.runtime.storage.event_log import EventLog

from ..resuming import BASE, facts, started, told, uninterrupted


@pytest.fixture(name="lines")
def lines_fixture(tmp_path):
    """The path of a log of five notices, and its lines."""
    log = EventLog(tmp_path)
    for number in range(5):
        log.note(Notice(text=str(number)))
    log.close()
    path = tmp_path / "events.jsonl"
    return path, path.read_bytes().splitlines(keepends=True)


def texts(path):
    log = EventLog(path.parent)
    try:
        return [event.text for event in log.events()]
    finally:
        log.close()


def test_lines_are_numbered_and_read_back(lines):
    path, held = lines
    assert [json.loads(line)["number"] for line in held] == [1, 2, 3, 4, 5]
    assert texts(path) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda held: [*held[:3], held[2], *held[3:]], 5),
        (lambda held: [*held[:3], held[2], held[2], *held[3:]], 5),
        (lambda held: [*held[:2], *held[3:]], 2),
        (lambda held: [*held[:2], held[3], held[2], held[4]], 2),
        (lambda held: [held[0], b"garbled\n", *held[2:]], 1),
        (lambda held: [held[0], b"[]\n", *held[2:]], 1),
        (lambda held: [held[0], b"[" * 100_000 + b"\n", *held[2:]], 1),
        (lambda held: [held[0], b'{"number":2,"type":"Nothing"}\n', *held[2:]], 1),
        (lambda held: [held[0], b'{"number":"2","type":"Notice","text":"1"}\n', *held[2:]], 1),
        (lambda held: [held[0], b"\xff\n", *held[2:]], 1),
        (lambda held: [*held[:4], held[4][:10]], 4),
        (lambda held: [*held[:4], held[4][:-1]], 4),
        (lambda held: held[1:], 0),
        (lambda held: [], 0),
    ],
)
def test_reading_ends_where_the_numbers_are_not_consecutive(lines, change, left):
    path, held = lines
    path.write_bytes(b"".join(change(held)))
    assert texts(path) == [str(number) for number in range(left)]


def test_a_cut_keeps_intact_lines_and_continues_their_numbers(lines):
    path, held = lines
    path.write_bytes(b"".join([*held[:3], held[2], *held[3:]]))
    log = EventLog(path.parent)
    assert log.num_events == 5
    log.cut(4)
    log.note(Notice(text="new"))
    log.close()
    assert texts(path) == ["0", "1", "2", "3", "new"]
    assert not path.with_name("events.jsonl.partial").exists()


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"3", b"{}", b'{"type":"PlanEnded","report":[]}', b'{"type":3}', b"\xff", b"[" * 10**5]
)
def test_a_line_without_an_event_is_a_value_error(line):
    with pytest.raises(ValueError, match=r"^it holds no event: "):
        read_event(line)


@pytest.mark.parametrize("harm", ["doubled", "garbled"])
def test_a_run_whose_log_was_damaged_is_resumed_to_the_same_bits(harm, tmp_path):
    """A doubled line is skipped; what follows a garbled one is ignored, and an older checkpoint is used."""
    expected = uninterrupted(BASE, tmp_path / "whole")
    started(BASE, tmp_path / "run", stops=3)
    path = tmp_path / "run" / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    closed = [number for number, line in enumerate(lines) if isinstance(read_event(line), VersionClosed)]
    if harm == "doubled":
        path.write_bytes(b"".join([*lines[: closed[0]], lines[closed[0] - 1], *lines[closed[0] :]]))
    else:
        path.write_bytes(b"".join([*lines[: closed[2]], b"{garbled\n", *lines[closed[2] + 1 :]]))
    run = fedbonsai.run(BASE, resume=tmp_path / "run")
    notices = [event.text for event in run if isinstance(event, Notice)]
    passed = [text.partition(" (")[2] for text in notices if "damaged" in text]
    short = (
        f"the log has {closed[2]} intact events; at the checkpoint it had {closed[2] + 1}); the one before it is used"
    )
    assert passed == ([] if harm == "doubled" else [short])
    assert told(run.summary) == told(expected)
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
