"""Devices in real child processes, under real limits."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.enforcement.data_segment import limit_obstacle
from fedbonsai.actors.enforcement.enforced_device import EnforcedDevice, make_device
from fedbonsai.actors.enforcement.probe import smallest_limit
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.comms.codec import Array
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.spec import Call, Training
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.plan import Objective, Plan
from fedbonsai.policies.report import Answer, Outcome, Report

from ...runtime.processes import LIMIT_S, alive, descendants, wait_until
from ..steps import IMAGES, LINE, ONE_STEP, make_plan, make_server, weights_packet

pytestmark = pytest.mark.skipif(bool(limit_obstacle()), reason=f"no limit of the data segment: {limit_obstacle()}")
DOWN = weights_packet(0, {"w": np.array([[0.5]], "<f4")})
ENOUGH = 400_000_000


@pytest.fixture(scope="module")
def images() -> Iterator[EnforcedDevice]:
    """One child for several tests; its module is on the path when each of them runs."""
    device = EnforcedDevice(IMAGES)
    yield device
    device.close()


@pytest.fixture
def line() -> Iterator[EnforcedDevice]:
    device = EnforcedDevice(LINE)
    yield device
    device.close()


def run(device: EnforcedDevice | Device, plan: Plan, packet: Array = DOWN) -> tuple[Report, Array | None]:
    answer, update, state = device.run(plan_message(plan), [packet])
    assert state is None
    return Report.of(plan, msgspec.msgpack.decode(answer, type=Answer)), update


def line_plan(loss: str = "half_square", *, memory_bytes: int | None = ENOUGH, device: int = 1) -> Plan:
    training = msgspec.structs.replace(ONE_STEP, loss=Call(f"my_models:{loss}"))
    return make_plan(Workload(LINE), device, training=training, memory_bytes=memory_bytes)


def without_figures(report: Report) -> Report:
    return msgspec.structs.replace(report, measured=Report(plan=report.plan).measured, enforced=None)


@pytest.mark.parametrize("memory_bytes", [ENOUGH, None])
def test_report_and_update_are_those_of_a_device_in_this_process(
    images: EnforcedDevice, memory_bytes: int | None
) -> None:
    server = make_server(IMAGES)
    plan = make_plan(server.workload, 2, memory_bytes=memory_bytes)
    packet = server.send(plan).packets[0]
    found, update = run(images, plan, packet)
    expected, wanted = run(Device(Workload(IMAGES)), plan, packet)
    assert found.outcome == Outcome.DONE
    assert without_figures(found) == without_figures(expected)
    assert update is not None
    assert np.array_equal(update, wanted)
    assert (found.enforced, expected.enforced) == ((True, False) if memory_bytes else (None, None))
    assert found.measured.peak_memory_bytes > 0


def test_an_evaluation_comes_back(images: EnforcedDevice) -> None:
    server = make_server(IMAGES)
    plan = make_plan(server.workload, 1, objective=Objective(kind="evaluate"))
    packet = server.send(plan).packets[0]
    found, update = run(images, plan, packet)
    assert found.metrics == run(Device(Workload(IMAGES)), plan, packet)[0].metrics != {}
    assert update is None


def test_a_plan_beyond_its_budget_is_out_of_memory_the_child_is_replaced_and_the_next_plan_is_done(
    line: EnforcedDevice,
) -> None:
    line.warm_up()
    before = line.pid
    report, update = run(line, line_plan("large", memory_bytes=20_000_000))
    assert (report.outcome, report.stage, report.enforced, update) == (Outcome.OUT_OF_MEMORY, "train", True, None)
    assert "Unable to allocate 47.7 MiB" in report.error
    assert line.pid not in (None, before)
    report, update = run(line, line_plan("large"))
    assert (report.outcome, report.enforced) == (Outcome.DONE, True)
    assert update is not None


def test_steps_are_timed_in_the_child_which_may_die_of_them(line: EnforcedDevice) -> None:
    first, second = line.time_steps([plan_message(line_plan()), plan_message(line_plan("without_ray"))])
    assert first is not None
    assert second is not None
    assert min(first, second) > 0
    before = line.pid
    assert line.time_steps([plan_message(line_plan()), plan_message(line_plan("deadly"))]) == [None, None]
    report, _ = run(line, line_plan())
    assert (report.outcome, line.pid == before) == (Outcome.DONE, False)


def test_the_child_has_no_ray_and_what_user_code_prints_is_no_message(line: EnforcedDevice) -> None:
    report, _ = run(line, line_plan("without_ray"))
    assert (report.outcome, report.error) == (Outcome.DONE, "")


def test_a_death_under_a_limit_is_out_of_memory_with_device_round_and_stage(line: EnforcedDevice) -> None:
    report, update = run(line, line_plan("deadly"))
    assert (report.outcome, report.stage, report.enforced, update) == (Outcome.OUT_OF_MEMORY, "train", True, None)
    assert report.error == (
        "its process ended by SIGKILL under a limit of 400.0 MB above the idle trainer (device 1, round 0, stage train)"
    )
    assert run(line, line_plan())[0].outcome == Outcome.DONE


def test_a_death_without_a_limit_is_tried_again_and_after_three_the_plan_is_lost(
    line: EnforcedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = run(line, line_plan("deadly", memory_bytes=None))
    assert (report.outcome, report.stage, report.enforced) == (Outcome.LOST, "run", None)
    assert report.error == "its process ended by SIGKILL in stage train"
    line.close()
    monkeypatch.setenv("MY_FLAG", str(tmp_path / "died"))
    report, update = run(line, line_plan("deadly", memory_bytes=None))
    assert report.outcome == Outcome.DONE
    assert (tmp_path / "died").exists()
    assert np.array_equal(update, run(Device(Workload(LINE)), line_plan(memory_bytes=None))[1])


def test_a_child_that_is_killed_while_it_is_idle_is_replaced(line: EnforcedDevice) -> None:
    line.warm_up()
    assert line.pid is not None
    before = line.pid
    os.kill(before, signal.SIGKILL)
    # Its first thread may be a zombie while the others still end, and it can be waited for only after them.
    wait_until(
        lambda: (
            Path(f"/proc/{before}/stat").read_text().split()[2] == "Z" and len(os.listdir(f"/proc/{before}/task")) == 1
        ),
        told="the child was not killed",
    )
    assert run(line, line_plan())[0].outcome == Outcome.DONE
    assert line.pid != before


def test_what_the_child_cannot_load_is_raised_here() -> None:
    device = EnforcedDevice(msgspec.structs.replace(LINE, data=DataConfig(name="my_models:no_points")))
    with pytest.raises(ValueError, match="these points do not exist"):
        device.warm_up()
    assert device.pid is None


def test_where_the_system_has_no_limit_plans_run_here_and_the_report_says_so() -> None:
    device = make_device(LINE, enforce=True, obstacle=lambda: "it has none")
    assert isinstance(device, Device)
    report, _ = run(device, line_plan())
    assert (report.outcome, report.enforced) == (Outcome.DONE, False)
    assert isinstance(make_device(LINE, enforce=False), Device)
    assert isinstance(make_device(LINE, enforce=True), EnforcedDevice)


def test_a_limit_that_the_probe_finds_is_enough_and_two_thirds_of_it_are_not(line: EnforcedDevice) -> None:
    message = plan_message(line_plan("large"))
    found = smallest_limit(lambda limit: line.try_limit(message, limit), guess=30_000_000)
    assert 50_000_000 <= found <= 70_000_000
    assert run(line, line_plan("large", memory_bytes=int(1.1 * found)))[0].outcome == Outcome.DONE
    assert run(line, line_plan("large", memory_bytes=2 * found // 3))[0].outcome == Outcome.OUT_OF_MEMORY


def test_a_trial_that_fails_for_another_reason_is_an_error(line: EnforcedDevice) -> None:
    message = plan_message(line_plan("failing"))
    with pytest.raises(RuntimeError, match="failed for another reason than memory: ValueError: this loss has no value"):
        line.try_limit(message, ENOUGH)


ORPHAN = """
import sys, time
from fedbonsai.actors.enforcement.enforced_device import EnforcedDevice
from fedbonsai.tests.actors.steps import LINE
device = EnforcedDevice(LINE)
device.warm_up()
print(device.pid, flush=True)
time.sleep(600)
"""


def test_the_child_ends_with_a_parent_that_is_killed() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
    finally:
        parent.kill()
        parent.wait(LIMIT_S)
        parent.stdout.close()
    wait_until(lambda: not Path(f"/proc/{child}").exists(), told="the child outlived its parent")


TRIAL = """
from fedbonsai.actors.enforcement.enforced_device import EnforcedDevice
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.tests.actors.enforcement.test_enforced_device import ENOUGH, line_plan
from fedbonsai.tests.actors.steps import LINE
EnforcedDevice(LINE).try_limit(plan_message(line_plan("endless")), ENOUGH)
"""


def test_a_trial_that_does_not_end_ends_with_a_worker_that_is_killed() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started: set[int] = set()
    try:
        with subprocess.Popen([sys.executable, "-c", TRIAL], env=environment) as worker:
            try:
                # The child, and its fork.
                wait_until(lambda: len(descendants(worker.pid)) == 2, told="no trial has begun")
                started = descendants(worker.pid)
            finally:
                worker.kill()
        wait_until(lambda: not any(map(alive, started)), told="the child or its trial outlived the worker")
    finally:
        for pid in filter(alive, started):
            os.kill(pid, signal.SIGKILL)


def test_plans_of_many_batch_sizes_leave_the_idle_trainer_as_it_was(images: EnforcedDevice) -> None:
    """A budget that is enough for a plan on a fresh child is enough after other plans: the limit is above what is idle then."""
    server = make_server(IMAGES)
    outcomes = []
    for batch in (2, 12, 3, 7, 12, 2):
        plan = make_plan(server.workload, 0, training=Training(batch_size=batch), memory_bytes=12_000_000)
        outcomes.append(run(images, plan, server.send(plan).packets[0])[0].outcome)
    assert outcomes == [Outcome.DONE] * 6
