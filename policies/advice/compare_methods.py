"""The cost of a round of each method on a fleet, estimated before anything is trained.

By the byte counts of Wu et al. (EcoFed, IEEE TPDS 2024, arXiv 2304.05495) EcoFed sends less than FedAvg iff
E n A b/8 / period < 8 |W| (epochs, samples, activations a sample, bits of a code, parameters): a tiny model with many samples
is cheaper to train as a whole. Here both sides are the estimates that the virtual clock charges by.

A round takes as long as its slowest device with idle links, and at least as long as each shared resource (links, hosts)
needs for all devices together.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from ...clusters.fleet import Fleet
from ..checks.statements import statements_of
from ..decision import Decision
from ..estimate import Estimate
from ..plan import Plan
from ..policy import Policy
from ..selection.candidates import memory_misfit
from ..view import View

SIZES_PER_CLASS = 16  # where a class has more numbers of samples, one device represents several of them


class MethodCost(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of one method; means over the rounds of a run.

    ``cuts``: number of devices by the block behind which they are cut, "" for models that are not cut. ``widths``: of a method
    that sets the width of parts and does not cut, (width, number of devices), the narrowest first; () for other methods.
    ``sparsities``: of a method that sets how sparsely layers are trained, (sparsity of weights, number of devices), the lowest
    first; () for other methods.
    ``seconds``: of a round; ``bound``: the resource that limits a round with uploads. ``num_bytes``: up and down, mean over the
    devices. ``peak_memory_bytes``: the maximum over the devices. ``unable``: (reason, number of devices) of devices that cannot
    take part; they are left out of all other figures. ``seconds`` None: no device can take part. ``guessed``: activations are
    coded, so that bytes and seconds are a first guess. ``one_stage``: the figures are those of one stage of several, so that
    they say what a device must afford, and not what training costs.
    """

    method: str
    cuts: dict[str, int]
    widths: tuple[tuple[float, int], ...] = ()
    sparsities: tuple[tuple[float, int], ...] = ()
    seconds: float | None
    bound: str
    num_bytes: float
    peak_memory_bytes: int
    unable: tuple[tuple[str, int], ...] = ()
    guessed: bool = False
    one_stage: bool = False


Note = Callable[[str], object]  # receives a line of progress


def no_note(text: str) -> None:
    """A ``Note`` that drops its line."""


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What all methods are compared under.

    ``represented``: the devices that are estimated, each with the number of devices that it represents. ``share``: of the
    devices in a round.
    """

    view: View
    fleet: Fleet
    represented: Mapping[int, int]
    share: float
    rounds: int
    refusal: Callable[[Plan], str]
    note: Note


@dataclasses.dataclass(frozen=True)
class _Load:
    """The cost of one plan, of which there are ``count`` in a round."""

    plan: Plan
    cost: Estimate
    count: float
    weights: tuple[int, int]  # bytes up and down over the server's link; the others are streamed over a host's


def compare_methods(
    view: View,
    fleet: Fleet,
    methods: Mapping[str, Policy],
    *,
    rounds: int,
    cohort: int | None = None,
    refusal: Callable[[Plan], str] = lambda plan: "",
    faults: Mapping[str, str] = MappingProxyType({}),
    note: Note = no_note,
) -> list[MethodCost]:
    """A row for each of the ``methods``: policies that change plans, called with the view before the first round.

    ``rounds``: of the run, over which a row is the mean. ``cohort``: number of devices in a round (None: all); ``seconds``
    is bounded by the slowest device of the fleet even so. ``refusal``: why a plan would be refused, "" where it would not.
    ``faults``: by method, why the model does not allow it; such a method is not estimated. ``note``: receives a line for each
    device that is estimated, which may take seconds. Devices without samples are ignored.
    """
    start = dataclasses.replace(view, version=0, dispatched=0, in_flight={}, replay=())
    counts = representatives(start)
    share = 1.0 if cohort is None else min(1.0, cohort / max(1, sum(counts.values())))
    setting = _Setting(start, fleet, counts, share, max(1, rounds), refusal, note)
    rows = []
    for name, method in methods.items():
        fault = faults.get(name, "")
        try:
            rows.append(_impossible(name, fault, setting) if fault else _row(name, method, setting))
        except ValueError as error:  # this model has no head for a local loss, or cannot be cut there
            rows.append(_impossible(name, str(error), setting))
    return rows


def _impossible(name: str, fault: str, setting: _Setting) -> MethodCost:
    """The row of a method that the model does not allow."""
    unable = ((f"any: {fault}", sum(setting.represented.values())),)
    return MethodCost(method=name, cuts={}, seconds=None, bound="", num_bytes=0.0, peak_memory_bytes=0, unable=unable)


def representatives(view: View) -> dict[int, int]:
    """Devices that represent all: each with the number of devices of its class with about as many samples."""
    classes: dict[int, list[int]] = {}
    for device in view.devices:
        if view.samples[device]:
            classes.setdefault(id(view.profiles[device]), []).append(device)
    counts: Counter[int] = Counter()
    for devices in classes.values():
        first: dict[int, int] = {}
        for device in devices:
            first.setdefault(view.samples[device], device)
        *sizes, largest = sorted(first)
        length = max(1, -(-len(sizes) // (SIZES_PER_CLASS - 1)))
        chunks = [sizes[start : start + length] for start in range(0, len(sizes), length)]
        middle = {size: chunk[len(chunk) // 2] for chunk in [*chunks, [largest]] for size in chunk}
        for device in devices:
            counts[first[middle[view.samples[device]]]] += 1
    return dict(sorted(counts.items()))


def _row(name: str, method: Policy, setting: _Setting) -> MethodCost:
    """The row of one method."""
    uploads, unable = _uploads(name, method, setting)
    cuts: Counter[str] = Counter()
    widths: Counter[float] = Counter()
    sparsities: Counter[float] = Counter()
    written = statements_of(method).written
    for upload in uploads:
        cuts[upload.plan.split.cut if upload.plan.split else ""] += int(upload.count)
        if {"part", "part.width"} & set(written) and "split" not in written:
            widths[upload.plan.part.width] += int(upload.count)
        if "training.sparsity" in written and (sparsity := upload.plan.training.sparsity) is not None:
            sparsities[sparsity.weights] += int(upload.count)
    seconds, bound, often = _mean(method, setting, uploads)
    able = sum(cuts.values())
    total = sum(load.count * (load.cost.up_bytes + load.cost.down_bytes) for load in uploads)
    return MethodCost(
        method=name,
        cuts=dict(cuts),
        widths=tuple(sorted(widths.items())),
        sparsities=tuple(sorted(sparsities.items())),
        seconds=seconds if able else None,
        bound=bound,
        num_bytes=often * total / able if able else 0.0,
        peak_memory_bytes=max((load.cost.peak_memory_bytes for load in uploads), default=0),
        unable=tuple(sorted(unable.items())),
        guessed=any(load.plan.split is not None and bool(load.plan.split.codec_up) for load in uploads),
        one_stage="path" in written,
    )


def _uploads(name: str, method: Policy, setting: _Setting) -> tuple[list[_Load], Counter[str]]:
    """Costs of the devices that can take part, in a round in which they upload; and the number of the others by reason."""
    view = setting.view
    unable: Counter[str] = Counter()
    plans: list[Plan] = []
    for number, device in enumerate(setting.represented, start=1):
        setting.note(f"{name}: device class {view.profiles[device].name} ({number}/{len(setting.represented)})")
        # Each in a decision of its own: of plans that share a head, only one would be sent at a time.
        decision, _ = method.decide(view, method.init(), Decision(plans=(view.new_plan(device),)))
        plans += decision.plans
        for left, reason in decision.left_out:
            unable[f"{view.profiles[left].name}: {reason}"] += setting.represented[left]
    uploads: list[_Load] = []
    for plan in plans:
        device = plan.device
        cost = view.estimate(device, plan)
        reason = setting.refusal(plan) or memory_misfit(view, device, cost.peak_memory_bytes)
        if reason:
            unable[f"{view.profiles[device].name}: {reason}"] += setting.represented[device]
        else:
            uploads.append(_Load(plan, cost, setting.represented[device], _weights(view, plan, cost)))
    return uploads, unable


def _mean(method: Policy, setting: _Setting, uploads: Sequence[_Load]) -> tuple[float, str, float]:
    """Mean seconds of a round, the bound of one in which all upload, and the share of rounds in which a device uploads."""
    view, fleet, share = setting.view, setting.fleet, setting.share
    seconds, bound = _round(view, fleet, uploads, share)
    upload_period = statements_of(method).upload_period
    if upload_period is None or not uploads or not all(load.plan.uploads_view for load in uploads):
        return seconds, bound, 1.0
    able = int(sum(load.count for load in uploads))
    period = upload_period(devices=able, cohort=max(1, round(share * able)), rounds=setting.rounds)
    replays = [_replayed(view, load) for load in uploads]
    mixed = [dataclasses.replace(load, count=load.count * period.part) for load in uploads]
    mixed += [dataclasses.replace(load, count=load.count * (1 - period.part)) for load in replays]
    total = period.full * seconds
    total += period.some * _round(view, fleet, mixed, share)[0] if period.some else 0.0
    total += (setting.rounds - period.full - period.some) * _round(view, fleet, replays, share)[0]
    return total / setting.rounds, bound, (period.full + period.some * period.part) / setting.rounds


def _replayed(view: View, upload: _Load) -> _Load:
    """The cost of the same device in a round in which its view is replayed."""
    assert upload.plan.split is not None
    plan = replace(upload.plan, split=replace(upload.plan.split, view="1"))
    return _Load(plan, view.estimate(plan.device, plan), upload.count, (0, 0))


def _weights(view: View, plan: Plan, cost: Estimate) -> tuple[int, int]:
    """Bytes up and down between device and server: those of the plan without its stream to the host."""
    if plan.split is None:
        return cost.up_bytes, cost.down_bytes
    if not plan.trains_on_device:
        return 0, 0
    alone = view.estimate(plan.device, replace(plan, split=None))
    return alone.up_bytes, alone.down_bytes


def _round(view: View, fleet: Fleet, loads: Sequence[_Load], share: float) -> tuple[float, str]:
    """Seconds of a round, and the resource that limits it."""
    slowest = max(loads, key=lambda load: load.cost.seconds, default=None)
    if slowest is None:
        return 0.0, ""
    bounds = [(slowest.cost.seconds, f"device class {view.profiles[slowest.plan.device].name}")]
    hosts = sum(load.count * load.cost.host_flops for load in loads)
    bounds.append((share * hosts / (fleet.hosts.flop_per_s * fleet.hosts.count), "hosts"))
    turns = sum(load.count * load.cost.seconds for load in loads if load.plan.split and load.plan.split.shares_head)
    bounds.append((share * turns / fleet.hosts.count, "turns at hosts"))
    bounds += [(share * num_bytes / rate, name) for num_bytes, rate, name in _crossings(view, fleet, loads)]
    return max(bounds, key=lambda bound: bound[0])


def _crossings(view: View, fleet: Fleet, loads: Sequence[_Load]) -> Iterator[tuple[float, float, str]]:
    """Bytes, rate and name of each shared link, for each direction; the links of all hosts count as one."""
    for index, direction in enumerate(("up", "down")):
        field = f"{direction}_bytes_per_s"
        shared: dict[str, float] = {}
        weights = streamed = 0.0
        for load in loads:
            num_bytes = load.cost.down_bytes if index else load.cost.up_bytes
            weights += load.count * load.weights[index]
            streamed += load.count * (num_bytes - load.weights[index])
            if link := view.profiles[load.plan.device].shared_link:
                shared[link] = shared.get(link, 0.0) + load.count * num_bytes
        for link, carried in shared.items():
            yield carried, getattr(fleet.shared_links[link], field), f"link {link}"
        if rate := getattr(fleet.server, field):
            yield weights, rate, "the server's link"
        if rate := getattr(fleet.hosts, field):
            yield streamed, rate * fleet.hosts.count, "hosts' links"
