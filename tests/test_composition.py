"""All pairs of methods: each is carried out, in process and on Ray to the same bits, or refused when the run is made.

A method is a few policies with their settings, and a sign by which a run shows that the method has acted in it. Rows that are
carried out run in process, each alone. A run on Ray takes seconds, so that there several rows share one: the methods of
``TOGETHER`` are in one chain, and every pair of them is a row; those of ``AT_LENGTH`` complete the table under ``make soak``.
"""

from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

import fedbonsai
import pytest
import torch
import yaml
from fedbonsai.learning.data.types import SamplePool, Samples
from fedbonsai.learning.store import model_hash
from fedbonsai.runtime.cli.exit_codes import exit_code_of
from fedbonsai.runtime.cli.main import app
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import BlocksMoved, Notice, PlanEnded, TaskEnded, VersionClosed
from msgspec.structs import replace
from sklearn.datasets import load_digits
from torch import nn

from .runtime.processes import killed_in_mid_stream
from .runtime.resuming import facts, started
from .runtime.test_ray_resume import on_ray

ROUNDS = 3
LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**6, "down_bytes_per_s": 10**6, "latency_s": 0.01}
SPEEDS = (1e8, 6e7, 3e7, 1e7)  # FLOP/s: under ``linear`` each device has another width
SMALL = {"name": "small", "kwargs": {"in_channels": 1, "image_size": 8}}
# Between the server and the actor of its task, or the hosts: in the ledger, and in no report.
WITHIN = ("control", "host", "public", "teacher", "student", "logits")


def fleet(*models, **changes):
    """Four devices, from fast to slow, of these families of models ("": the global one), and three hosts."""
    models = models or ("", "", "", "")
    classes = [
        {"name": f"c{i}", "flop_per_s": speed, "model": model} | LINK | changes
        for i, (speed, model) in enumerate(zip(SPEEDS, models, strict=True))
    ]
    return {"classes": classes, "hosts": {"count": 3, "flop_per_s": 6e7}}


BASE = {
    "backend": "inline",
    "seed": 5,
    "fleet": fleet(),
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}, "public_share": 0.5},
    "training": {"batch_size": 4, "steps": 6, "optimiser": {"learning_rate": 0.02}},
    "evaluation": {"every": ROUNDS},
    "stop": {"rounds": ROUNDS},
}


def plans(events):
    return [event.report.plan for event in events if isinstance(event, PlanEnded)]


def narrow(rule):
    return lambda events: {plan.part.channels for plan in plans(events) if plan.part.width < 1} == {rule}


def cut_by(mode, head):
    return lambda events: {(p.split.mode, p.split.head) for p in plans(events) if p.split} == {(mode, head)}


def folds(number):
    return lambda events: (
        max(event.folded for event in events if isinstance(event, VersionClosed)) <= number
        and any(event.staleness for event in events if isinstance(event, PlanEnded))
    )


def teaches(events):
    return all(event.teachers for event in events if isinstance(event, TaskEnded)) and any(
        figures.best_step for event in events if isinstance(event, TaskEnded) for figures in event.students.values()
    )


STAGE_ROUNDS = ("shrink_rounds", "imitate_rounds", "grow_rounds")


def in_stages(events):
    """A proxy has learned to imitate, blocks before a trained one were frozen, and movement was measured."""
    return (
        "imitate" in {plan.objective.kind for plan in plans(events)}
        and any(plan.part.cached for plan in plans(events))
        and any(isinstance(event, BlocksMoved) for event in events)
    )


def trains_sparsely(events):
    """All plans that send weights trained with sparse products, and sent a selection of these layers' weights."""
    sending = [plan for plan in plans(events) if plan.objective.kind in ("train", "imitate")]
    return {(plan.training.sparsity.weights, plan.codec_up[0].name) for plan in sending} == {(0.9, "topk")}


@dataclass(frozen=True)
class Method:
    """``place``: of its policies in a chain. ``settings``: further ones. ``sign``: whether it has acted, from the events."""

    place: int
    sign: object
    policies: tuple = ()
    settings: dict = field(default_factory=dict)


LEVELS = {"name": "width", "rule": "linear", "levels": [1.0, 0.5, 0.25, 0.125], "unit": "width", "min_channels": 1}
DISTIL = {
    "name": "distillation",
    "steps": 6,
    "batch_size": 32,
    "check_every": 2,
    "learning_rate": 5e-4,
    "held_out": 0.2,
}
SPARSE = {"training": BASE["training"] | {"sparsity": {"weights": 0.9, "activations": 0.9, "period": 4}}}
STALE = {"server": {"staleness": {"rule": "polynomial"}}}
METHODS = {
    "fedbuff": Method(0, folds(2), ({"name": "asynchronous", "buffer": 2},), STALE),
    "fedasync": Method(0, folds(1), ({"name": "asynchronous", "buffer": 1},), STALE),
    "splitfed": Method(1, cut_by("splitfed", "slots"), ("splitfed",)),
    "shared head": Method(1, cut_by("splitfed", "shared"), ({"name": "splitfed", "head": "shared"},)),
    "local loss": Method(1, cut_by("local_loss", "slots"), ("local_loss",)),
    "ecofed": Method(1, lambda events: len({plan.replays for plan in plans(events)}) == 2, ("ecofed",)),
    "heterofl": Method(2, narrow("prefix"), (LEVELS | {"scaled": True, "channels": "prefix"},)),
    "fedrolex": Method(2, narrow("rolling"), (LEVELS | {"scaled": True, "channels": "rolling", "refresh": 1},)),
    "reft": Method(
        2,
        lambda events: narrow("l1")(events) and teaches(events),
        (LEVELS | {"channels": "l1", "warm_up": 0, "refresh": 1}, DISTIL),
    ),
    "distillation": Method(3, teaches, (DISTIL | {"class_prior": 1.0},)),
    "residuals": Method(
        4, lambda events: all(plan.link_up and plan.link_down for plan in plans(events)), ("residuals",)
    ),
    "partial work": Method(
        5,
        lambda events: all(plan.deadline_s for plan in plans(events) if plan.trains_on_device),
        ({"name": "closing", "after_s": 0.72, "partial": True},),
    ),
    "families": Method(
        6,
        lambda events: {"", "small"} == {plan.part.model for plan in plans(events)},
        settings={"models": {"small": SMALL}, "fleet": fleet("", "small", "", "small")},
    ),
    "profl": Method(2, in_stages, ({"name": "profl"} | dict.fromkeys(STAGE_ROUNDS, 1),)),
    "zerofl": Method(3.5, trains_sparsely, ("zerofl",), SPARSE),
}

CUTS = ("splitfed", "shared head", "local loss", "ecofed")
WIDTHS = ("heterofl", "fedrolex", "reft")


def composed(*names, **changes):
    """The configuration of several methods."""
    found = sorted((METHODS[name] for name in names), key=lambda method: method.place)
    policy = [{"name": "all"}] if all(method.place for method in found) else []
    policy += [link for method in found for link in method.policies]
    config = BASE | {"policy": [{"name": link} if isinstance(link, str) else link for link in policy]}
    for method in found:
        config |= method.settings
    return config | changes


def two_cuts(first, second):
    which = "which cuts it too; allowed: one policy that cuts the model"
    return f"policy[1] ({first}) cuts the model before policy[2] ({second}), {which}"


def no_width(cut, why):
    return f"policy[2] (width) narrows the model behind policy[1] ({cut}), {why}"


def no_memory(cut):
    return (
        f"policy[1] ({cut}) cuts the model before policy[2] (residuals), which gives links a memory, and those of a cut model "
        "cannot have one yet; allowed: one of the two"
    )


TWO_WIDTHS = (
    "policy[2] (width) narrows the model behind policy[1] (width), which sets the widths of the parts that it is given; "
    "allowed: one policy that sets widths, behind the others"
)
ONE_COPY = (
    "whose devices train one copy of a host's blocks, which has one width; allowed: head: slots, or one of the two"
)
HEADS = "whose heads at the cut have the size of whole blocks; allowed: one of the two"
TRUNK = "whose frozen trunk is the same on all devices; allowed: one of the two"
REFUSED = {
    (
        "fedbuff",
        "fedasync",
    ): "policy[0] (asynchronous) sets the number of updates that closes a version before policy[1] "
    "(asynchronous), which sets it too; allowed: one of the two",
    ("splitfed", "shared head"): two_cuts("splitfed", "splitfed"),
    ("splitfed", "local loss"): two_cuts("splitfed", "local_loss"),
    ("splitfed", "ecofed"): two_cuts("splitfed", "ecofed"),
    ("shared head", "local loss"): two_cuts("splitfed", "local_loss"),
    ("shared head", "ecofed"): two_cuts("splitfed", "ecofed"),
    ("local loss", "ecofed"): two_cuts("local_loss", "ecofed"),
    ("heterofl", "fedrolex"): TWO_WIDTHS,
    ("heterofl", "reft"): TWO_WIDTHS,
    ("fedrolex", "reft"): TWO_WIDTHS,
    (
        "reft",
        "distillation",
    ): "policy[2] (distillation) gives the server a task before policy[3] (distillation), which changes "
    "the model of a round too; allowed: one of the two",
    **{("shared head", width): no_width("splitfed", ONE_COPY) for width in WIDTHS},
    **{("local loss", width): no_width("local_loss", HEADS) for width in WIDTHS},
    **{("ecofed", width): no_width("ecofed", TRUNK) for width in WIDTHS},
    (
        "ecofed",
        "distillation",
    ): "policy[2] (distillation) gives the server a task behind policy[1] (ecofed), whose trunk is "
    "frozen, and the task would train it; allowed: one of the two",
    **{
        (cut, "residuals"): no_memory(name)
        for cut, name in zip(CUTS, ("splitfed", "splitfed", "local_loss", "ecofed"), strict=True)
    },
    (
        "shared head",
        "partial work",
    ): "policy[2] (closing) has devices stop early behind policy[1] (splitfed), which sends the "
    "plans of a round one after another; allowed: one of the two",
    (
        "ecofed",
        "families",
    ): "models is {'small': Call(name='small', kwargs={'in_channels': 1, 'image_size': 8})}; policy[1] "
    "(ecofed) has one frozen trunk, which is the global model's; allowed: empty",
    **{
        (
            cut,
            "profl",
        ): f"policy[1] ({name}) cuts the model before policy[2] (profl), which divides the model between device "
        "and host; allowed: one of the two"
        for cut, name in zip(CUTS, ("splitfed", "splitfed", "local_loss", "ecofed"), strict=True)
    },
    **{
        (
            width,
            "profl",
        ): "policy[1] (width) narrows the model before policy[2] (profl), which says what part of the model a "
        "device trains; allowed: one such policy"
        for width in ("heterofl", "fedrolex")
    },
    (
        "reft",
        "profl",
    ): "policy[1] (width) narrows the model before policy[3] (profl), which says what part of the model a "
    "device trains; allowed: one such policy",
    (
        "distillation",
        "profl",
    ): "policy[1] (profl) gives the server a task before policy[2] (distillation), which changes the "
    "model of a round too; allowed: one of the two",
    (
        "families",
        "profl",
    ): "models is {'small': Call(name='small', kwargs={'in_channels': 1, 'image_size': 8})}; policy[1] "
    "(profl) trains the global model block by block; allowed: empty",
    (
        "ecofed",
        "zerofl",
    ): "policy[2] (zerofl) sets how sparsely the model is trained behind policy[1] (ecofed), whose devices train nothing; "
    "allowed: one of the two",
    (
        "residuals",
        "zerofl",
    ): "policy[2] (residuals) sets codec_up behind policy[1] (zerofl), which selects what is sent, and a link holds one "
    "selection at most; allowed: one of the two, or rule: all",
}
PAIRS = tuple(combinations(METHODS, 2))
CARRIED_OUT = tuple(pair for pair in PAIRS if pair not in REFUSED)
# Every row that is carried out is a pair of one of these, or of ``AT_LENGTH``.
TOGETHER = (
    ("fedbuff", "reft", "residuals", "partial work", "families"),
    ("fedasync", "splitfed", "fedrolex", "distillation", "partial work", "families", "zerofl"),
    ("fedbuff", "residuals", "partial work", "profl"),
)
AT_LENGTH = (
    ("fedasync", "heterofl", "distillation", "residuals", "partial work", "families"),
    ("fedbuff", "shared head", "distillation", "families", "zerofl"),
    ("fedbuff", "local loss", "distillation", "partial work", "families", "zerofl"),
    ("fedbuff", "ecofed", "partial work"),
    ("fedasync", "splitfed", "reft", "families"),
    ("fedbuff", "splitfed", "heterofl", "distillation", "partial work", "zerofl"),
    ("fedbuff", "fedrolex", "residuals"),
    ("splitfed", "reft", "partial work", "zerofl"),
    *(("fedasync", cut) for cut in CUTS[1:]),
    ("fedasync", "reft", "residuals"),
    ("fedasync", "profl", "zerofl"),
)


def told(run):
    """What must be the same in process and on Ray."""
    names = (
        "up_bytes",
        "down_bytes",
        "up_by_kind",
        "down_by_kind",
        "task_bytes",
        "host_bytes",
        "virtual_s",
        "outcomes",
    )
    return {"weights": model_hash(run.weights())} | {name: run.summary[name] for name in ("model_hash", *names)}


def carried_out(names, **changes):
    """A run of several methods: its events, and what it has come to. Every plan was done, or late."""
    run = fedbonsai.run(composed(*names, **changes))
    events = list(run)
    ended = [event.report for event in events if isinstance(event, PlanEnded)]
    assert {report.outcome.value for report in ended} <= {"done", "late"}, [report.error for report in ended]
    assert [name for name in names if not METHODS[name].sign(events)] == []
    for direction in ("up", "down"):
        ledger = run.summary[f"{direction}_by_kind"]
        devices = sum(size for kind, size in ledger.items() if kind not in WITHIN)
        assert devices == sum(getattr(report.virtual, f"{direction}_bytes") for report in ended)
        assert run.summary[f"{direction}_bytes"] == devices + ledger["control"]
    return told(run)


@cache
def in_process(names):
    return carried_out(names)


def test_the_table_has_every_pair_once():
    assert set(REFUSED) <= set(PAIRS)
    assert set(CARRIED_OUT) == {pair for names in TOGETHER + AT_LENGTH for pair in combinations(names, 2)}


@pytest.mark.parametrize("pair", CARRIED_OUT, ids=" + ".join)
def test_two_methods_together(pair):
    in_process(pair)


@pytest.mark.parametrize("pair", REFUSED, ids=" + ".join)
def test_two_methods_are_refused_when_the_run_is_made(pair):
    with pytest.raises(ConfigError) as caught:
        fedbonsai.run(composed(*pair))
    assert str(caught.value) == REFUSED[pair]


def test_on_the_command_line_a_refusal_is_one_line_and_exit_code_2(tmp_path, capsys):
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(composed("ecofed", "reft")))
    code = exit_code_of(lambda: app(["run", str(path), "--out", str(tmp_path / "run")], standalone_mode=False))
    assert code == 2
    assert capsys.readouterr().err == f"error: {REFUSED['ecofed', 'reft']}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "names", [*TOGETHER, *(pytest.param(names, marks=pytest.mark.soak) for names in AT_LENGTH)], ids=" + ".join
)
def test_on_ray_methods_come_to_the_bits_of_this_process(names):
    assert carried_out(names, backend="ray", workers=2) == in_process(names)


def test_the_preset_of_reft_narrows_and_teaches():
    config = BASE | {"preset": "reft"}
    run = fedbonsai.run(
        config, settings=["policy.1.warm_up=0", *(f"policy.2.{k}={DISTIL[k]}" for k in ("steps", "held_out"))]
    )
    events = list(run)
    assert narrow("l1")(events)
    assert len({plan.part.width for plan in plans(events)}) > 1
    assert [event.teachers for event in events if isinstance(event, TaskEnded)] == [4] * ROUNDS


RESUMED = (("fedbuff", "reft"), ("splitfed", "reft", "families"), ("profl",), ("fedbuff", "zerofl"))
RESUMED_AT_LENGTH = (
    ("reft",),
    ("reft", "residuals"),
    ("fedbuff", "shared head", "families"),
    ("local loss", "families"),
    ("fedbuff", "residuals", "profl"),
    ("splitfed", "reft", "zerofl"),
)


@pytest.mark.parametrize(
    "names", [*RESUMED, *(pytest.param(names, marks=pytest.mark.soak) for names in RESUMED_AT_LENGTH)], ids=" + ".join
)
def test_a_run_that_is_left_in_the_middle_goes_on_to_the_same_bits(names, tmp_path):
    config = composed(*names, stop={"rounds": 4}, checkpoint={"share": None})
    expected = fedbonsai.run(config, out=tmp_path / "whole")
    list(expected)
    started(config, tmp_path / "run", stops=2)
    run = fedbonsai.run(config, resume=tmp_path / "run")
    notices = [event.text for event in run if isinstance(event, Notice)]
    assert notices[0].startswith("the run goes on after version ")
    assert told(run) == told(expected)
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


# Rounds that take longer than ``DELAY_S`` on one core.
LONG = {"data": {"name": "digits", "public_share": 0.1}, "training": {"batch_size": 4}, "evaluation": {"where": "none"}}


@pytest.mark.soak
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("method", ["reft", "profl", "zerofl"])
def test_a_method_on_ray_with_a_worker_killed_in_a_round(method):
    sparsity = METHODS[method].settings.get("training", {}).get("sparsity")
    config = composed(method, **LONG) | {"training": LONG["training"] | ({"sparsity": sparsity} if sparsity else {})}
    expected = fedbonsai.run(config | {"stop": {"rounds": 2}})
    list(expected)
    summary = killed_in_mid_stream(config, "WorkerActor")
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes")
    assert {key: summary[key] for key in same} == {key: expected.summary[key] for key in same}


# What takes the idea of a method away leaves the bits of the simpler one.

WHOLE = {"name": "width", "rule": "fixed", "widths": dict.fromkeys(("c0", "c1", "c2", "c3"), 1.0)}


def test_at_width_1_without_distillation_reft_is_fedavg():
    fedavg = outcome(composed())
    assert outcome(composed(policy=["all", WHOLE])) == fedavg
    assert outcome(composed(policy=["all", WHOLE | {"scaled": True, "channels": "rolling"}])) == fedavg
    half = WHOLE | {"widths": WHOLE["widths"] | {"c3": 0.5}}
    assert outcome(composed(policy=["all", half]))["weights"] != fedavg["weights"]


@pytest.mark.parametrize("cut", ["local_loss", "ecofed", {"name": "splitfed", "head": "shared"}], ids=str)
def test_width_1_goes_with_what_forbids_others(cut):
    assert outcome(composed(policy=["all", cut, WHOLE])) == outcome(composed(policy=["all", cut]))


def test_distillation_of_no_step_changes_no_bit():
    without = outcome(composed(policy=["all", LEVELS]))
    distilled = outcome(composed(policy=["all", LEVELS, DISTIL | {"steps": 0}]))
    same = ("weights", "model_hash", "up_bytes", "down_bytes", "outcomes")
    assert {key: distilled[key] for key in same} == {key: without[key] for key in same}


def outcome(config):
    """What a run comes to."""
    run = fedbonsai.run(config)
    list(run)
    return told(run)


def in_order(*models):
    """A fleet in which the slowest device is the last whatever it sends: sums of float32 depend on the order of arrival."""
    fast = fleet(*models, up_bytes_per_s=10**9, down_bytes_per_s=10**9)
    return fast | {"hosts": {"count": 4, "flop_per_s": 1e12}}


def test_cut_models_of_two_families_come_to_the_bits_of_whole_ones():
    of_two = {"fleet": in_order("", "small", "", "small")}
    whole = fedbonsai.run(composed("families", **of_two))
    list(whole)
    cut = fedbonsai.run(composed("families", "splitfed", **of_two))
    assert {plan.split.cut for plan in plans(list(cut))} == {"features.0"}
    for family in ("", "small"):
        assert model_hash(cut.weights(family=family)) == model_hash(whole.weights(family=family))


@dataclass(frozen=True)
class FirstTwo:
    """The two fastest devices, in every round."""

    def init(self):
        return None

    def decide(self, view, state, decision):
        made = () if view.dispatched else tuple(view.new_plan(device) for device in (0, 1))
        return replace(decision, plans=made), state


@pytest.mark.parametrize("cut", [(), ("splitfed",), ("shared head",), ("local loss",)], ids=str)
def test_a_family_with_the_name_and_the_blocks_of_the_global_model_is_another_model(cut):
    twin = {"models": {"digits_cnn": {"name": "digits_cnn"}}, "fleet": in_order("", "", "digits_cnn", "digits_cnn")}
    both = fedbonsai.run(composed(*cut, **twin))
    list(both)
    policy = [{"name": f"{__name__}:FirstTwo"}, *composed(*cut)["policy"][1:]]
    alone = fedbonsai.run(composed(policy=policy, fleet=in_order()))
    list(alone)
    assert model_hash(both.weights()) == model_hash(alone.weights())  # of devices 2 and 3 it has nothing
    family, start = both.weights(family="digits_cnn"), fedbonsai.run(composed(**twin, stop={"rounds": 0}))
    list(start)
    assert sorted(family) == sorted(both.weights())
    assert model_hash(family) != model_hash(both.weights())
    assert model_hash(start.weights(family="digits_cnn")) not in (model_hash(family), model_hash(start.weights()))


def linear(num_classes=10):
    """A model of one layer: all of its channels are inputs or outputs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def frozen(num_classes=10):
    """A model whose first layer is frozen."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
    model[1].requires_grad_(False)
    return model


def digits_again(*, num_devices, seed, root):
    """The samples that the devices have, under another name."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return SamplePool(train=Samples(x, torch.tensor(digits.target)), num_classes=10)


WIDTH, COLOUR = {"name": "width"}, {"name": "synthetic", "kwargs": {"shape": [3, 32, 32], "samples_per_device": 8}}
FIXED = WIDTH | {"rule": "fixed"}
MISTAKES = {
    "a class that the fleet lacks": (
        {"policy": ["all", FIXED | {"widths": {"c0": 1.0, "c1": 0.5, "c2": 0.5, "c3": 0.5, "c9": 0.5}}]},
        "policy[1] (width): widths names the class 'c9', which the fleet does not have; allowed: c0, c1, c2, c3",
    ),
    "a class without a width": (
        {"policy": ["all", FIXED | {"widths": {"c0": 1.0}}]},
        "policy[1] (width): widths has no width for the class 'c1'; it must name all of: c0, c1, c2, c3",
    ),
    "a single layer": (
        {"policy": ["all", WIDTH], "model": f"{__name__}:linear"},
        "model: this model cannot be narrowed: it has no channels but those of its inputs and outputs; policy[1] (width) needs "
        "a model that can be narrowed",
    ),
    "ShuffleNet": (
        {"policy": ["all", WIDTH], "model": "torchvision/shufflenet_v2_x0_5", "data": COLOUR},
        "model: this model cannot be narrowed: ",
    ),
    "frozen parameters": (
        {"policy": ["all", WIDTH], "model": f"{__name__}:frozen"},
        "model: 520 parameters are frozen (requires_grad is False), and are not sent; policy[1] (width) narrows only models "
        "without such parameters",
    ),
    "a family that cannot be narrowed": (
        {"policy": ["all", WIDTH], "fleet": fleet("", "", "", "one"), "models": {"one": f"{__name__}:linear"}},
        "models.one: this model cannot be narrowed: it has no channels but those of its inputs and outputs; policy[1] (width) ",
    ),
    "a family that cannot be cut": (
        {"policy": ["all", "splitfed"], "fleet": fleet("", "", "", "one"), "models": {"one": f"{__name__}:linear"}},
        "policy[1] (splitfed) cuts the model models.one, which cannot be cut: it has only one layer with weights of two ",
    ),
    "a cut that a family lacks": (
        composed("families", policy=["all", {"name": "splitfed", "cut": "features.2"}]),
        "policy[1] (splitfed) cuts behind 'features.2'; the clean cuts of models.small are: features.0 (32x4x4), ",
    ),
    "a family with other outputs": (
        composed("families", models={"small": {"name": "small", "kwargs": SMALL["kwargs"] | {"num_classes": 9}}}),
        "models.small gives (2, 9) where model gives (2, 10); they must be alike",
    ),
    "a family that no class has": (
        {"models": {"small": SMALL}},
        "models names 'small', which would never be trained: it is the model of no class of the fleet; allowed: names that "
        "classes have as their model, or a policy that distils, such as {name: distillation}",
    ),
    "a family that is not in models": (
        {"models": {"small": SMALL}, "fleet": fleet("", "", "", "big")},
        "fleet class 'c3' has model 'big'; the families in models: small",
    ),
    "a family of an unknown model": (
        composed("families", models={"small": "smal"}),
        "models.small: model.name is 'smal', which is unknown; did you mean small? ",
    ),
    "a family without a name": (
        {"models": {"": SMALL}},
        "models names ''; a name consists of letters, digits, '_' and '-'",
    ),
    "a family with a colon": (
        {"models": {"a:b": SMALL}},
        "models names 'a:b'; a name consists of letters, digits, '_' and '-'",
    ),
    "the devices' own data, by name": (
        {"policy": ["all", DISTIL], "data": {"name": "digits"}, "server": {"public": {"name": "digits"}}},
        "server.public.name is 'digits', which is what the devices have; leave server.public out, and set data.public_share",
    ),
    "the devices' own data, by their samples": (
        {
            "policy": ["all", DISTIL],
            "data": {"name": "digits"},
            "server": {"public": {"name": f"{__name__}:digits_again"}},
        },
        "the public set (server.public, or data.public_share) has 1797 samples, of which 1797 are also on a device or in the ",
    ),
    "no public data": (
        {"policy": ["all", DISTIL], "data": {"name": "digits"}},
        "data.public_share is 0 and server.public is null; policy[1] (distillation) distils on a public set: allowed are a ",
    ),
    "labels that a class may not send": (
        {"policy": ["all", DISTIL | {"class_prior": 1.0}], "fleet": fleet(may_send=["weights", "statistics"])},
        "fleet class 'c0' may send only statistics, weights; policy[1] (distillation) makes it send labels",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_any_training(mistake):
    changes, sentence = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        next(fedbonsai.run(composed() | changes))  # there is no first event
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_family_that_no_class_has_is_trained_by_distillation():
    run = fedbonsai.run(composed("distillation", models={"small": SMALL}))
    students = [event.students for event in run if isinstance(event, TaskEnded)]
    assert [sorted(each) for each in students] == [["", "small"]] * ROUNDS
    assert any(each["small"].best_step for each in students)


@pytest.mark.soak
@pytest.mark.usefixtures("own_ray")  # the server that takes over starts another Ray
def test_reft_on_ray_with_the_server_killed(tmp_path):
    config = composed("reft", stop={"rounds": 4}, checkpoint={"share": None})
    expected = fedbonsai.run(config)
    list(expected)
    summary, notices = on_ray(config, out=tmp_path / "run", kills_in=2)
    assert notices[-1].startswith("the run goes on after version ")
    same = ("model_hash", "up_by_kind", "down_by_kind", "virtual_s", "outcomes")
    assert {key: summary[key] for key in same} == {key: expected.summary[key] for key in same}
