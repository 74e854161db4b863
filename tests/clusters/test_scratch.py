"""Temporary folders are removed with their owner, however it ends; those of others and of running owners are kept."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fedbonsai.clusters import scratch
from fedbonsai.clusters.scratch import Scratch, base, claim, reap, reap_runs

OWNER = """
import sys
from fedbonsai.clusters.scratch import Scratch
folder = Scratch("run-of-another").folder("links")
(folder.path / "0.safetensors").write_bytes(b"x" * 1000)
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def other(tmp_path):
    """A process that owns a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def test_the_folder_of_a_process_that_is_killed_is_removed_by_the_next(other):
    path = Path(other.stdout.readline().strip())
    assert path.parent.parent == base()
    reap_runs()
    assert [file.name for file in path.iterdir() if file.suffix] == ["0.safetensors"]  # its owner is alive
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    reap_runs()
    assert list(base().iterdir()) == []


def test_a_folder_ends_with_close_and_with_its_object():
    run = Scratch()
    first, second = run.folder("replay"), run.folder("replay")
    paths = first.path, second.path
    assert first.path.parent == second.path.parent == base() / run.run
    assert first.path.stat().st_mode & 0o777 == 0o700
    first.close()
    first.close()
    del second
    assert not any(path.exists() for path in paths)


def test_closing_a_run_removes_the_folders_of_its_processes():
    run, others = Scratch(), Scratch()
    left, kept = run.folder("links"), others.folder("links")
    (left.path / "a").write_text("a")
    run.close()
    assert not left.path.exists()
    assert kept.path.exists()
    left.close()


def test_folders_without_a_proof_of_ownership_are_left(tmp_path, monkeypatch):
    ours, foreign, bare, empty = (tmp_path / name for name in ("ours", "foreign", "bare", "empty"))
    for path in (ours, foreign, bare, empty):
        path.mkdir()
    claim(ours).close()
    (foreign / ".owner").write_text("somebody's own notes")
    (bare / "data").write_text("data")
    (tmp_path / "link").symlink_to(ours)
    (tmp_path / "file").write_text("a file")
    reap([tmp_path / "link", tmp_path / "file", tmp_path / "nowhere", foreign, bare, empty])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "empty", "file", "foreign", "link", "ours"]
    monkeypatch.setattr(scratch, "_user", lambda: os.getuid() + 1)
    reap([ours])
    assert ours.exists()
    monkeypatch.undo()
    reap([ours])
    assert not ours.exists()


def test_a_symbolic_link_in_place_of_the_folder_of_all_runs_is_refused(tmp_path):
    path, elsewhere = base(), tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(PermissionError, match="belongs to another user"):
        Scratch().folder("links")
