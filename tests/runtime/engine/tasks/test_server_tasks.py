"""Tasks of the server in the loop, with a distiller that checks what it is given and answers with numbers by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fedbonsai
import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.actors.messages.distiller_messages import PublicInfo, StudentResult
from fedbonsai.actors.messages.model_packets import open_model, seal_model
from fedbonsai.actors.pool import Finished
from fedbonsai.comms.ledger import Ledger
from fedbonsai.learning.workload import Workload
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.plan import Upload
from fedbonsai.policies.report import Report
from fedbonsai.policies.tasks import Distil
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.configuration.policy_checks import configured_policy
from fedbonsai.runtime.configuration.resolution import DefaultPlan, workload_settings
from fedbonsai.runtime.engine.engine import Engine
from fedbonsai.runtime.engine.folding import fold_update
from fedbonsai.runtime.engine.tasks.server_tasks import ServerTasks
from fedbonsai.runtime.errors import RunError
from fedbonsai.runtime.events import Notice, PlanEnded, RunEnded, TaskEnded, VersionClosed

SAMPLES, CLASSES = 7, 10
TASK = Distil(steps=3, batch_size=2)


@dataclass
class FakeDistiller:
    """Teacher number n answers with logits of n everywhere (n from 1); the student's models come back plus 1."""

    workload: Workload
    log: list[Any] = field(default_factory=list)
    waiting: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    teachers: int = 0
    slow: bool = False  # logits are known only when they are waited for
    best_step: int = 3
    answer: Callable[[int], float] = float

    def public(self, held_out):
        self.log.append(("public", held_out))
        return PublicInfo(samples=SAMPLES, num_bytes=1000, dropped=0)

    def teach(self, request, packet):
        self.teachers += 1
        tensors = open_model(packet, self.workload.submodel(request.part), finite=True)
        self.log.append(("teach", request, packet.nbytes, tensors))
        self.waiting.append(np.full((SAMPLES, CLASSES), self.answer(self.teachers), np.float32))

    def logits(self, *, wait):
        if self.slow and not wait:
            return []
        known, self.waiting = self.waiting, []
        return known

    def distil(self, request, targets, packets):
        self.targets.append(targets.copy())
        self.log.append(("distil", request, [packet.nbytes for packet in packets]))
        answers = []
        for part, packet in zip(request.parts, packets, strict=True):
            submodel = self.workload.submodel(part)
            answers.append(seal_model({n: t + 1 for n, t in open_model(packet, submodel).items()}, submodel))
        result = StudentResult(
            steps=3,
            best_step=self.best_step,
            processed=6,
            evaluated=4,
            loss_before=2.0,
            loss_after=1.0,
            accuracy_after=0.5,
        )
        return [result] * len(packets), answers

    def notices(self):
        return []

    def close(self):
        self.log.append(("close",))

    def of(self, kind):
        return [entry for entry in self.log if entry[0] == kind]


LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**8, "down_bytes_per_s": 10**8}
BASE = {
    "backend": "inline",
    "seed": 3,
    "model": "digits_cnn",
    "data": {"name": "digits", "public_share": 0.5},
    "fleet": {
        "classes": [{"name": f"c{i}", "flop_per_s": 1e9 / 2**i} | LINK for i in range(3)],
        "server": {"flop_per_s": 1e6},
    },
    "training": {"steps": 1, "batch_size": 4},
    "evaluation": {"where": "none"},
    "policy": [{"name": "all"}, {"name": "distillation", "steps": 3, "batch_size": 2}],
    "stop": {"rounds": 1},
}


@dataclass
class Bench:
    """A run with a fake distiller, which ``settings`` are of."""

    config: Any
    policy: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        config = load_config(self.config)
        policy = self.policy or configured_policy(config)
        workload = Workload(workload_settings(config, num_devices=config.load_fleet().num_devices))
        self.distiller = FakeDistiller(workload, **self.settings)
        self.engine = Engine(config, policy)
        # (In process the engine makes its own distiller.)
        self.tasks: ServerTasks = self.engine._loop._tasks
        self.tasks._distiller = self.engine._distiller = self.distiller

    @property
    def ledger(self) -> Ledger:
        return self.tasks._ledger

    def events(self):
        return list(self.engine.events())


def only(events, of_type):
    return [event for event in events if isinstance(event, of_type)]


def test_every_update_teaches_and_every_model_learns():
    bench = Bench(BASE)
    events = bench.events()
    teachers = bench.distiller.of("teach")
    assert len(teachers) == 3
    ((_, request, _),) = bench.distiller.of("distil")
    assert (request.settings.steps, request.settings.batch_size, len(request.parts)) == (3, 2, 1)
    assert bench.distiller.targets[0].shape == (SAMPLES, CLASSES)
    # In the order of arrival, equally weighted: (1 + 2 + 3) / 3.
    np.testing.assert_allclose(bench.distiller.targets[0], 2.0)

    # The teachers are the trained models: their mean, weighted by samples, is the student before the task, plus 1 after it.
    ended = [event.report for event in only(events, PlanEnded)]
    total = sum(report.samples for report in ended)
    after = bench.engine.server.weights()
    for name in teachers[0][3]:
        mean = sum(report.samples / total * teacher[3][name] for report, teacher in zip(ended, teachers, strict=True))
        torch.testing.assert_close(after[name], mean + 1, rtol=1e-4, atol=1e-4)
    assert not torch.equal(teachers[0][3]["features.0.weight"], teachers[1][3]["features.0.weight"])

    (task,) = only(events, TaskEnded)
    assert (task.task, task.teachers, list(task.students)) == ("distil", 3, [""])
    assert (task.students[""].loss_before, task.students[""].accuracy_after, task.students[""].best_step) == (
        2.0,
        0.5,
        3,
    )
    assert task.version == only(events, VersionClosed)[0].version == 1


def test_a_student_that_did_not_improve_keeps_its_bits():
    plain = Bench(BASE | {"policy": [{"name": "all"}]})
    bench = Bench(BASE, settings={"best_step": 0})
    plain.events()
    bench.events()
    assert bench.engine.server.model_hash() == plain.engine.server.model_hash()


def test_bytes_are_counted_by_kind_and_apart_from_those_of_devices():
    bench = Bench(BASE | {"stop": {"rounds": 2}})
    events = bench.events()
    packet = bench.distiller.of("teach")[0][2]
    kinds = {
        (d, k): bench.ledger.total(d, kind=k)
        for d in ("up", "down")
        for k in ("public", "teacher", "student", "logits")
    }
    assert kinds == {
        ("down", "public"): 1000,  # once in a run
        ("down", "teacher"): 6 * packet,
        ("down", "student"): 2 * packet,
        ("up", "student"): 2 * packet,
        ("up", "logits"): 6 * SAMPLES * CLASSES * 4,
        ("up", "public"): 0,
        ("up", "teacher"): 0,
        ("down", "logits"): 0,
    }
    (ended,) = only(events, RunEnded)
    assert ended.task_bytes == sum(kinds.values())
    reports = [event.report.virtual for event in only(events, PlanEnded)]
    assert ended.down_bytes == sum(r.down_bytes for r in reports) + ended.down_by_kind["control"]
    assert ended.up_bytes == sum(r.up_bytes for r in reports) + ended.up_by_kind["control"]


def test_flops_are_charged_at_the_servers_speed():
    bench = Bench(BASE | {"stop": {"rounds": 2}})
    events = bench.events()
    row = bench.tasks.costs.row(bench.distiller.of("distil")[0][1].parts[0], bench.engine.config.training)
    flops = 3 * SAMPLES * row.forward_flops + 6 * row.training_flops + 4 * row.forward_flops
    tasks = only(events, TaskEnded)
    assert [task.flops for task in tasks] == [flops] * 2
    assert [task.seconds for task in tasks] == [flops / 1e6] * 2
    # Nothing is in flight when a round has ended: the next one begins when the server is done.
    plain = only(Bench(BASE | {"stop": {"rounds": 2}, "policy": [{"name": "all"}]}).events(), VersionClosed)
    times = [event.time_s for event in only(events, VersionClosed)]
    assert times == pytest.approx([each.time_s + n * flops / 1e6 for n, each in enumerate(plain, 1)])


def test_logits_that_come_late_are_waited_for():
    quick, slow = Bench(BASE), Bench(BASE, settings={"slow": True})
    quick.events()
    slow.events()
    assert np.array_equal(quick.distiller.targets[0], slow.distiller.targets[0])


@pytest.mark.parametrize("weighting", ["equal", "samples"])
def test_weights_of_teachers(weighting):
    policy = [{"name": "all"}, {"name": "distillation", "steps": 3, "batch_size": 2, "weighting": weighting}]
    partition = {"name": "dirichlet", "alpha": 0.3}
    bench = Bench(BASE | {"policy": policy, "data": BASE["data"] | {"partition": partition}})
    samples = [event.report.samples for event in only(bench.events(), PlanEnded)]
    assert len(set(samples)) == 3
    weights = samples if weighting == "samples" else [1, 1, 1]
    expected = sum(w * n for w, n in zip(weights, (1, 2, 3), strict=True)) / sum(weights)
    np.testing.assert_allclose(bench.distiller.targets[0], expected, rtol=1e-6)


def test_a_stale_update_teaches_less():
    """The version closes at two updates: the third one arrives in the next round, and counts half there."""
    policy = [
        {"name": "all"}, {"name": "closing", "at": 0.6}, {"name": "distillation", "steps": 3, "batch_size": 2}
    ]  # fmt: skip
    server = {"staleness": {"rule": "polynomial", "a": 1.0}}
    fleet = {"classes": [{"name": f"c{i}", "flop_per_s": 1e9 / (1, 1.1, 1.5)[i]} | LINK for i in range(3)]}
    bench = Bench(BASE | {"policy": policy, "server": server, "fleet": fleet, "stop": {"rounds": 2}})
    events = bench.events()
    done = [(e.staleness, e.report.plan.device) for e in only(events, PlanEnded) if e.report.outcome.value == "done"]
    assert [behind for behind, _ in done] == [0, 0, 1, 0]
    np.testing.assert_allclose(bench.distiller.targets[0], 1.5)
    np.testing.assert_allclose(bench.distiller.targets[1], (0.5 * 3 + 1 * 4) / 1.5, rtol=1e-6)


def test_the_deadline_of_a_round_counts_from_when_its_plans_are_sent():
    """The third device is still at work when the first round closes, so that the server's task takes time beside it."""
    link = [{"name": f"c{i}", "flop_per_s": rate} | LINK for i, rate in enumerate((1e9, 1e9, 1e4))]
    policy = [{"name": "all"}, {"name": "closing", "at": 0.6, "after_s": 5.0}, BASE["policy"][1]]
    fleet = {"classes": link, "server": {"flop_per_s": 1e6}}
    events = Bench(BASE | {"policy": policy, "fleet": fleet, "stop": {"rounds": 2}}).events()
    assert only(events, TaskEnded)[0].seconds > 6
    first, second = only(events, VersionClosed)
    assert [closed.folded for closed in (first, second)] == [2, 2]
    assert second.time_s - first.time_s > 6


def test_without_teachers_nothing_is_distilled():
    """The deadline of the only round passes before any update."""
    policy = [*BASE["policy"][:1], {"name": "closing", "after_s": 1e-6}, BASE["policy"][1]]
    bench = Bench(BASE | {"policy": policy})
    try:
        events = bench.events()
    except RunError:  # no device delivered
        events = []
    assert bench.distiller.of("distil") == []
    assert [(task.teachers, task.students, task.flops, task.seconds) for task in only(events, TaskEnded)] in (
        [], [(0, {}, 0, 0.0)]
    )  # fmt: skip


def test_a_teacher_that_has_diverged_is_left_out():
    bench = Bench(BASE, settings={"answer": lambda number: float("nan") if number == 2 else float(number)})
    events = bench.events()
    np.testing.assert_allclose(bench.distiller.targets[0], 2.0)  # (1 + 3) / 2
    (text,) = [event.text for event in only(events, Notice) if "teach" in event.text]
    assert text == "the update of device 1 does not teach the models: a teacher's logits are not finite"
    assert only(events, TaskEnded)[0].teachers == 2

    all_bad = Bench(BASE, settings={"answer": lambda number: float("inf"), "slow": True})
    events = all_bad.events()
    assert all_bad.distiller.of("distil") == []
    assert len([event for event in only(events, Notice) if "teach" in event.text]) == 3
    assert only(events, TaskEnded)[0].students == {}


@dataclass(frozen=True)
class Asks:
    """A policy that asks for tasks, by the number of plans of the version so far."""

    decide_tasks: Callable[[Any], tuple[Any, ...]]
    writes: tuple[str, ...] = ("plans", "tasks")
    counts: bool = False
    one_at_a_time: bool = False

    def init(self):
        return None

    def decide(self, view, state, decision):
        plans = [view.new_plan(device) for device in view.devices if device not in view.in_flight]
        if self.one_at_a_time:
            plans = [plan for plan in plans if plan.device == view.dispatched]
        elif view.dispatched:
            plans = []
        plans = [msgspec.structs.replace(p, upload=Upload(label_counts=self.counts)) for p in plans]
        more = self.one_at_a_time and view.dispatched < 2
        return Decision(plans=tuple(plans), tasks=self.decide_tasks(view), keep_open=more), state


def test_a_second_task_in_a_version_is_refused():
    bench = Bench(BASE, policy=Asks(lambda view: (TASK,), one_at_a_time=True))
    with pytest.raises(
        RunError, match=r"round 0, stage task: the policy asks for the task Distil in a version that has one"
    ):
        bench.events()
    once = Bench(BASE, policy=Asks(lambda view: (TASK,) if not view.dispatched else (), one_at_a_time=True))
    once.events()
    assert len(once.distiller.of("teach")) == 3


def test_a_task_of_a_policy_that_does_not_state_it_is_refused():
    config = load_config(BASE)
    engine = Engine(config, Asks(lambda view: (TASK,), writes=("plans",)))
    why = "the policy asks for the task Distil, and no policy of the chain states that it distils"
    with pytest.raises(RunError, match=f"round 0, stage task: {why}"):
        list(engine.events())


def test_a_correction_for_classes_needs_their_counts():
    task = Distil(steps=3, batch_size=2, class_prior=1.0)
    bench = Bench(BASE, policy=Asks(lambda view: (task,) if not view.dispatched else ()))
    with pytest.raises(
        RunError, match=r"device 0, round 0, stage task: the task has class_prior 1, and the device's report has"
    ):
        bench.events()
    counted = Bench(BASE, policy=Asks(lambda view: (task,) if not view.dispatched else (), counts=True))
    ended = [event.report for event in only(counted.events(), PlanEnded)]
    requests = [entry[1] for entry in counted.distiller.of("teach")]
    assert [request.label_counts for request in requests] == [report.label_counts for report in ended]
    assert [sum(request.label_counts) for request in requests] == [report.samples for report in ended]
    assert {request.class_prior for request in requests} == {1.0}


@pytest.mark.parametrize("counts", [(1,) * 9, (0,) * 10])
def test_label_counts_that_do_not_fit_are_rejected(counts):
    bench = Bench(BASE, policy=Asks(lambda view: (), counts=True))
    server, loop = bench.engine.server, bench.engine._loop
    plan = DefaultPlan.of(bench.engine.config, server.workload, bench.engine._fleet.profiles())(0, 0, 0)
    plan = server.send(msgspec.structs.replace(plan, id=1)).plan
    report = Report(plan=plan, samples=5, steps=1, label_counts=counts)
    finished = Finished(plan=plan, report=report, update=np.zeros(1, np.uint8), state=None, control_bytes=0)
    folded = fold_update(server, report, finished, behind=0, num_samples=10, staleness=None, before=loop._tasks.folded)
    assert (folded.outcome.value, folded.stage) == ("rejected", "fold")
    assert folded.error.startswith("it reports the label counts [")


class Failing(FakeDistiller):
    """Its answer fails."""

    def distil(self, request, targets, packets):
        raise KeyError("a user's transform")


def test_an_error_in_the_task_names_its_stage():
    bench = Bench(BASE)
    bench.tasks._distiller = Failing(bench.distiller.workload)
    with pytest.raises(RunError, match="round 0, stage task: KeyError"):
        bench.events()


def test_the_same_in_a_whole_run():
    """With the real distiller, twice: the same model."""
    config = BASE | {"data": {"name": "digits", "public_share": 0.03}}
    hashes = []
    for _ in range(2):
        run = fedbonsai.run(config)
        events = list(run)
        hashes.append(run.summary["model_hash"])
        assert only(events, TaskEnded)[0].teachers == 3
    assert hashes[0] == hashes[1]
