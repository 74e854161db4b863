"""Tasks begin in order, and one that waits holds up only those that wait for the same."""

from fedbonsai.actors.pool import Task
from fedbonsai.actors.ray_backend.task_queue import TaskQueue
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Training
from fedbonsai.policies.plan import Plan, Split


def make_task(id_, *, group="", host=None, view=None):
    split = Split(cut="a", host=host, mode="ecofed", view=view) if host is not None else None
    part = Part(blocks=("a",), trained=())
    plan = Plan(id=id_, device=0, version=0, part=part, training=Training(), seed=0, split=split)
    return Task(plan=plan, packets=(), group=group)


def taken(queue, *, free=(), hosts=()):
    """Ids of the tasks that begin, where these groups have free workers (a number of each) and these hosts are there."""
    found, free = [], dict(free)

    def begin(task):
        split = task.plan.split
        if split is not None and split.host not in hosts:
            return False
        if task.needs_device:
            if not free.get(task.group):
                return False
            free[task.group] -= 1
        found.append(task.plan.id)
        return True

    queue.begin(begin)
    return found


def test_first_in_first_out_in_each_group_and_overall():
    queue = TaskQueue()
    for id_, group in enumerate(["", "board", "", "board", ""]):
        queue.append(make_task(id_, group=group))
    assert queue.groups == {"", "board"}
    assert taken(queue, free={"": 2}) == [0, 2]
    assert taken(queue, free={"": 2, "board": 1}) == [1, 4]
    assert queue.groups == {"board"}
    assert taken(queue, free={"board": 5}) == [3]
    assert queue.groups == set()


def test_what_is_placed_again_comes_first():
    queue = TaskQueue()
    for id_ in (1, 2):
        queue.append(make_task(id_))
    for id_ in (3, 4):
        queue.append_left(make_task(id_))
    assert taken(queue, free={"": 3}) == [4, 3, 1]
    assert taken(queue, free={"": 3}) == [2]


def test_a_host_that_is_not_there_holds_up_its_own_only_and_a_replay_needs_no_worker():
    queue = TaskQueue()
    queue.append(make_task(1, host=0))
    queue.append(make_task(2, host=1, view="7"))
    queue.append(make_task(3, host=1))
    queue.append(make_task(4))
    assert taken(queue, hosts={1}) == [2]
    assert taken(queue, free={"": 9}, hosts={1}) == [3, 4]
    assert taken(queue, free={"": 9}, hosts={0}) == [1]


def test_a_plan_that_is_cancelled_is_taken_out():
    queue = TaskQueue()
    for id_ in (1, 2):
        queue.append(make_task(id_))
    queue.discard(1)
    queue.discard(9)
    assert taken(queue, free={"": 9}) == [2]
    queue.append(make_task(3))
    queue.discard(3)
    assert queue.groups == set()


def test_what_joins_while_others_begin_is_taken_too():
    queue = TaskQueue()
    queue.append(make_task(1))
    found = []

    def begin(task):
        found.append(task.plan.id)
        if task.plan.id == 1:
            queue.append_left(make_task(2))
        return True

    queue.begin(begin)
    assert found == [1, 2]
