"""Whole runs over links with memory: the preset, its identities, the counted bytes, and faults of links."""

from dataclasses import dataclass, field

import fedbonsai
import numpy as np
import pytest
from fedbonsai.actors.inline_pool import InlinePool
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.links.memory import HeldModel
from fedbonsai.comms.links.predict import HISTORY, Residual
from fedbonsai.comms.links.state import from_state, split_held, to_state
from fedbonsai.policies.decision import Decision
from fedbonsai.runtime.errors import ConfigError, RunError
from fedbonsai.runtime.events import Evaluated, PlanEnded
from msgspec.structs import replace

from .pools import WrappedPool

SIX = {
    "classes": [
        {
            "name": f"c{i}",
            "flop_per_s": 1e9 / 2**i,
            "memory_bytes": 10**9,
            "up_bytes_per_s": 10**9,
            "down_bytes_per_s": 10**9,
        }
        for i in range(6)
    ]
}
BASE = {"backend": "inline", "seed": 5, "fleet": SIX, "training": {"epochs": 2}, "server": {"statistics": "batch"}}


def finished(*, policy=None, **changes):
    run = fedbonsai.run(BASE | {"stop": {"rounds": 3}} | changes, policy=policy)
    events = list(run)
    return run.summary, events


@dataclass(frozen=True)
class Linked:
    """All devices, or ``cohort`` of them in turn, with these links and codecs."""

    down: Residual | None = None
    up: Residual | None = None
    codecs: tuple[CodecSpec, ...] = ()
    cohort: int = 6

    def init(self):
        return None

    def decide(self, view, state, decision):
        if view.dispatched:
            return decision, state
        first = view.version * self.cohort
        devices = sorted((first + k) % 6 for k in range(self.cohort))
        changes = {"link_down": self.down, "link_up": self.up, "codec_down": self.codecs, "codec_up": self.codecs}
        return Decision(plans=tuple(replace(view.new_plan(device), **changes) for device in devices)), state


LZ4 = (CodecSpec("lz4"),)


@pytest.fixture(scope="module")
def fedavg():
    return {cohort: finished(policy=Linked(cohort=cohort))[0]["model_hash"] for cohort in (6, 4)}


@pytest.mark.parametrize("cohort", [pytest.param(6, marks=pytest.mark.soak), 4])
@pytest.mark.parametrize("rule", HISTORY)
def test_lossless_residuals_are_fedavg_bit_for_bit(fedavg, rule, cohort):
    up = Residual(rule=rule, arithmetic="bits")
    down = up if rule not in ("delta", "drift") else Residual(rule="half_step", arithmetic="bits")
    for links in ({"up": up}, {"down": down}, {"up": up, "down": down, "codecs": LZ4}):
        assert finished(policy=Linked(cohort=cohort, **links))[0]["model_hash"] == fedavg[cohort]


def test_with_the_codec_off_the_preset_is_fedavg_bit_for_bit(fedavg):
    delta = {"up": Residual(rule="delta"), "down": Residual(rule="stationary", arithmetic="bits")}
    assert finished(policy=Linked(**delta))[0]["model_hash"] == fedavg[6]


def test_the_preset_saves_most_of_the_bytes_and_counts_all_of_them():
    dense, _ = finished()
    sparse, events = finished(preset="resfed")
    assert sparse["up_bytes"] * 50 < dense["up_bytes"]
    assert sparse["down_bytes"] * 50 < dense["down_bytes"]
    assert sparse["resyncs"] == 0
    assert set(sparse["up_by_kind"]) == {"control", "weights"}
    ended = [event.report for event in events if isinstance(event, PlanEnded)]
    assert sparse["up_by_kind"]["weights"] == sum(report.virtual.up_bytes for report in ended)
    # The first messages hold no model: both ends make it from the seed.
    assert sum(report.virtual.down_bytes for report in ended if report.plan.version == 0) == 6 * 64


@pytest.mark.parametrize(("off", "on"), [("up", "down"), ("down", "up")])
def test_each_direction_can_be_switched_off(off, on):
    dense, _ = finished()
    run = fedbonsai.run(BASE | {"stop": {"rounds": 3}, "preset": "resfed"}, settings=[f"policy.1.{off}=none"])
    for _ in run:
        pass
    half = run.summary
    assert half[f"{off}_by_kind"]["weights"] == dense[f"{off}_by_kind"]["weights"]
    assert half[f"{on}_by_kind"]["weights"] * 50 < dense[f"{on}_by_kind"]["weights"]


def test_with_partial_participation_absent_devices_catch_up():
    run = fedbonsai.run(BASE | {"stop": {"rounds": 8}, "preset": "resfed"}, settings=["policy.0.cohort=2"])
    reports = [event.report for event in run if isinstance(event, PlanEnded)]
    assert {report.outcome.value for report in reports} == {"done"}
    assert all(report.held == report.plan.version for report in reports)
    assert run.summary["resyncs"] == 0


def test_slow_links_transfer_fewer_bytes():
    fleet = {"classes": [SIX["classes"][0], SIX["classes"][1] | {"up_bytes_per_s": 1000, "down_bytes_per_s": 1000}]}
    run = fedbonsai.run(
        BASE | {"fleet": fleet, "preset": "resfed", "stop": {"rounds": 4}},
        settings=["policy.1.density=0.1", "policy.1.steps=[[0.01, 1]]", "policy.1.upload_s=1", "policy.1.download_s=1"],
    )
    densities = {}
    for event in run:
        if isinstance(event, PlanEnded):
            plan = event.report.plan
            found = plan.codec_up[0].options["density"], plan.codec_down[0].options["density"]
            densities.setdefault(plan.device, []).append(found)
            assert event.report.outcome.value == "done"
    # Two thousand bytes at 10 %, six hundred at 1 %: known before the first packet.
    assert densities == {0: [(0.1, 0.1)] * 4, 1: [(0.01, 0.01)] * 4}
    assert run.summary["resyncs"] == 0


def test_a_link_with_room_for_the_finest_codec_keeps_it_after_missed_rounds():
    # One message at 10 % is about 2.5 kB, 0.13 s of this link; its bound is 14 kB, and catching up takes up to 15 kB.
    fleet = {"classes": [SIX["classes"][0] | {"count": 6, "up_bytes_per_s": 20_000, "down_bytes_per_s": 20_000}]}
    limits = ["policy.1.steps=[[0.01, 1], [0.0025, 1]]", "policy.1.upload_s=0.25", "policy.1.download_s=0.25"]
    run = fedbonsai.run(
        BASE | {"fleet": fleet, "preset": "resfed", "stop": {"rounds": 8}, "training": {"epochs": 1}},
        settings=["policy.0.cohort=2", "policy.1.density=0.1", *limits],
    )
    reports = [event.report for event in run if isinstance(event, PlanEnded)]
    assert {report.plan.reasons[-1] for report in reports} == {"residuals: down stationary 0.1, up delta 0.1"}
    assert max(report.virtual.down_s for report in reports) > 0.25
    assert run.summary["resyncs"] == 0


@dataclass
class Meddling(WrappedPool):
    """The in-process pool, which damages some updates and loses the memory of one device."""

    answered: list = field(default_factory=list)

    def submit(self, task):
        if task.plan.device == 1 and task.plan.version == 2:
            task = replace_state(task)
        return self.inner.submit(task)

    def result(self, plan_id):
        finished = self.inner.result(plan_id)
        self.answered.append(finished.plan.id)
        if finished.plan.device == 0 and finished.plan.version == 1:
            update = np.array(finished.update)
            update[60] ^= 1
            finished = type(finished)(**{**vars(finished), "update": update})
        return finished


def replace_state(task):
    return type(task)(**{**vars(task), "state": None})


def test_a_damaged_update_is_rejected_and_a_lost_memory_is_created_again(monkeypatch):
    import fedbonsai.runtime.engine.engine as engine

    monkeypatch.setattr(engine, "InlinePool", lambda *parts: Meddling(InlinePool(*parts)))
    summary, events = finished(preset="resfed", stop={"rounds": 5})
    odd = [event.report for event in events if isinstance(event, PlanEnded) and event.report.outcome.value != "done"]
    found = [(report.plan.device, report.plan.version, report.outcome.value, report.stage) for report in odd]
    assert found == [(0, 1, "rejected", "fold"), (1, 2, "failed", "open")]
    assert "CorruptPacket" in odd[0].error
    assert "holds no model" in odd[1].error
    assert summary["resyncs"] == 1
    assert summary["down_by_kind"]["resync"] == 64 + 4 * 38_282  # a dense model, in its packet
    assert summary["outcomes"]["done"] == 28


@dataclass
class OneBitOff(WrappedPool):
    """The in-process pool, in which a bit of the model that devices 0 to 3 hold is another one in version 2."""

    def submit(self, task):
        if task.plan.version == 2 and task.plan.device < 4:
            held, sent = split_held(task.packets)
            end = from_state(task.state, held)
            model = end.memory.models[-1]
            name = next(name for name in model.arrays if name.endswith("weight"))
            bits = np.array(model.arrays[name]).view(np.uint32)
            bits.reshape(-1)[0] ^= 1
            arrays = {**model.arrays, name: bits.view(np.float32)}
            end.memory.models[-1] = HeldModel(model.version, model.hash, arrays)
            task = type(task)(**{**vars(task), "state": to_state(end), "packets": tuple(sent)})
        return self.inner.submit(task)


def test_after_a_hash_mismatch_links_are_resynchronised_and_the_accuracy_recovers(monkeypatch):
    import fedbonsai.runtime.engine.engine as engine

    settings = {"preset": "resfed", "stop": {"rounds": 8}}
    clean, undisturbed = finished(**settings)
    monkeypatch.setattr(engine, "InlinePool", lambda *parts: OneBitOff(InlinePool(*parts)))
    faulty, disturbed = finished(**settings)
    odd = [event.report for event in disturbed if isinstance(event, PlanEnded) and event.report.outcome.value != "done"]
    assert {(report.plan.version, report.stage, report.out_of_sync) for report in odd} == {(2, "open", True)}
    assert sorted(report.plan.device for report in odd) == [0, 1, 2, 3]
    assert (clean["resyncs"], faulty["resyncs"]) == (0, 4)
    assert faulty["down_by_kind"]["resync"] == 4 * (64 + 4 * 38_282)  # dense models, in their packets
    expected, found = accuracies(undisturbed), accuracies(disturbed)
    assert found[:2] == expected[:2]
    assert found[2] < expected[2] - 0.02
    assert found[-1] > expected[-1] - 0.03 > 0.85


def accuracies(events):
    """The accuracy of each version, from 1 on."""
    return [event.server["accuracy"] for event in events if isinstance(event, Evaluated)]


def test_an_update_that_is_not_finite_is_rejected_and_the_round_goes_on():
    # One device's own loss overflows; the others deliver.
    fleet = {"classes": [dict(SIX["classes"][0], count=3)]}

    @dataclass(frozen=True)
    class Hot:
        def init(self):
            return None

        def decide(self, view, state, decision):
            if view.dispatched:
                return decision, state
            plans = []
            for device in range(3):
                plan = replace(
                    view.new_plan(device),
                    link_up=Residual(rule="delta", feedback=True),
                    codec_up=(CodecSpec("topk", {"density": 0.01}), CodecSpec("ternary"), CodecSpec("entropy")),
                )
                if device == 1:
                    hot = replace(plan.training, optimiser=replace(plan.training.optimiser, learning_rate=1e30))
                    plan = replace(plan, training=hot)
                plans.append(plan)
            return Decision(plans=tuple(plans)), state

    summary, events = finished(fleet=fleet, policy=Hot(), stop={"rounds": 2})
    bad = [event.report for event in events if isinstance(event, PlanEnded) and event.report.outcome.value != "done"]
    assert [(report.plan.device, report.outcome.value, report.stage) for report in bad] == [(1, "rejected", "seal")] * 2
    assert "holds NaN or infinity" in bad[0].error
    assert summary["outcomes"]["done"] == 4


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["policy.1.up=deltas"], "policy[1].up is 'deltas'; it must be one of auto, none, delta, drift, stationary, "),
        (["policy.1.density=0"], "policy[1].density is 0: expected `float` > 0.0"),
        (
            ["policy.1.steps=[[0.001, 1]]"],
            "policy[1] (residuals): steps is ((0.001, 1),), which no limit chooses among",
        ),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings, sentence):
    with pytest.raises(ConfigError) as caught:
        fedbonsai.run(BASE | {"preset": "resfed"}, settings=settings)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ({"up": Residual(rule="half_step", feedback=True)}, "feeds errors back by itself"),
        ({"down": Residual(rule="delta")}, "a downlink's rule is one of: stationary, half_step, second_order"),
    ],
)
def test_a_policy_that_chooses_unstable_links_is_refused(links, words):
    with pytest.raises(RunError, match=words):
        finished(policy=Linked(**links))
