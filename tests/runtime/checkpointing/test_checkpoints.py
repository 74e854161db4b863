"""Checkpoints as files: bounded, incremental, atomic; values that are restored unchanged; when they are due."""

import os
from collections import Counter, OrderedDict, deque
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from fedbonsai.actors.messages.messages import Message
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.comms.links.memory import HeldModel
from fedbonsai.policies.report import Outcome
from fedbonsai.runtime.checkpointing.checkpoints import Checkpoints, CheckpointSchedule
from fedbonsai.runtime.checkpointing.folder import data_name
from fedbonsai.runtime.configuration.config import CheckpointSettings
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.storage.files import Folder

BIG = 4 * 1024 * 5  # bytes of a tensor of 5120 numbers: more than what is kept beside the graph


def checkpoints(path, *, keep=2, run="mine", files=None):
    settings = CheckpointSettings(keep=keep, share=None)
    return Checkpoints(files or Folder(path), channel=LocalChannel(), run=run, settings=settings)


def opened(path, **how):
    """The checkpoints of a run that begins, or continues after its newest one."""
    to = checkpoints(path, **how)
    to.place.claim(resumes=True)
    to.start(to.newest().manifest)
    return to


def write(to, value, version):
    to.begin()
    to.write(value, version=version, events=10 * version)


def through(value, tmp_path):
    """A value that was written to a checkpoint and read again."""
    to = opened(tmp_path)
    write(to, value, 1)
    return to.read(checkpoints(tmp_path).newest().manifest)


def test_values_are_restored_unchanged_and_shared_ones_shared(tmp_path):
    tensor, array = torch.tensor([[1.0, -0.0]]), np.array(7, np.int64)
    model = HeldModel(version=3, hash=2**64 - 1, arrays={"a": array})
    value = {
        "plain": [None, True, -1, 0.1, float("inf"), "text", b"bytes", (1, 2), {3}, frozenset({4})],
        ("a", 0): OrderedDict(b=deque([1]), a=Counter({Outcome.DONE: 2})),
        "models": [model, model, tensor, tensor],
        "number": np.float64(0.5),
    }
    found = through(value, tmp_path)
    assert found["plain"] == value["plain"]
    assert found["a", 0] == value["a", 0]
    assert [type(v) for v in (found["a", 0], *found["a", 0].values())] == [OrderedDict, deque, Counter]
    first, second, one, other = found["models"]
    assert first is second
    assert one is other
    assert torch.equal(one, tensor)
    assert torch.signbit(one[0, 1])
    assert (first.version, first.hash, first.arrays["a"].shape, int(first.arrays["a"])) == (3, 2**64 - 1, (), 7)
    one.add_(1)  # memory of its own
    assert found["number"] == 0.5


@pytest.mark.parametrize("numbers", [3, BIG // 4])
def test_a_packet_is_saved_in_place_of_its_reference(numbers, tmp_path):
    packet = LocalChannel().put(np.arange(numbers, dtype=np.uint8 if numbers == 3 else np.float32).view(np.uint8))
    found = through(Message(packet, packet.nbytes, "weights"), tmp_path)
    assert found.reference.tobytes() == packet.tobytes()
    assert not found.reference.flags.writeable  # it went through the channel


def test_an_object_of_another_type_is_not_saved(tmp_path):
    with pytest.raises(
        TypeError, match=r"^a pathlib\S*\.PurePosixPath cannot be saved; checkpointing/types\.py has no tag for it$"
    ):
        through([PurePosixPath("a")], tmp_path)


def test_unchanged_tensors_are_not_written_again_and_a_bounded_number_stays(tmp_path):
    to = opened(tmp_path)
    frozen, trained = torch.zeros(BIG // 4), torch.ones(BIG // 4)
    write(to, {"frozen": frozen, "trained": trained}, 1)
    first = to.written_bytes
    assert first > 2 * BIG
    write(to, {"frozen": frozen, "trained": trained}, 2)
    assert to.written_bytes == first
    for version in (3, 4, 5):
        trained += 1
        write(to, {"frozen": frozen, "trained": trained}, version)
    assert first + 3 * BIG < to.written_bytes < first + 4 * BIG
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.endswith(".checkpoint")] == ["00000004.checkpoint", "00000005.checkpoint"]
    assert (
        sum((tmp_path / name).stat().st_size > BIG for name in names) == 3
    )  # the frozen one, and two of the trained one
    assert len(names) == 1 + 2 + 3 + 2  # the marker; each has a graph of its own
    assert torch.equal(to.read(to.newest().manifest)["trained"], trained)


class TornFolder(Folder):
    """A disk that is full, or a process that is killed, at some write."""

    def __init__(self, path, *, left):
        super().__init__(path)
        self.left = left

    def write(self, name, data):
        self.left -= 1
        if self.left < 0:
            (self._path / (name + self.partial)).write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        super().write(name, data)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_an_interrupted_write_leaves_the_checkpoint_before(left, tmp_path):
    write(opened(tmp_path), {"a": torch.zeros(BIG)}, 1)
    torn = opened(tmp_path, files=TornFolder(tmp_path, left=left))
    with pytest.raises(
        RunError, match=r"^stage checkpoint: a checkpoint could not be written: \[Errno 28\] No space left"
    ):
        write(torn, {"a": torch.ones(BIG)}, 2)
    again = checkpoints(tmp_path)
    again.place.claim(resumes=True)
    found = again.newest()
    assert (found.manifest.version, found.notices) == (1, ())
    again.start(found.manifest)
    assert not torch.any(again.read(found.manifest)["a"])
    assert len(list(tmp_path.glob("*.data"))) == 2  # the files of the interrupted write are removed
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("kind", ["data", "checkpoint"])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(kind, tmp_path):
    """A file that is written goes to a device without room, at the first of the tensors' files and at the manifest."""
    for folder in ("there", "elsewhere"):
        write(opened(tmp_path / folder), {"a": torch.zeros(BIG)}, 1)
    write(opened(tmp_path / "elsewhere"), {"a": torch.ones(BIG)}, 2)
    names = {path.name: path.stat().st_size for path in (tmp_path / "elsewhere").glob(f"*.{kind}")}
    new = [name for name in names if not (tmp_path / "there" / name).exists()]
    full = opened(tmp_path / "there")
    for name in new:
        (tmp_path / "there" / f"{name}{full._files.partial}").symlink_to("/dev/full")
    said = r"^stage checkpoint: a checkpoint could not be written: \[Errno 28\] No space left on device; earlier checkpoints"
    with pytest.raises(RunError, match=said):
        write(full, {"a": torch.ones(BIG)}, 2)
    again = checkpoints(tmp_path / "there")
    found = again.newest()
    assert (found.manifest.version, found.notices) == (1, ())
    assert not torch.any(again.read(found.manifest)["a"])


def test_the_checkpoints_of_another_run_are_not_touched(tmp_path):
    write(opened(tmp_path), 1, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = checkpoints(tmp_path, run="other")
    for resumes in (False, True):
        with pytest.raises(
            ConfigError, match=r"which holds the checkpoints of another run; every run needs a place of its own"
        ):
            other.place.claim(resumes=resumes)
    with pytest.raises(RunError, match=r"which is no longer this run's own$"):
        other.start(None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def users_files(folder):
    """A user's own files, some of them named as checkpoint files are."""
    folder.mkdir(exist_ok=True)
    for name in (
        "ring.data",
        "wdbc.data",
        "0" * 32 + ".data",
        "notes.partial",
        "best.checkpoint",
        "00000009.checkpoint.old",
    ):
        (folder / name).write_text(f"{name}: the user's own")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("resumes", [False, True])
def test_a_folder_of_the_users_own_files_is_refused_and_left_alone(resumes, tmp_path):
    before = users_files(tmp_path)
    with pytest.raises(ConfigError, match=r"which is not empty, and holds no checkpoints of fedbonsai \(0{32}\.data, "):
        checkpoints(tmp_path).place.claim(resumes=resumes)
    with pytest.raises(RunError, match=r"which is no longer this run's own$"):
        checkpoints(tmp_path).start(None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_users_files_among_checkpoint_files_are_left_alone(tmp_path):
    to = opened(tmp_path)
    write(to, torch.zeros(BIG), 1)
    loose = data_name(b"of a write that was broken off")
    (tmp_path / loose).write_bytes(b"of a write that was broken off")
    (tmp_path / f"{loose}{to._files.partial}").write_bytes(b"of a write")
    before = users_files(tmp_path)
    again = opened(tmp_path)
    for version in range(2, 6):
        write(again, torch.full([BIG], float(version)), version)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    ours = {loose, f"{loose}{to._files.partial}"}
    assert not ours & set(after)  # one is named by its hash, the other by the marker's token
    kept = {name: data for name, data in before.items() if "the user's own" in str(data)}
    assert kept.items() <= after.items()
    assert sum(name.endswith(".checkpoint") and name[0] == "0" for name in after) == 2


def test_a_place_that_is_a_file_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file', which cannot be used: Not a directory$"):
        checkpoints(tmp_path / "file").place.claim(resumes=False)
    assert (tmp_path / "file").read_text() == ""


def test_a_place_in_which_nothing_was_written_is_released(tmp_path):
    to = checkpoints(tmp_path / "to")
    to.place.claim(resumes=False)
    other = checkpoints(tmp_path / "to", run="other")
    other.place.claim(resumes=False)  # of a run that died before it wrote anything: nothing is lost
    to.place.release()  # it is no longer its own
    other.place.release()
    assert not (tmp_path / "to").exists()
    write(opened(tmp_path / "to"), 1, 1)
    before = sorted(path.name for path in (tmp_path / "to").iterdir())
    to.place.release()
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == before
    with pytest.raises(
        ConfigError, match=r"to', which holds checkpoints already; resume their run, or name a new place$"
    ):
        to.place.claim(resumes=False)


@pytest.mark.parametrize("run", ["mine", "other"])
def test_of_two_runs_that_claim_one_place_the_first_ends_before_it_writes(run, tmp_path):
    """Neither has written anything yet, so the second may claim the place; the first fails before it writes."""
    first = opened(tmp_path)
    second = checkpoints(tmp_path, run=run)
    second.place.claim(resumes=False)
    second.start(None)
    with pytest.raises(RunError, match=r"^stage checkpoint: checkpoint\.to is .*, which is no longer this run's own$"):
        write(first, torch.zeros(BIG), 1)
    write(second, torch.ones(BIG), 1)
    assert torch.equal(second.read(second.newest().manifest), torch.ones(BIG))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(not Path("/dev/zero").exists() or not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize("what", ["zero", "pipe", "folder", "missing", "longer", "shorter"])
@pytest.mark.parametrize("kind", ["data", "checkpoint", "fedbonsai.json"])
def test_a_file_of_another_type_or_length_is_not_read(what, kind, tmp_path):
    to = opened(tmp_path)
    for version in (1, 2):
        write(to, torch.full([BIG], float(version)), version)
    newest, before = to._manifests[1], to._manifests[0]
    data = next(name for name in newest.files if name not in before.files and newest.files[name] > BIG)
    victim = tmp_path / {"data": data, "checkpoint": newest.name}.get(kind, kind)
    content = victim.read_bytes()
    victim.unlink()
    if what == "zero":
        victim.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(victim)
    elif what == "folder":
        victim.mkdir()
    elif what != "missing":
        victim.write_bytes(content + b"x" if what == "longer" else content[:-2])
    again = checkpoints(tmp_path)
    if kind == "fedbonsai.json":  # without it the files belong to no run
        with pytest.raises(ConfigError, match=r"which is not empty, and holds no checkpoints of fedbonsai"):
            again.place.claim(resumes=True)
        return
    found = again.newest()
    assert found.manifest.version == 1
    assert len(found.notices) == (0 if (what, kind) == ("missing", "checkpoint") else 1)


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def schedule(now):
    return lambda **settings: CheckpointSchedule(CheckpointSettings(**settings), now=lambda: now[0])


def test_a_checkpoint_is_due_after_versions_or_seconds(schedule, now):
    assert [schedule(every=3).due(version) for version in (1, 2, 3)] == [False, False, True]
    assert not schedule(every=None).due(99)
    either = schedule(every=100, seconds=9.0)
    assert not either.due(1)
    now[0] += 9.0
    assert either.due(1)


def test_versions_count_from_the_last_checkpoint(schedule):
    counted = schedule(every=3)
    counted.start(4)
    assert [counted.due(version) for version in (5, 6, 7)] == [False, False, True]
    counted.begin()
    counted.end(7)
    assert [counted.due(version) for version in (8, 9, 10)] == [False, False, True]


@pytest.mark.parametrize(("share", "waits_s"), [(0.2, 12.0), (0.5, 3.0), (None, 0.0)])
def test_after_a_checkpoint_that_took_long_the_next_waits(schedule, now, share, waits_s):
    limited = schedule(share=share)
    assert limited.due(1)
    limited.begin()
    now[0] += 3.0
    limited.end(1)
    if waits_s:
        now[0] += waits_s - 0.01
        assert not limited.due(2)
        now[0] += 0.01
    assert limited.due(2)
