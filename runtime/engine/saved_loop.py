"""Checks whether the saved state of a loop is consistent, in itself and with its experiment, beyond the types of its parts.

``saved`` holds the state of the loop, the server, the clock and their parts, by the names in their ``SAVED``. Its types were
checked before.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec.structs import replace
from torch import Tensor

from ...actors.messages.places import Places
from ...actors.replay.replay_index import IndexedView
from ...actors.replay.upload import ViewKey, view_key
from ...actors.support import PlanRefused, check_plan
from ...clusters.profile import DeviceProfile
from ...comms.codec import Array, Arrays
from ...comms.errors import OutOfSync
from ...comms.links.memory import LinkMemory, ModelName
from ...comms.links.state import named_models
from ...learning.parts.channels import check_map, map_hash
from ...learning.store import same_shape_and_type
from ...learning.workload import Workload
from ...policies.checks.answer import BadAnswer, check_state
from ...policies.plan import Plan
from ..simulation.in_flight import InFlightPlan
from ..simulation.streams import StreamProgress

Saved = Mapping[str, Any]
_RESULT_KNOWN = ("stream", "up", "gone")  # stages that a plan enters once its result is known


def state_problem(
    saved: Saved, *, model: Mapping[str, Tensor], workload: Workload, profiles: Sequence[DeviceProfile], hosts: int
) -> str:
    """The first problem, in words; "" if there is none. ``model``: the tensors of this experiment's model."""
    try:
        check_state(saved["_policy_state"], who="the policy")
    except BadAnswer as error:
        return str(error)
    server = saved["_server"]
    checks = (
        _store(server["store"], model, workload),
        _auxiliaries(server, workload),
        _fold(server),
        _links(
            server["links"], server["_residual"]["_starts"], _models(server["store"]["auxiliaries"], model, workload)
        ),
        _places(server["links"], workload),
        _plans(saved, workload, profiles, hosts),
        _maps(server["maps"], saved["_in_flight"], workload),
        _replay(saved["_lifecycle"]["replay"], workload, profiles, hosts),
        _clock(saved["_clock"], saved["_in_flight"]),
    )
    return next((problem for check in checks for problem in check), "")


def _store(store: Mapping[str, Mapping[str, Tensor]], model: Mapping[str, Tensor], workload: Workload) -> Iterator[str]:
    """The models must have the tensors that they were built with, and all other sections must have their shapes."""
    expected = {
        f"{family}:{name}": tensor for family, state in _families(workload).items() for name, tensor in state.items()
    }
    families = store["families"]
    if list(families) != list(expected) or not all(same_shape_and_type(families[n], expected[n]) for n in expected):
        yield "the families of models are not those of this experiment"
    if list(store["model"]) != list(model):
        yield f"the model's tensors are {', '.join(store['model'])[:200]}; they must be {', '.join(model)[:200]}"
    # (Auxiliaries, which a lossy downlink may leave pending too, are those of the models: ``_auxiliaries``.)
    for section, known_here in (("model", model), ("pending", {**store["auxiliaries"], **model})):
        for name, tensor in store[section].items():
            known = expected.get(name, known_here.get(name))
            if known is None or not same_shape_and_type(tensor, known):
                yield f"{section} has a tensor {name[:80]!r}, which the model lacks or has in another shape or type"
    tensors = {**store["model"], **store["auxiliaries"], **families}
    for slot, tensor in store["optimiser"].items():
        kind, _, name = slot.partition("/")
        if kind not in ("m", "v") or name not in tensors or not same_shape_and_type(tensor, tensors[name]):
            yield f"the optimiser's slot {slot[:80]!r} belongs to no tensor of the store, or has another shape or type"


def _auxiliaries(server: Saved, workload: Workload) -> Iterator[str]:
    """Auxiliary networks must be those that the models define."""
    store = server["store"]
    if set(server["_roles"]) != {*store["model"], *store["auxiliaries"], *store["families"]}:
        yield "the tensors with a role are not those of the store"
    for name, tensor in store["auxiliaries"].items():
        family = next((each for each in workload.families[1:] if name.startswith(f"{each}:")), "")
        own = name.removeprefix(f"{family}:") if family else name
        try:
            specs = {t.name: t for t in workload.family(family).spec.auxiliary(own.rpartition(".")[0]).tensors}
        except ValueError as error:
            yield str(error)
            return
        if own not in specs or tuple(tensor.shape) != specs[own].shape:
            yield f"the auxiliary {name[:80]!r} is not one of this model, or has another shape"


def _fold(server: Saved) -> Iterator[str]:
    """Partial sums must be of tensors in the store."""
    store = server["store"]
    held: dict[str, Tensor] = {**store["model"], **store["auxiliaries"], **store["families"]}
    fold, turns = server["_fold"], server["_shared_heads"]["_added"].values()
    sums = [*fold["_sums"].items(), *((name, total) for added in turns for name, (total, _) in added.items())]
    for name, total in sums:
        if name not in held or total.shape != held[name].shape:
            yield f"an update of {name[:80]!r} was folded, which is not in the store or has another shape"
    if set(fold["_sums"]) != set(fold["_weights"]):
        yield "the sums of the fold and their weights are not of the same tensors"


def _models(
    auxiliaries: Mapping[str, Tensor], model: Mapping[str, Tensor], workload: Workload
) -> list[Mapping[str, Tensor]]:
    """The tensors that parts may have, by the names that parts use: those of each model, and of its auxiliaries."""
    families = _families(workload)
    own = [{name.removeprefix(f"{family}:"): tensor for name, tensor in auxiliaries.items()} for family in families]
    return [model, auxiliaries, *families.values(), *own]


def _families(workload: Workload) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of each family's model, as it is built, without the global model."""
    return {name: workload.family(name).blocks.model.state_dict() for name in workload.families[1:]}


def _links(
    links: Saved, starts: Mapping[Any, tuple[int, Arrays]], models_of_run: Sequence[Mapping[str, Tensor]]
) -> Iterator[str]:
    """The memory of links must hold tensors of the model, and the records of links must agree."""
    downlinks, peers = links["downlinks"], links["peers"]
    entries = peers["_entries"]
    memories = [peer.memory for peer in entries.values()]
    memories += [peer.moved.memory for peer in entries.values() if peer.moved is not None]
    models = [*links["_sent"].values(), *(broadcast["held"] for broadcast in downlinks["broadcasts"].values())]
    models += [model for memory in memories for model in memory.models]
    held: list[Arrays] = [each.arrays for each in models] + [arrays for _, arrays in starts.values()]
    held += [arrays for memory in memories for sent in memory.sent for arrays in (sent.base, sent.local)]
    for arrays in held:
        for name, array in arrays.items():
            if not any(name in model and _fits(array, model[name]) for model in models_of_run):
                yield (
                    f"a link's memory holds an array {name[:80]!r} of shape {array.shape} and type {array.dtype}; "
                    "the model has no such tensor"
                )
    if not {*downlinks["_last_plans"], *filter(None, [downlinks["_most_used"]])} <= set(downlinks["broadcasts"]):
        yield "a broadcast that is in use is not among the saved ones"
    devices, files = set(entries), set(peers["_files"])
    if set(peers["_sizes"]) != devices or set(peers["paths"]) != files or not files | set(peers["held"]) <= devices:
        yield "the sizes, files and versions of links are not of the same devices"
    if not set(peers["_evictable"]) <= devices - files:
        yield "the memory of a link is both in memory and on disk"
    yield from _shared_models(peers)
    totals = sum(peers["_sizes"].values()), sum(peers["_files"].values())
    if totals != (peers["_total"], peers["_files_total"]):
        yield "the sizes of the links' memories do not add up to their totals"


def _shared_models(peers: Saved) -> Iterator[str]:
    """The models that states of devices name must be there, where a device holds them, and be counted."""
    shared, named, files = peers["shared"], peers["_named"], peers["_files"]
    for device, peer in peers["_entries"].items():
        try:
            if device not in files and named_models(peer.state) != named.get(device, ()):
                yield f"the models of device {device}'s link are not those that its state names"
        except OutOfSync as error:
            yield str(error)
    held, in_memory = Counter[ModelName](), Counter[ModelName]()
    for device, names in named.items():
        held.update(names)
        in_memory.update({name: int(device not in files) for name in names})
    if shared["_holders"] != held or shared["_in_memory"] != in_memory:
        yield "the models that links share are not counted as often as devices hold them"
    if set(shared["_messages"]) != set(+in_memory) or set(shared["paths"]) != set(shared["_files"]):
        yield "the models that links share are not those that devices hold"
    if not set(held) <= {*shared["_messages"], *shared["_files"]}:
        yield "a link names a model that is not saved"
    totals = sum(message.num_bytes for message in shared["_messages"].values()), sum(shared["_files"].values())
    if totals != (shared["memory_bytes"], shared["disk_bytes"]):
        yield "the sizes of the models that links share do not add up to their totals"


def _places(links: Saved, workload: Workload) -> Iterator[str]:
    """The memory of each link must be of channels that the model has, and in their number."""
    places, entries = Places(workload), links["peers"]["_entries"].values()
    found = [
        (broadcast["place"], [broadcast["held"].arrays]) for broadcast in links["downlinks"]["broadcasts"].values()
    ]
    found += [(peer.place, _arrays(peer.memory)) for peer in entries]
    found += [(peer.moved.place, _arrays(peer.moved.memory)) for peer in entries if peer.moved is not None]
    for place, held in found:
        for arrays in held or [{}]:
            if problem := places.problem(place, {name: array.shape for name, array in arrays.items()}):
                yield problem
    parts = [peer.part for peer in entries if peer.part is not None]
    parts += [peer.moved.part for peer in entries if peer.moved is not None]
    if unknown := {part.model for part in parts} - set(workload.families):
        yield f"a link is of the family {min(unknown)[:80]!r}, which this experiment does not have"


def _arrays(memory: LinkMemory) -> list[Arrays]:
    """All models of a link's memory."""
    sent = [arrays for each in memory.sent for arrays in (each.base, each.local)]
    return [*(model.arrays for model in memory.models), *sent]


def _fits(array: Array, tensor: Tensor) -> bool:
    """Whether an array can be a tensor of the model, or a narrowed one."""
    narrower = array.ndim == tensor.dim() and all(a <= b for a, b in zip(array.shape, tensor.shape, strict=True))
    return narrower and str(array.dtype) == str(tensor.dtype).removeprefix("torch.")


def _plans(saved: Saved, workload: Workload, profiles: Sequence[DeviceProfile], hosts: int) -> Iterator[str]:
    """Plans in flight must be valid, and each must be the plan of a busy device."""
    in_flight: Mapping[int, Plan] = saved["_in_flight"]
    devices = {*saved["_busy"], *saved["_device_history"]["reports"], *saved["_device_history"]["participation"]}
    if not devices <= set(range(len(profiles))):
        yield f"it has records of devices {min(devices)} to {max(devices)}; the fleet's devices are 0 to {len(profiles) - 1}"
    if {plan.device: plan.id for plan in in_flight.values()} != {d: plan.id for d, plan in saved["_busy"].items()}:
        yield "the plans in flight are not the plans of the busy devices"
    for plan_id, plan in in_flight.items():
        if plan.id != plan_id or not 0 < plan_id < saved["_next_id"] or plan.version > saved["_server"]["version"]:
            yield (
                f"plan {plan.id} of version {plan.version} is in flight as plan {plan_id}, while the next plan is "
                f"{saved['_next_id']} and the version {saved['_server']['version']}"
            )
        elif plan.split is not None and plan.split.host not in range(hosts):
            yield f"plan {plan_id} is split with host {plan.split.host}; hosts are 0 to {hosts - 1}"
        else:
            yield from _refused(plan, workload, profiles)
    links = saved["_server"]["links"]
    with_memory = {plan.id for plan in in_flight.values() if plan.link_down is not None or plan.link_up is not None}
    known = {plan.id for plan in in_flight.values() if plan.device in links["peers"]["_entries"]}
    if not with_memory <= known & set(links["_sent"]):
        yield "a plan is in flight over a link with memory whose records lack it"
    if set(saved["_traffic"]["_down_packets"]) != set(in_flight):
        yield "the packets in flight are not those of the plans in flight"
    if any(sent.plan.id != plan_id or plan_id not in in_flight for plan_id, sent in saved["_sent"].items()):
        yield "a message was sent for a plan that is not in flight"


def _maps(maps: Saved, in_flight: Mapping[int, Plan], workload: Workload) -> Iterator[str]:
    """Index maps must have the names of their contents, and those of plans in flight must be there and fit their models."""
    held: Mapping[str, Array] = maps["_maps"]
    if set(maps["_messages"]) != set(held) or any(map_hash(kept) != name for name, kept in held.items()):
        yield "the index maps are not those that were sent"
    named = {plan.id: plan.part for plan in in_flight.values() if plan.part.index_map}
    if maps["_sent"] != {plan_id: part.index_map for plan_id, part in named.items()}:
        yield "the index maps in use are not those of the plans in flight"
    for plan_id, part in named.items():
        try:
            if part.index_map not in held:
                yield f"plan {plan_id} is in flight with the index map {part.index_map[:80]!r}, which is not saved"
            else:
                check_map(workload.family(part.model).groups, held[part.index_map])
        except ValueError as error:
            yield f"plan {plan_id} is in flight with an index map that does not fit: {error}"
    for (family, rule, _), scores in maps["_rankings"].items():
        if family not in workload.families or scores.shape != (workload.family(family).groups.channels,):
            yield f"a ranking of channels by {rule[:80]!r} is of no model of this experiment"


def _refused(plan: Plan, workload: Workload, profiles: Sequence[DeviceProfile]) -> Iterator[str]:
    """Why a plan cannot be carried out, if its device is in the fleet."""
    if plan.device in range(len(profiles)):
        # Without the fields that the runtime filled in when it sent the plan.
        decided = replace(
            plan,
            part=replace(plan.part, cached=(), frozen="", index_map=""),
            whole_steps=0,
            train_s=None,
            memory_bytes=None,
        )
        try:
            check_plan(decided, workload, profile=profiles[plan.device])
        except PlanRefused as error:
            yield str(error)


def _replay(replay: Saved, workload: Workload, profiles: Sequence[DeviceProfile], hosts: int) -> Iterator[str]:
    """Views must come from plans that a device of the fleet could have run, and the records of views must agree."""
    views: Mapping[ViewKey, IndexedView] = replay["_views"]
    placed = [*replay["memory"], *replay["disk"]]
    if len(placed) != len(views) or set(placed) != set(views):
        yield "the views in memory and on disk are not all views, each once"
    for key, view in (*views.items(), *replay["_in_use"].items()):
        plan = view.upload
        if plan.split is None or plan.split.host not in range(hosts) or plan.device not in range(len(profiles)):
            yield f"plan {plan.id} has uploaded a view, and the fleet lacks its host or its device"
        elif key != view_key(plan, str(plan.id)):
            yield f"{key} is not the key of the view that plan {plan.id} has uploaded"
        else:
            yield from _refused(plan, workload, profiles)
    if len(replay["_to_drop"]) != hosts:
        yield f"views are dropped at {len(replay['_to_drop'])} hosts; the fleet has {hosts}"


def _clock(clock: Saved | float, in_flight: Mapping[int, Plan]) -> Iterator[str]:
    """The virtual clock must simulate exactly the plans in flight. The wall clock saves only its time."""
    if not isinstance(clock, Mapping):
        return
    simulated: Mapping[int, InFlightPlan] = clock["plans_in_flight"]
    if set(simulated) != set(in_flight) or any(entry.plan.id != plan_id for plan_id, entry in simulated.items()):
        yield "the plans that the clock simulates are not those in flight"
    for plan_id, entry in simulated.items():
        split, finished = entry.plan.split is not None, entry.finished
        if (entry.work is not None) != split or (entry.stage == "stream" and not split):
            yield f"plan {plan_id} streams to a host without being split, or is split without work for one"
        if (entry.stage == "stream" and entry.load is None) or (entry.stage in _RESULT_KNOWN and finished is None):
            yield f"plan {plan_id} is at stage {entry.stage!r} without the load or the result that this stage needs"
        if entry.stage == "up" and finished is not None and finished.update is None:
            yield f"plan {plan_id} sends an update that it does not have"
    transfers = clock["_transfers"]
    named = {plan_id for _, plan_id in clock["_timers"]}
    named |= {*transfers["down"]["_transfers"], *transfers["up"]["_transfers"]}
    if not named <= set(simulated):
        yield "a timer or a transfer is of a plan that is not in flight"
    streams: Mapping[int, StreamProgress] = clock["_streams"]["_streams"]
    if set(streams) != {plan_id for plan_id, entry in simulated.items() if entry.stage == "stream"}:
        yield "the streams are not those of the plans that stream"
    named = {event[1] for event in clock["_streams"]["_events"]}
    for host in clock["_streams"]["_hosts"].values():
        named |= {queued[0] for queued in host.queue} | ({host.busy} if host.busy is not None else set())
    if not named <= set(streams):
        yield "an event or a host is of a stream that does not exist"
