"""What a round of each method costs a fleet, before anything is trained: which one is cheaper for the job at hand.

By the byte counts of Wu et al. (EcoFed, IEEE TPDS 2024, arXiv 2304.05495) EcoFed sends less than FedAvg iff
E n A b/8 / period < 8 |W| (epochs, samples, activations a sample, bits of a code, parameters): a tiny model with many samples
is trained cheaper as a whole. Here both sides are the estimates that the virtual clock charges by.

A round is as long as the slowest device needs alone, and no shorter than what is shared needs for all of them together.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from ...clusters.fleet import Fleet
from ..decision import Decision
from ..partitioning.ecofed import EcoFed
from ..partitioning.upload_period import rhythm
from ..plan import Plan
from ..policy import Policy
from ..report import Estimate
from ..selection.candidates import memory_misfit
from ..view import View

KINDS_PER_CLASS = 16  # where a class has more sample counts, one device stands for several of them


class MethodCost(msgspec.Struct, frozen=True, kw_only=True):
    """One method's row; means over the rounds of a run.

    ``cuts``: devices by the block behind which they are cut, "" for whole models. ``seconds``: of a round; ``bound``: what
    one with uploads waits for. ``num_bytes``: up and down, mean over the devices. ``peak_memory_bytes``: the most.
    ``unable``: (reason, devices) of those that cannot take part, and count for nothing else; ``seconds`` None: nobody can.
    ``guessed``: activations are coded, so that bytes and seconds are those of a first guess.
    """

    method: str
    cuts: dict[str, int]
    seconds: float | None
    bound: str
    num_bytes: float
    peak_memory_bytes: int
    unable: tuple[tuple[str, int], ...] = ()
    guessed: bool = False


Note = Callable[[str], object]  # gets a line of progress


def unheard(text: str) -> None:
    """A ``Note`` that is dropped."""


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What all methods are asked: devices that stand for all, share of them in a round, rounds, why a plan would be
    refused; who hears of each device that is asked.
    """

    view: View
    fleet: Fleet
    kinds: Mapping[int, int]
    share: float
    rounds: int
    refusal: Callable[[Plan], str]
    note: Note


@dataclasses.dataclass(frozen=True)
class _Share:
    """What one device, and ``count`` like it, cost in the rounds of one kind."""

    plan: Plan
    cost: Estimate
    count: float
    weights: tuple[int, int]  # bytes up and down that are the server's and not a host's


def compare_methods(
    view: View,
    fleet: Fleet,
    methods: Mapping[str, Policy],
    *,
    rounds: int,
    cohort: int | None = None,
    refusal: Callable[[Plan], str] = lambda plan: "",
    note: Note = unheard,
) -> list[MethodCost]:
    """A row for each of the ``methods``: policies that change plans, asked as before the first round.

    ``rounds``: of the run, of which a row is the mean. ``cohort``: devices of a round, of all that there are (None: all); the
    slowest of all counts even so. ``refusal``: why a plan would not be carried out, "" where it would. ``note``: gets a
    line for each device that is asked, which may take seconds. Devices without samples take part in nothing.
    """
    start = dataclasses.replace(view, version=0, dispatched=0, in_flight={}, replay=())
    counts = kinds(start)
    share = 1.0 if cohort is None else min(1.0, cohort / max(1, sum(counts.values())))
    asked = _Asked(start, fleet, counts, share, max(1, rounds), refusal, note)
    rows = []
    for name, method in methods.items():
        try:
            rows.append(_row(name, method, asked))
        except ValueError as error:  # this model has no head for a local loss, or cannot be cut there
            unable = ((f"any: {error}", sum(counts.values())),)
            rows.append(
                MethodCost(
                    method=name, cuts={}, seconds=None, bound="", num_bytes=0.0, peak_memory_bytes=0, unable=unable
                )
            )
    return rows


def kinds(view: View) -> dict[int, int]:
    """Devices that stand for all: each with the number of those of its class with about as many samples."""
    classes: dict[int, list[int]] = {}
    for device in view.devices:
        if view.samples[device]:
            classes.setdefault(id(view.profiles[device]), []).append(device)
    found: Counter[int] = Counter()
    for devices in classes.values():
        first: dict[int, int] = {}
        for device in devices:
            first.setdefault(view.samples[device], device)
        *sizes, largest = sorted(first)
        each = max(1, -(-len(sizes) // (KINDS_PER_CLASS - 1)))
        chunks = [sizes[start : start + each] for start in range(0, len(sizes), each)]
        stands_for = {size: chunk[len(chunk) // 2] for chunk in [*chunks, [largest]] for size in chunk}
        for device in devices:
            found[first[stands_for[view.samples[device]]]] += 1
    return dict(sorted(found.items()))


def _row(name: str, method: Policy, asked: _Asked) -> MethodCost:
    """One method."""
    uploads, unable = _uploads(name, method, asked)
    cuts: Counter[str] = Counter()
    for each in uploads:
        cuts[each.plan.split.cut if each.plan.split else ""] += int(each.count)
    seconds, bound, often = _mean(method, asked, uploads)
    able = sum(cuts.values())
    total = sum(each.count * (each.cost.up_bytes + each.cost.down_bytes) for each in uploads)
    return MethodCost(
        method=name,
        cuts=dict(cuts),
        seconds=seconds if able else None,
        bound=bound,
        num_bytes=often * total / able if able else 0.0,
        peak_memory_bytes=max((each.cost.peak_memory_bytes for each in uploads), default=0),
        unable=tuple(sorted(unable.items())),
        guessed=any(each.plan.split is not None and bool(each.plan.split.codec_up) for each in uploads),
    )


def _uploads(name: str, method: Policy, asked: _Asked) -> tuple[list[_Share], Counter[str]]:
    """What those who can take part cost in a round in which they send; of the others, how many for which reason."""
    view = asked.view
    unable: Counter[str] = Counter()
    plans: list[Plan] = []
    for number, device in enumerate(asked.kinds, start=1):
        asked.note(f"{name}: device class {view.profiles[device].name} ({number}/{len(asked.kinds)})")
        # Each for itself: of those that share a head, only one would be sent now.
        decision, _ = method.decide(view, method.init(), Decision(plans=(view.new_plan(device),)))
        plans += decision.plans
        for left, reason in decision.left_out:
            unable[f"{view.profiles[left].name}: {reason}"] += asked.kinds[left]
    uploads: list[_Share] = []
    for plan in plans:
        device = plan.device
        cost = view.estimate(device, plan)
        reason = asked.refusal(plan) or memory_misfit(view, device, cost.peak_memory_bytes)
        if reason:
            unable[f"{view.profiles[device].name}: {reason}"] += asked.kinds[device]
        else:
            uploads.append(_Share(plan, cost, asked.kinds[device], _weights(view, plan, cost)))
    return uploads, unable


def _mean(method: Policy, asked: _Asked, uploads: Sequence[_Share]) -> tuple[float, str, float]:
    """Seconds of a round, what one waits for in which all send, and how often a device of the cohort sends."""
    view, fleet, share = asked.view, asked.fleet, asked.share
    seconds, bound = _round(view, fleet, uploads, share)
    if not isinstance(method, EcoFed) or not uploads:
        return seconds, bound, 1.0
    able = int(sum(each.count for each in uploads))
    found = rhythm(method, devices=able, cohort=max(1, round(share * able)), rounds=asked.rounds)
    replays = [_replayed(view, each) for each in uploads]
    mixed = [dataclasses.replace(each, count=each.count * found.part) for each in uploads]
    mixed += [dataclasses.replace(each, count=each.count * (1 - found.part)) for each in replays]
    total = found.full * seconds
    total += found.some * _round(view, fleet, mixed, share)[0] if found.some else 0.0
    total += (asked.rounds - found.full - found.some) * _round(view, fleet, replays, share)[0]
    return total / asked.rounds, bound, (found.full + found.some * found.part) / asked.rounds


def _replayed(view: View, upload: _Share) -> _Share:
    """The same device in a round in which its view is replayed."""
    assert upload.plan.split is not None
    plan = replace(upload.plan, split=replace(upload.plan.split, view="1"))
    return _Share(plan, view.estimate(plan.device, plan), upload.count, (0, 0))


def _weights(view: View, plan: Plan, cost: Estimate) -> tuple[int, int]:
    """Bytes up and down that go between device and server: what the plan would send if nothing crossed its cut."""
    if plan.split is None:
        return cost.up_bytes, cost.down_bytes
    if not plan.trains_on_device:
        return 0, 0
    alone = view.estimate(plan.device, replace(plan, split=None))
    return alone.up_bytes, alone.down_bytes


def _round(view: View, fleet: Fleet, shares: Sequence[_Share], share: float) -> tuple[float, str]:
    """Seconds of a round, and what it waits for."""
    slowest = max(shares, key=lambda each: each.cost.seconds, default=None)
    if slowest is None:
        return 0.0, ""
    bounds = [(slowest.cost.seconds, f"device class {view.profiles[slowest.plan.device].name}")]
    hosts = sum(each.count * each.cost.host_flops for each in shares)
    bounds.append((share * hosts / (fleet.hosts.flop_per_s * fleet.hosts.count), "hosts"))
    turns = sum(each.count * each.cost.seconds for each in shares if each.plan.split and each.plan.split.shares_head)
    bounds.append((share * turns / fleet.hosts.count, "turns at hosts"))
    bounds += [(share * num_bytes / rate, name) for num_bytes, rate, name in _crossings(view, fleet, shares)]
    return max(bounds, key=lambda bound: bound[0])


def _crossings(view: View, fleet: Fleet, shares: Sequence[_Share]) -> Iterator[tuple[float, float, str]]:
    """Bytes, rate and name of each link that devices share, one direction after the other; hosts' links together."""
    for index, direction in enumerate(("up", "down")):
        field = f"{direction}_bytes_per_s"
        shared: dict[str, float] = {}
        weights = streamed = 0.0
        for each in shares:
            num_bytes = each.cost.down_bytes if index else each.cost.up_bytes
            weights += each.count * each.weights[index]
            streamed += each.count * (num_bytes - each.weights[index])
            if link := view.profiles[each.plan.device].shared_link:
                shared[link] = shared.get(link, 0.0) + each.count * num_bytes
        for link, carried in shared.items():
            yield carried, getattr(fleet.shared_links[link], field), f"link {link}"
        if rate := getattr(fleet.server, field):
            yield weights, rate, "the server's link"
        if rate := getattr(fleet.hosts, field):
            yield streamed, rate * fleet.hosts.count, "hosts' links"
