import msgspec
import numpy as np
import pytest
from fedbonsai.actors.device.device import Device
from fedbonsai.actors.inline_pool import InlinePool
from fedbonsai.actors.messages.plan_message import plan_message
from fedbonsai.actors.pool import Task, read_report
from fedbonsai.actors.server.server import Server
from fedbonsai.comms.channel import LocalChannel
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.report import Outcome, Report

from .steps import LINE, ONE_STEP, make_plan, make_server, run


@pytest.fixture
def server() -> Server:
    return make_server(LINE)


@pytest.fixture
def pool() -> InlinePool:
    return InlinePool(Device(Workload(LINE)), LocalChannel())


def task(server: Server, device: int, **changes: object) -> Task:
    plan = make_plan(server.workload, device, training=ONE_STEP, **changes)
    return Task(plan=plan, packets=server.send(plan).packets)


def test_results_are_returned_by_plan_in_any_order(server: Server, pool: InlinePool) -> None:
    tasks = [task(server, 0), task(server, 1)]
    sizes = [pool.submit(one) for one in tasks]
    assert sizes == [len(plan_message(one.plan)) for one in tasks]
    for one in reversed(tasks):
        result = pool.result(one.plan.id)
        report, update = run(Device(Workload(LINE)), one.plan, one.packets[0])
        assert (result.plan, result.state) == (one.plan, None)
        assert (result.report.outcome, result.report.loss) == (Outcome.DONE, report.loss)
        assert np.array_equal(result.update, update)
        assert result.control_bytes > 0
    assert pool.next(None) is None


def test_next_is_the_oldest(server: Server, pool: InlinePool) -> None:
    for device in (1, 0):
        pool.submit(task(server, device))
    assert pool.next(0.0) is None  # the timeout is over: no task is started
    assert [pool.next(1e-9).plan.device, pool.next(None).plan.device] == [1, 0]
    assert pool.next(None) is None


def test_a_cancelled_task_does_not_run(server: Server, pool: InlinePool) -> None:
    first, second = task(server, 0), task(server, 1)
    for one in (first, second):
        pool.submit(one)
    pool.cancel(first.plan.id)
    pool.cancel(999)
    assert pool.next(None).plan == second.plan
    pool.submit(first)
    pool.close()
    assert pool.next(None) is None


def test_a_failure_is_a_result(server: Server, pool: InlinePool) -> None:
    one = task(server, 0)
    pool.submit(Task(plan=one.plan, packets=(one.packets[0][:-1],)))
    result = pool.result(one.plan.id)
    assert (result.report.outcome, result.report.stage, result.update) == (Outcome.FAILED, "open", None)


def test_a_plan_is_queued_once(server: Server, pool: InlinePool) -> None:
    pool.submit(task(server, 0))
    with pytest.raises(AssertionError, match="plan 10 is queued already"):
        pool.submit(task(server, 0))


def test_workers_in_process(pool: InlinePool) -> None:
    assert (pool.num_workers, pool.notices()) == (1, [])


def test_the_plan_that_a_device_echoes_is_not_trusted(server: Server) -> None:
    ours = make_plan(server.workload)
    theirs = msgspec.structs.replace(ours, id=666, device=1)
    result = read_report(ours, msgspec.msgpack.encode(Report(plan=theirs, samples=3)), None, {"s": np.ones(1)})
    assert (result.plan, result.report.plan, result.report.samples) == (ours, ours, 3)
    assert result.state == {"s": np.ones(1)}


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (b"", "truncated"),
        (b"\xc1", "malformed"),
        (b"junk", "Expected `object`"),
        (b"\x81\xa5error\xa1\xff", "invalid start byte"),
        (b"\x81\xa1x" + b"\x91" * 100_000 + b"\x01", "recursion"),
    ],
)
def test_a_report_that_cannot_be_read_is_the_failure_of_its_plan(server: Server, report: bytes, words: str) -> None:
    """The last: an unknown field of lists in lists, a hundred thousand deep."""
    plan = make_plan(server.workload)
    result = read_report(plan, report, None, None)
    assert (result.report.plan, result.report.outcome, result.report.stage) == (plan, Outcome.FAILED, "report")
    assert result.report.error.startswith(f"its report of {len(report)} bytes cannot be read: ")
    assert words in result.report.error
    assert result.control_bytes == len(report)
