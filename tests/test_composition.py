"""All pairs of methods: each is carried out, in process and on Ray to the same bits, or refused when the run is made.

A method is a few policies with their settings, and a sign by which a run shows that the method has acted in it. Rows that are
carried out run in process, each alone. A run on Ray takes seconds, so that there several rows share one: the methods of
``TOGETHER`` are in one chain, and every pair of them is a row. ``make soak`` runs each row on Ray by itself too.
"""

from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

import fedbonsai
import pytest
from fedbonsai.learning.store import model_hash
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import PlanEnded, TaskEnded, VersionClosed

ROUNDS = 3
LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**6, "down_bytes_per_s": 10**6, "latency_s": 0.01}
SPEEDS = (1e8, 6e7, 3e7, 1e7)  # FLOP/s: under ``linear`` each device has another width
SMALL = {"name": "small", "kwargs": {"in_channels": 1, "image_size": 8}}
# Between the server and the actor of its task, or the hosts: in the ledger, and in no report.
WITHIN = ("control", "host", "public", "teacher", "student", "logits")


def fleet(*models, **changes):
    """Four devices, from fast to slow, of these families of models ("": the global one), and two hosts."""
    models = models or ("", "", "", "")
    classes = [
        {"name": f"c{i}", "flop_per_s": speed, "model": model} | LINK | changes
        for i, (speed, model) in enumerate(zip(SPEEDS, models, strict=True))
    ]
    return {"classes": classes, "hosts": {"count": 2, "flop_per_s": 1e8}}


BASE = {
    "backend": "inline",
    "seed": 5,
    "fleet": fleet(),
    "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 1.0}, "public_share": 0.5},
    "training": {"batch_size": 8, "steps": 3},
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
    "steps": 4,
    "batch_size": 32,
    "check_every": 2,
    "learning_rate": 0.001,
    "held_out": 0.2,
}
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
        lambda events: any(plan.whole_steps or not plan.trains_on_device for plan in plans(events)),
        ({"name": "closing", "after_s": 0.7, "partial": True},),
    ),
    "families": Method(
        6,
        lambda events: {"", "small"} == {plan.part.model for plan in plans(events)},
        settings={"models": {"small": SMALL}, "fleet": fleet("", "small", "", "small")},
    ),
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
    return f"policy[1] ({first}) cuts the model before policy[2] ({second}), which cuts it too; allowed: one policy that cuts the model"


def no_width(cut, why, *, behind=1):
    return f"policy[2] (width) narrows the model behind policy[{behind}] ({cut}), {why}"


def no_memory(cut):
    return (
        f"policy[1] ({cut}) cuts the model before policy[2] (residuals), which gives links a memory, and those of a cut model "
        "cannot have one yet; allowed: one of the two"
    )


TWO_WIDTHS = (
    "policy[{}] (width) narrows the model behind policy[1] (width), which sets the widths of the parts that it is given; "
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
    ("heterofl", "fedrolex"): TWO_WIDTHS.format(2),
    ("heterofl", "reft"): TWO_WIDTHS.format(2),
    ("fedrolex", "reft"): TWO_WIDTHS.format(2),
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
        (cut, "residuals"): no_memory(name) for cut, name in zip(CUTS, ("splitfed", "splitfed", "local_loss", "ecofed"))
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
}
PAIRS = tuple(combinations(METHODS, 2))
CARRIED_OUT = tuple(pair for pair in PAIRS if pair not in REFUSED)
# Every row that is carried out is a pair of one of these.
TOGETHER = (
    ("fedbuff", "reft", "residuals", "partial work", "families"),
    ("fedasync", "heterofl", "distillation", "residuals", "partial work", "families"),
    ("fedasync", "fedrolex", "distillation", "residuals", "families"),
    ("fedbuff", "splitfed", "heterofl", "distillation", "partial work", "families"),
    ("fedbuff", "splitfed", "fedrolex", "partial work"),
    ("fedasync", "splitfed", "reft", "families"),
    ("fedbuff", "shared head", "distillation", "families"),
    ("fedbuff", "local loss", "distillation", "partial work", "families"),
    ("fedbuff", "ecofed", "partial work"),
    *(("fedasync", cut) for cut in CUTS[1:]),
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
    assert set(CARRIED_OUT) == {pair for names in TOGETHER for pair in combinations(names, 2)}


@pytest.mark.parametrize("pair", CARRIED_OUT, ids=" + ".join)
def test_two_methods_together(pair):
    in_process(pair)


@pytest.mark.parametrize("pair", REFUSED, ids=" + ".join)
def test_two_methods_are_refused_when_the_run_is_made(pair):
    with pytest.raises(ConfigError) as caught:
        fedbonsai.run(composed(*pair))
    assert str(caught.value) == REFUSED[pair]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("names", TOGETHER, ids=" + ".join)
def test_on_ray_methods_come_to_the_bits_of_this_process(names):
    assert carried_out(names, backend="ray", workers=2) == in_process(names)


@pytest.mark.soak
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("pair", CARRIED_OUT, ids=" + ".join)
def test_on_ray_two_methods_come_to_the_bits_of_this_process(pair):
    assert carried_out(pair, backend="ray", workers=2) == in_process(pair)
