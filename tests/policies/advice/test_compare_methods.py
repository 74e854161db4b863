"""Costs of rounds of whole fleets, checked by hand, and the sentences about them."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from fedbonsai.clusters.fleet import load_fleet
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.spec import Sparsity, Training
from fedbonsai.policies.advice.compare_methods import MethodCost, compare_methods
from fedbonsai.policies.advice.verdict import cheaper, verdict
from fedbonsai.policies.checks.statements import UploadPeriod
from fedbonsai.policies.decision import Decision
from fedbonsai.policies.estimate import Estimate
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.plan import Plan
from fedbonsai.policies.policy import Identity
from fedbonsai.policies.view import View
from msgspec.structs import replace

BLOCKS = ("a", "b", "c")
METHODS = {"FedAvg": Identity(), "SplitFed": SplitFed(cut="a"), "EcoFed": EcoFed(cut="b", period=4)}


@dataclass
class World:
    """A fleet and its view. By the sample, in seconds: a whole model 3, a front cut 2, a frozen one 1; hosts 50 FLOP.

    Bytes up, and as many down: of weights 300, or 60 of a front; across the cut 10 by the sample, of EcoFed 8 and none down.
    """

    samples: tuple[int, ...]
    fleet: dict
    asked: int = 0

    HOST: ClassVar[int] = 50

    def __post_init__(self):
        self.fleet = load_fleet(self.fleet)
        profiles = self.fleet.profiles()
        self.view = View(
            time_s=0.0, version=7, seed=1, profiles=profiles, samples=self.samples, hosts=self.fleet.hosts.count,
            replay=[("t", "b", 0, "1", 1, 1)], plan_maker=self.new_plan, estimator=self.estimate,
        )  # fmt: skip

    def new_plan(self, device):
        return Plan(
            id=0, device=device, version=0, part=Part(blocks=BLOCKS, trained=BLOCKS), training=Training(), seed=0
        )

    def estimate(self, device, plan):
        self.asked += 1
        n, split = self.samples[device], plan.split
        if split is None:
            size = 300 if plan.part.blocks == BLOCKS else 60
            return Estimate(seconds=3.0 * n, up_bytes=size, down_bytes=size, peak_memory_bytes=90)
        host = {"host_flops": self.HOST * n}
        if split.mode == "splitfed":
            size = 60 + 10 * n
            return Estimate(seconds=2.0 * n, up_bytes=size, down_bytes=size, peak_memory_bytes=40, **host)
        if split.view is None:
            return Estimate(seconds=1.0 * n, up_bytes=8 * n, peak_memory_bytes=20, **host)
        return Estimate(seconds=0.5 * n, peak_memory_bytes=20, **host)


def devices(name="a", count=1, memory=100, **changes):
    rates = {"up_bytes_per_s": 1000, "down_bytes_per_s": 1000}
    return {"name": name, "count": count, "flop_per_s": 1, "memory_bytes": memory} | rates | changes


def compared(
    samples, classes, methods=METHODS, *, hosts=None, cohort=None, refusal=lambda plan: "", rounds=8, **changes
):
    fleet = {"classes": classes, "hosts": {"flop_per_s": 1e9} | (hosts or {})} | changes
    world = World(tuple(samples), fleet)
    return compare_methods(world.view, world.fleet, methods, rounds=rounds, cohort=cohort, refusal=refusal)


def test_a_row_for_each_method():
    fedavg, splitfed, ecofed = compared((10, 20), [devices(count=2)])
    assert fedavg == MethodCost(
        method="FedAvg", cuts={"": 2}, seconds=60.0, bound="device class a", num_bytes=600.0, peak_memory_bytes=90
    )
    assert (splitfed.cuts, splitfed.seconds, splitfed.num_bytes) == ({"a": 2}, 40.0, 2 * (60 + 10 * 15))
    # One round of four uploads: 20 s, 8 bytes by the sample; three replay: 10 s.
    assert (ecofed.cuts, ecofed.seconds, ecofed.num_bytes) == ({"b": 2}, (20 + 3 * 10) / 4, 8 * 15 / 4)
    assert (splitfed.peak_memory_bytes, ecofed.peak_memory_bytes) == (40, 20)


def test_uploads_are_counted_as_the_policy_decides_them():
    """Four devices, 20 rounds. An upload takes 20 s and 8 x 20 bytes, a replay 10 s."""

    def ecofed(**fields):
        (found,) = compared((20,) * 4, [devices(count=4)], {"EcoFed": EcoFed(cut="b", **fields)}, rounds=20)
        return found.num_bytes, found.seconds

    assert ecofed(period=1) == (160.0, 20.0)
    assert ecofed(period=2) == (80.0, 15.0)
    assert ecofed(period=3) == (160 * 7 / 20, (7 * 20 + 13 * 10) / 20)
    # One upload each in the first round, and never again.
    assert ecofed(uploads="views") == (160 / 20, (20 + 19 * 10) / 20)
    # From round 1 on two of the four upload again in every round, and every round lasts as long as an upload.
    assert ecofed(uploads="views", refresh=1) == (160 * (4 + 19 * 2) / 80, 20.0)
    # All are old in rounds 4, 8, 12 and 16: two upload again in each of these, and two in the next.
    assert ecofed(uploads="views", refresh=4) == (160 * (4 + 4 * 4) / 80, (9 * 20 + 11 * 10) / 20)


@dataclass(frozen=True)
class Sparser:
    """A user's policy by which a device with 20 samples or more trains at a sparsity of 0.5, and the others at 0.9."""

    writes: ClassVar[tuple[str, ...]] = ("training.sparsity",)

    def init(self):
        return None

    def decide(self, view, state, decision):
        def sparser(plan):
            sparsity = Sparsity(weights=0.5 if view.samples[plan.device] >= 20 else 0.9)
            return replace(plan, training=replace(plan.training, sparsity=sparsity))

        return replace(decision, plans=tuple(map(sparser, decision.plans))), state


def test_a_method_that_sets_sparsities_has_the_number_of_devices_of_each():
    (found, plain) = compared((10, 20, 30), [devices(count=3)], {"own": Sparser(), "FedAvg": Identity()})
    assert (found.sparsities, plain.sparsities) == (((0.5, 2), (0.9, 1)), ())


@dataclass(frozen=True)
class OwnPolicy:
    """A user's policy that makes EcoFed's plans."""

    def init(self):
        return None

    def decide(self, view, state, decision):
        return EcoFed(cut="b").decide(view, state, decision)


@dataclass(frozen=True)
class OwnPeriod(OwnPolicy):
    """The same, and it states that devices upload in every fourth round."""

    def upload_period(self, *, devices, cohort, rounds):
        return UploadPeriod(full=rounds / 4, some=0.0, part=0.0)


def test_replays_are_counted_for_every_policy_that_states_its_uploads():
    stated, built_in, unstated = compared(
        (10, 20), [devices(count=2)], {"own": OwnPeriod(), "EcoFed": METHODS["EcoFed"], "unstated": OwnPolicy()}
    )
    assert (stated.seconds, stated.num_bytes) == (built_in.seconds, built_in.num_bytes) == ((20 + 3 * 10) / 4, 30.0)
    assert (unstated.seconds, unstated.num_bytes) == (20.0, 120.0)  # as if its devices uploaded in every round


def test_with_views_a_link_carries_the_devices_that_upload():
    shared = {"w": {"up_bytes_per_s": 5, "down_bytes_per_s": 100}}
    methods = {"EcoFed": EcoFed(cut="b", uploads="views", refresh=1)}
    (row,) = compared((20,) * 4, [devices(count=4, shared_link="w")], methods, rounds=2, shared_links=shared)
    assert row.seconds == (4 * 160 / 5 + 2 * 160 / 5) / 2


@pytest.mark.parametrize("refresh", [0, 1, 3, 6])
@pytest.mark.parametrize("cohort", [12, 6, 3])
def test_its_upload_period_is_that_of_the_policys_own_decisions(cohort, refresh):
    """Against 40 rounds of ``decide``, every upload buffered: bytes and the share of rounds with uploads."""
    world = World((10,) * 12, {"classes": [devices(count=12)], "hosts": {"flop_per_s": 1e9}})
    method, rounds = EcoFed(cut="b", period=3, uploads="views", refresh=refresh), 40
    since, sent, busy = {}, 0, 0
    for version in range(rounds):
        chosen = sorted(np.random.default_rng(version).permutation(12)[:cohort].tolist())
        replay = [("t", "b", device, str(device), version - then, 1) for device, then in since.items()]
        view = dataclasses.replace(world.view, version=version, seed=version, replay=replay)
        decision, _ = method.decide(view, None, Decision(plans=tuple(map(world.new_plan, chosen))))
        uploads = [plan.device for plan in decision.plans if plan.split.view is None]
        since |= dict.fromkeys(uploads, version)
        sent, busy = sent + len(uploads), busy + bool(uploads)
    found = method.upload_period(devices=12, cohort=cohort, rounds=rounds)
    assert cohort * (found.full + found.some * found.part) == pytest.approx(sent, rel=0.2)
    assert found.full + found.some == pytest.approx(busy, rel=0.35)


def test_a_host_works_for_all_of_its_devices():
    # 30 samples x 50 FLOP at 2 hosts of 10 FLOP/s: 75 s, of uploads and of replays.
    fedavg, splitfed, ecofed = compared((10, 20), [devices(count=2)], hosts={"count": 2, "flop_per_s": 10})
    assert (fedavg.seconds, splitfed.seconds, splitfed.bound) == (60.0, 75.0, "hosts")
    assert (ecofed.seconds, ecofed.bound) == (75.0, "hosts")


def test_devices_that_share_a_head_take_turns():
    # 2 s each by the sample, one after another: 2 + 4 + 6 on one host; on two hosts half of that is no more than the slowest.
    methods = {"SplitFed": SplitFed(cut="a", head="shared")}
    (one,) = compared((1, 2, 3), [devices(count=3)], methods)
    assert (one.seconds, one.bound) == (12.0, "turns at hosts")
    (two,) = compared((1, 2, 3), [devices(count=3)], methods, hosts={"count": 2})
    assert two.seconds == 6.0


def test_a_cohort_is_a_share_of_what_is_shared_and_as_slow_as_the_slowest():
    rows = compared((10, 20), [devices(count=2)], hosts={"flop_per_s": 10}, cohort=1)
    assert [(row.seconds, row.bound) for row in rows[:2]] == [(60.0, "device class a"), (75.0, "hosts")]


def test_a_shared_link_has_to_carry_all_bytes():
    shared = {"w": {"up_bytes_per_s": 5, "down_bytes_per_s": 100}}
    rows = compared((10, 20), [devices(count=2, shared_link="w")], shared_links=shared)
    fedavg, splitfed, ecofed = rows
    assert (fedavg.seconds, fedavg.bound) == (600 / 5, "link w")
    assert (splitfed.seconds, splitfed.bound) == ((120 + 300) / 5, "link w")
    assert (ecofed.seconds, ecofed.bound) == ((240 / 5 + 3 * 10) / 4, "link w")


def test_weights_cross_the_servers_link_and_activations_the_hosts():
    rows = compared((10, 20), [devices(count=2)], server={"up_bytes_per_s": 1, "down_bytes_per_s": 1000})
    assert [(row.seconds, row.bound) for row in rows] == [
        (600.0, "the server's link"), (120.0, "the server's link"), ((20 + 30) / 4, "device class a")
    ]  # fmt: skip
    rows = compared((10, 20), [devices(count=2)], hosts={"count": 2, "up_bytes_per_s": 1000, "down_bytes_per_s": 2})
    assert [(row.seconds, row.bound) for row in rows[:2]] == [(60.0, "device class a"), (300 / 4, "hosts' links")]
    assert rows[2].bound == "device class a"


def test_devices_that_cannot_take_part_are_listed_and_not_counted():
    classes = [devices(), devices("small", 2, memory=80), devices("tiny", memory=10)]
    rows = compared((10, 20, 20, 30), classes, METHODS | {"auto": SplitFed(cut="auto")})
    told = {row.method: row.unable for row in rows}
    assert told["FedAvg"] == (
        ("small: memory: needs 0.001 MB, has 0 MB", 2),
        ("tiny: memory: needs 0.001 MB, has 0 MB", 1),
    )
    assert told["EcoFed"] == (("tiny: memory: needs 0.001 MB, has 0 MB", 1),)
    assert told["auto"] == (("tiny: memory: needs at least 0.001 MB, has 0 MB", 1),)
    assert [row.seconds for row in rows] == [30.0, 40.0, (20 + 3 * 10) / 4, 40.0]


def test_a_plan_that_would_be_refused_is_not_counted():
    rows = compared((10,), [devices()], refusal=lambda plan: "it is split" if plan.split else "")
    assert [row.seconds for row in rows] == [30.0, None, None]
    assert rows[1].unable == (("a: it is split", 1),)
    assert verdict(rows) == "only FedAvg can be carried out"
    assert cheaper(rows, "EcoFed") == ""
    assert verdict(rows[1:]) == "no device can take part in any of these methods"


def test_a_method_that_the_model_does_not_allow_is_not_counted():
    rows = compared((10, 20), [devices(count=2)], METHODS | {"SplitFed": SplitFed(cut="c")})
    assert [row.seconds is None for row in rows] == [False, True, False]
    assert rows[1].unable == (("any: cut is 'c'; this model can be cut behind: a, b", 2),)


@dataclass(frozen=True)
class Halves:
    """Half of the channels for devices with more than 10 samples."""

    writes: ClassVar[tuple[str, ...]] = ("part",)

    def init(self):
        return None

    def decide(self, view, state, decision):
        (plan,) = decision.plans
        width = 0.5 if view.samples[plan.device] > 10 else 1.0
        return Decision(plans=(plan.with_("half", part=replace(plan.part, width=width)),)), state


def test_the_widths_of_a_method_that_sets_them():
    narrow, plain = compared((10, 20, 20), [devices(count=3)], {"narrow": Halves(), "FedAvg": Identity()})
    assert (narrow.widths, narrow.cuts) == (((0.5, 2), (1.0, 1)), {"": 3})
    assert plain.widths == ()


def test_a_method_with_a_fault_is_not_estimated():
    fleet = {"classes": [devices(count=2)], "hosts": {"flop_per_s": 1e9}}
    world = World((10, 20), fleet)
    (row,) = compare_methods(world.view, world.fleet, {"narrow": Halves()}, rounds=8, faults={"narrow": "no channels"})
    assert (world.asked, row.seconds, row.unable) == (0, None, (("any: no channels", 2),))


def test_devices_without_samples_are_not_counted():
    assert compared((10, 0), [devices(count=2)])[0].cuts == {"": 1}
    assert compared((0,), [devices()])[0].seconds is None


def test_few_devices_represent_ten_thousand():
    fleet = {"classes": [devices("a", 6000), devices("b", 4000)], "hosts": {"flop_per_s": 1e9}}
    same = World((10,) * 6000 + (20,) * 4000, fleet)
    (row,) = compare_methods(same.view, same.fleet, {"FedAvg": Identity()}, rounds=8)
    assert (same.asked, row.cuts, row.seconds) == (2, {"": 10_000}, 60.0)
    many = World(tuple(1 + device % 500 for device in range(10_000)), fleet)
    rows = compare_methods(many.view, many.fleet, METHODS, rounds=8)
    assert many.asked <= 2 * 16 * 7  # one estimate of FedAvg, three of each of the others
    assert [row.seconds for row in rows[:2]] == [1500.0, 1000.0]  # the largest stands for itself
    assert rows[1].num_bytes == pytest.approx(2 * (60 + 10 * 250.5), rel=0.01)
    assert sum(rows[2].cuts.values()) == 10_000


def row(method, num_bytes, seconds, *, unable=(), guessed=False):
    return MethodCost(
        method=method,
        cuts={"": 1},
        seconds=seconds,
        bound="",
        num_bytes=num_bytes,
        peak_memory_bytes=1,
        unable=unable,
        guessed=guessed,
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [row("FedAvg", 120, 6), row("SplitFed", 60, 9), row("EcoFed", 10, 2)],
            "EcoFed: 12x fewer bytes and 3x less time than FedAvg",
        ),
        (
            [row("FedAvg", 10, 2), row("SplitFed", 60, 9), row("EcoFed", 13, 5)],
            "plain FedAvg is cheaper: 1.3x fewer bytes and 2.5x less time than EcoFed",
        ),
        (
            [row("FedAvg", 100, 2), row("EcoFed", 10, 5)],
            "EcoFed: 10x fewer bytes than FedAvg; FedAvg: 2.5x less time than EcoFed",
        ),
        ([row("FedAvg", 5, 2, unable=(("m", 3),)), row("EcoFed", 1, 1)],
         "EcoFed: 5x fewer bytes and 2x less time than FedAvg; 3 devices cannot take part in FedAvg"),
        ([row("SplitFed", 4, 2), row("EcoFed", 1, 1)], "EcoFed: 4x fewer bytes and 2x less time than SplitFed"),
    ],
)  # fmt: skip
def test_the_verdict_is_one_sentence(rows, sentence):
    assert verdict(rows) == sentence


def test_cheaper_methods_are_named():
    assert cheaper([row("FedAvg", 9, 9), row("EcoFed", 1, 1)], "EcoFed") == ""
    told = cheaper([row("FedAvg", 1, 9), row("SplitFed", 4, 2), row("EcoFed", 3, 6)], "EcoFed")
    assert told == (
        "a round of EcoFed costs more than it must at these settings: FedAvg 3x fewer bytes, SplitFed 3x less time"
    )


def test_a_difference_within_the_uncertainty_of_a_guess_is_not_reported():
    rows = [row("FedAvg", 10, 9), row("EcoFed", 29, 1, guessed=True)]
    assert cheaper(rows, "EcoFed") == ""
    assert verdict(rows) == (
        "FedAvg: 2.9x fewer bytes than EcoFed; EcoFed: 9x less time than FedAvg; "
        "what EcoFed sends is a first guess, which may be up to 3x too high"
    )
    rows = [row("FedAvg", 10, 9), row("SplitFed", 10, 1), row("EcoFed", 60, 12, guessed=True)]
    assert cheaper(rows, "EcoFed") == (
        "a round of EcoFed costs more than it must at these settings: "
        "FedAvg at least 2x fewer bytes, SplitFed at least 2x fewer bytes and at least 4x less time"
    )
    assert "guess" not in verdict(rows)
