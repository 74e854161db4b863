"""Tasks start in order, one that cannot start blocks only those that need the same, and retries are counted."""

from fedbonsai.actors.pool import Finished, Task
from fedbonsai.actors.ray_backend.scheduler import Scheduler, TaskQueue
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Training
from fedbonsai.policies.plan import Plan, Split
from fedbonsai.policies.report import Outcome, Report


def make_task(id_, *, group="", host=None, view=None):
    split = Split(cut="a", host=host, mode="ecofed", view=view) if host is not None else None
    part = Part(blocks=("a",), trained=())
    plan = Plan(id=id_, device=0, version=0, part=part, training=Training(), seed=0, split=split)
    return Task(plan=plan, packets=(), group=group)


def started(queue, *, free=(), hosts=()):
    """Ids of the tasks that start, if these groups have free workers (a number of each) and these hosts are ready."""
    found, free = [], dict(free)

    def start(task):
        split = task.plan.split
        if split is not None and split.host not in hosts:
            return False
        if task.needs_device:
            if not free.get(task.group):
                return False
            free[task.group] -= 1
        found.append(task.plan.id)
        return True

    queue.dispatch(start)
    return found


def test_first_in_first_out_in_each_group_and_overall():
    queue = TaskQueue()
    for id_, group in enumerate(["", "board", "", "board", ""]):
        queue.append(make_task(id_, group=group))
    assert queue.groups == {"", "board"}
    assert started(queue, free={"": 2}) == [0, 2]
    assert started(queue, free={"": 2, "board": 1}) == [1, 4]
    assert queue.groups == {"board"}
    assert started(queue, free={"board": 5}) == [3]
    assert queue.groups == set()


def test_what_is_retried_comes_first():
    queue = TaskQueue()
    for id_ in (1, 2):
        queue.append(make_task(id_))
    for id_ in (3, 4):
        queue.append_left(make_task(id_))
    assert started(queue, free={"": 3}) == [4, 3, 1]
    assert started(queue, free={"": 3}) == [2]


def test_a_host_that_is_not_ready_blocks_only_its_own_tasks_and_a_replay_needs_no_worker():
    queue = TaskQueue()
    queue.append(make_task(1, host=0))
    queue.append(make_task(2, host=1, view="7"))
    queue.append(make_task(3, host=1))
    queue.append(make_task(4))
    assert started(queue, hosts={1}) == [2]
    assert started(queue, free={"": 9}, hosts={1}) == [3, 4]
    assert started(queue, free={"": 9}, hosts={0}) == [1]


def test_a_plan_that_is_cancelled_is_removed():
    queue = TaskQueue()
    for id_ in (1, 2):
        queue.append(make_task(id_))
    queue.discard(1)
    queue.discard(9)
    assert started(queue, free={"": 9}) == [2]
    queue.append(make_task(3))
    queue.discard(3)
    assert queue.groups == set()


def test_a_task_that_is_queued_while_others_start_is_started_too():
    queue = TaskQueue()
    queue.append(make_task(1))
    found = []

    def start(task):
        found.append(task.plan.id)
        if task.plan.id == 1:
            queue.append_left(make_task(2))
        return True

    queue.dispatch(start)
    assert found == [1, 2]


def done(task, outcome=Outcome.DONE):
    report = Report(plan=task.plan, outcome=outcome)
    return Finished(plan=task.plan, report=report, update=None, state=None, control_bytes=0)


def run_all(scheduler):
    """The tasks that start if all can: (plan, attempt)."""
    found = []
    scheduler.dispatch(lambda task: not found.append((task.plan.id, task.plan.attempt)))
    return found


def test_only_deaths_under_a_running_plan_use_up_its_attempts():
    scheduler, task = Scheduler(max_attempts=2), make_task(1)
    scheduler.submit(task)
    assert run_all(scheduler) == [(1, 0)]
    assert scheduler.retry(task, "power cut", running=False)
    assert scheduler.current(1, 0) is None
    assert run_all(scheduler) == [(1, 1)]
    assert scheduler.retry(scheduler.current(1, 1), "power cut", running=True)
    assert run_all(scheduler) == [(1, 2)]
    assert not scheduler.retry(scheduler.current(1, 2), "power cut", running=True)
    report = scheduler.finished[1].report
    assert (report.outcome, report.stage, report.error) == (Outcome.LOST, "run", "power cut")
    assert not scheduler.has_tasks


def test_a_plan_that_has_ended_has_a_result_and_no_deaths():
    scheduler, task = Scheduler(max_attempts=2), make_task(1)
    for _ in range(2):
        scheduler.submit(task)
        assert scheduler.retry(task, "power cut", running=True)
        scheduler.finish(done(task))
        assert scheduler.finished.pop(1).report.outcome == Outcome.DONE
        assert not scheduler.has_tasks
        run_all(scheduler)


def lost_view():
    """A scheduler with a replay whose view is lost, and the two tasks."""
    scheduler, upload, replay = Scheduler(max_attempts=3), make_task(1, host=0), make_task(2, host=0, view="1")
    scheduler.submit(replay)
    run_all(scheduler)
    assert scheduler.upload_again(upload, replay)
    return scheduler, upload


def test_a_replay_whose_view_is_lost_waits_until_it_is_uploaded_again():
    scheduler, upload = lost_view()
    assert run_all(scheduler) == [(1, 0)]
    scheduler.finish(done(upload))
    assert scheduler.finished == {}
    assert run_all(scheduler) == [(2, 1)]
    scheduler.finish(done(scheduler.current(2, 1)))
    assert list(scheduler.finished) == [2]


def test_a_replay_fails_with_the_upload_of_its_view():
    scheduler, upload = lost_view()
    scheduler.finish(done(upload, Outcome.FAILED))
    report = scheduler.finished[2].report
    assert report.outcome == Outcome.FAILED
    assert report.error.startswith("its view is lost, and could not be uploaded again: ")


def test_a_view_that_is_lost_again_and_again_loses_its_plan():
    scheduler, upload = lost_view()
    scheduler.finish(done(upload))
    assert scheduler.upload_again(upload, scheduler.current(2, 1))
    scheduler.finish(done(upload))
    assert not scheduler.upload_again(upload, scheduler.current(2, 2))
    assert scheduler.finished[2].report.error == "its partition host has lost its view again and again"


def test_with_a_replay_the_upload_of_its_view_is_cancelled():
    scheduler, _ = lost_view()
    scheduler.cancel(2)
    assert not scheduler.has_tasks
    assert run_all(scheduler) == []
