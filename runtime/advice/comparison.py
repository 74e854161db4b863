"""Compares methods for one experiment, with its fleet, data and plans, by the costs that its clock charges."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import msgspec
from msgspec.structs import replace

from ...actors.support import PlanRefused, check_plan
from ...clusters.fleet import Fleet
from ...learning.architecture import Architecture
from ...learning.spec import Sparsity
from ...learning.workload import Workload
from ...policies.advice.compare_methods import MethodCost, Note, compare_methods, no_note, representatives
from ...policies.advice.verdict import PLAIN, cheaper, many_bytes
from ...policies.checks.fields import Cohort, cohort_size, is_cohort
from ...policies.checks.statements import statements_of
from ...policies.decision import Decision
from ...policies.partitioning.cuts import AUTO
from ...policies.partitioning.ecofed import EcoFed
from ...policies.partitioning.local_loss import LocalLoss
from ...policies.partitioning.splitfed import SplitFed
from ...policies.plan import Plan
from ...policies.policy import Identity, Policy
from ...policies.presets import PRESETS
from ...policies.progressive.costliest import costliest_stage
from ...policies.progressive.profl import ProFL
from ...policies.pruning.width import Width, median_s
from ...policies.sparsity.zerofl import ZeroFL
from ...policies.view import View
from ..configuration.config import Config
from ..configuration.policy_checks import links
from ..configuration.resolution import DefaultPlan, describe_policy
from ..errors import ConfigError
from ..simulation.costs import Costs
from ..simulation.process_memory import ProcessMemory

# With the fields of their presets that costs depend on. Channels of a window that moves on cost the same as the first ones.
_NARROW: Mapping[str, Width] = {
    "HeteroFL": Width(channels="prefix", unit="width", min_channels=1, scaled=True),
    "REFT": Width(),
}
_BY_POSITION = ("prefix", "rolling")


def _table(cut: str = AUTO, first: str = "") -> dict[str, Policy]:
    """The methods that are compared, by name, with these cuts.

    EcoFed has no automatic cut without a ``depth``, which is not a question of cost.
    """
    return {
        PLAIN: Identity(),
        "SplitFed": SplitFed(cut=cut, first=first),
        "local loss": LocalLoss(cut=cut, first=first),
        "EcoFed": EcoFed(cut="" if cut == AUTO else cut, first=first),
    }


_PROGRESSIVE, _SPARSE = "ProFL", "ZeroFL"
METHODS = (*_table(), *_NARROW, _PROGRESSIVE, _SPARSE)
_PRESET_SPARSITY = PRESETS["zerofl"].overrides["training"]["sparsity"]
_ALTERNATIVES = (PLAIN, "SplitFed")  # with which a run of a method that replays views is compared before it starts


class Comparison:
    """Compares methods for one experiment, by the costs that its clock charges."""

    def __init__(self, config: Config, workload: Workload, fleet: Fleet, costs: Costs) -> None:
        """Nothing is estimated yet."""
        self._config, self._workload, self._fleet, self._costs = config, workload, fleet, costs
        self._profiles = fleet.profiles()

    def rows(self, policy: Policy, *, names: Collection[str] = METHODS, note: Note = no_note) -> list[MethodCost]:
        """A row for each method in ``names``, with the fields and the cohort size that ``policy`` gives it.

        Without ``training.sparsity`` the row of sparse training is that of its preset's sparsity. ``note``: receives a line for
        each method and device that is estimated.
        """
        if _SPARSE not in names or self._config.training.sparsity is not None:
            return self._rows(policy, names, note)
        others = self._rows(policy, [name for name in names if name != _SPARSE], note)
        sparse = self._with_sparsity(msgspec.convert(_PRESET_SPARSITY, Sparsity))
        fault = sparse._fault()
        return [*others, *(self._refused(_SPARSE, fault) if fault else sparse._rows(policy, [_SPARSE], note))]

    def _rows(self, policy: Policy, names: Collection[str], note: Note) -> list[MethodCost]:
        """The rows of methods that train the models as they are configured."""
        view, chosen = self._view(), cohorts(policy)
        size = min(cohort_size(each, len(view.profiles)) for each in chosen) if chosen else None
        methods = {name: method for name, method in methods_of(policy).items() if name in names}
        if self._workload.family("").cut_fault:
            methods = {name: method for name, method in methods.items() if name in (PLAIN, *_NARROW, _SPARSE)}
        narrow = [name for name in methods if name in _NARROW]
        return compare_methods(
            view,
            self._fleet,
            {name: _resolved(method, view) for name, method in methods.items()},
            rounds=self._config.stop.rounds,
            cohort=size,
            refusal=self._refusal,
            faults=dict.fromkeys(narrow, self._width_fault()) if narrow else {},
            note=note,
        )

    def _with_sparsity(self, sparsity: Sparsity) -> "Comparison":
        """The same comparison where layers are trained sparsely; uploads depend on which, so no cost is shared."""
        config = replace(self._config, training=replace(self._config.training, sparsity=sparsity))
        workload = self._workload.with_sparsity(sparsity)
        costs = Costs(workload, self._fleet, memory=ProcessMemory.of(config.memory))
        return Comparison(config, workload, self._fleet, costs)

    def _refused(self, name: str, fault: str) -> list[MethodCost]:
        """The row of a method that the models do not allow."""
        rounds = self._config.stop.rounds
        return compare_methods(self._view(), self._fleet, {name: Identity()}, rounds=rounds, faults={name: fault})

    def _fault(self) -> str:
        """Why a model of the devices cannot be built; "" if all can."""
        return self._model_fault(lambda architecture: architecture.spec)

    def compare_with_fedavg(self, link: Policy, *, name: str) -> list[MethodCost]:
        """Two rows: of whole models, as FedAvg sends them, and of the plans of one policy of a chain, called ``name``.

        No rows if the policy fails by itself before the first round; its error is reported when the run calls it.
        """
        methods = {PLAIN: Identity(), name: link}
        try:
            return compare_methods(
                self._view(), self._fleet, methods, rounds=self._config.stop.rounds, refusal=self._refusal
            )
        except Exception:  # a user's policy may raise anything
            return []

    def largest_upload(self, method: Policy) -> tuple[int, int]:
        """The device with the largest view of those that can take part, and its approximate bytes. (-1, 0): none can take part.

        One device of each group of equal ones is estimated. The largest view need not be of a device with the most samples: an
        earlier cut sends more per sample.
        """
        view, largest = self._view(), (-1, 0)
        for device in representatives(view):
            decided, _ = method.decide(view, method.init(), Decision(plans=(view.new_plan(device),)))
            for plan in filter(lambda plan: plan.uploads_view, decided.plans):
                num_bytes = 0 if self._refusal(plan) else view.estimate(device, plan).up_bytes
                largest = (device, num_bytes) if num_bytes > largest[1] else largest
        return largest

    def left_random(self, policy: Policy) -> str:
        """A notice if ``init`` gives pretrained weights to only the first blocks of a frozen trunk; else ""."""
        init, names, stated = self._config.init, self._workload.spec.block_names, statements_of(policy)
        if init.mode != "partial" or not stated.freezes:
            return ""
        known = names.index(init.trunk) if init.trunk else 0
        end = stated.trunk_end or names[0]
        random = names[known + 1 : names.index(end) + 1]
        return (
            f"{', '.join(random)} of the frozen trunk have random weights: init.trunk ends at {names[known]!r}, the trunk at "
            f"{end!r}"
            if random
            else ""
        )

    def _width_fault(self) -> str:
        """Why a model of the devices cannot be narrowed; "" if all can."""
        return self._model_fault(lambda architecture: architecture.groups)

    def _model_fault(self, used: Callable[[Architecture], object]) -> str:
        """The first error of what is ``used`` of the devices' models; "" if there is none."""
        for family in {profile.model: None for profile in self._profiles}:
            try:
                used(self._workload.family(family))
            except ValueError as error:
                return f"models.{family}: {error}" if family else str(error)
        return ""

    def _view(self) -> View:
        """The view before the first round."""
        new_plan = DefaultPlan.of(self._config, self._workload, self._profiles)
        return View(
            time_s=0.0,
            version=0,
            seed=0,
            profiles=self._profiles,
            samples=[self._workload.data.num_samples(device) for device in range(len(self._profiles))],
            min_samples=self._workload.min_samples,
            hosts=self._fleet.hosts.count,
            memory_margin=self._costs.memory_margin,
            plan_maker=lambda device: new_plan(device, 0, 0),
            estimator=self._costs.estimate,
        )

    def _refusal(self, plan: Plan) -> str:
        """Why a plan would be refused, without the device; "" if it would not be."""
        try:
            check_plan(plan, self._workload, profile=self._profiles[plan.device])
        except PlanRefused as error:
            return str(error).partition(": ")[2]
        return ""


def check_replay(policy: Policy, config: Config, comparison: Comparison) -> None:
    """Raise ``ConfigError`` if the replay buffer has no room for the largest view that a policy would upload."""
    for method in _replaying(policy):
        device, num_bytes = comparison.largest_upload(method)
        if num_bytes > config.replay.memory_bytes:
            raise ConfigError(
                f"replay.memory_bytes is {config.replay.memory_bytes}; what device {device} uploads takes about {num_bytes} "
                "bytes, and a host must have room for one view at least"
            )


def advice(policy: Policy, config: Config, comparison: Comparison) -> list[str]:
    """Notices about a policy, and about combinations of settings that are seldom intended."""
    stated = [statements_of(link) for link in links(policy)]
    notices = [text for each in stated if each.notices for text in each.notices(config.training)]
    if not any(each.freezes for each in stated):
        return notices + _many_bytes(policy, comparison)
    if config.init.mode == "random":
        notices.append("the frozen trunk has random weights, since init.mode is 'random'; see fedbonsai pretrain")
    notices += [text for link in links(policy) if (text := comparison.left_random(link))]
    if name := _replaying_method(policy):
        text = cheaper(comparison.rows(policy, names=(*_ALTERNATIVES, name)), name)
        return [*notices, f"{text}; see fedbonsai advise"] if text else notices
    return notices + _many_bytes(policy, comparison)


def _replaying(policy: Policy) -> list[Policy]:
    """The policies of a chain whose plans upload views, on which the hosts train in other rounds."""
    return [link for link in links(policy) if statements_of(link).upload_period is not None]


def _replaying_method(policy: Policy) -> str:
    """The name of the compared method that such a policy of a chain carries out; "" if there is none."""
    for name, method in methods_of(policy).items():
        if any(isinstance(link, type(method)) for link in _replaying(policy)):
            return name
    return ""


def _many_bytes(policy: Policy, comparison: Comparison) -> list[str]:
    """A notice for each policy that cuts the model, if the cut transfers many times the bytes of the model."""
    notices = []
    for position, link in enumerate(links(policy)):
        if "split" in statements_of(link).written:
            name = f"policy[{position}] ({describe_policy(link)[0]['name']})"
            rows = comparison.compare_with_fedavg(link, name=name)
            notices += [text] if rows and (text := many_bytes(*rows)) else []
    return [f"{text}; see fedbonsai advise" for text in notices]


def methods_of(policy: Policy) -> dict[str, Policy]:
    """The compared methods, with the fields that ``policy`` gives them.

    A method that it does not contain has the cut of the one that it contains; if it contains none, an automatic cut. A policy
    that sets widths belongs to the method that chooses channels as it does: by their weights (REFT), or by their positions.
    """
    given = {type(link): link for link in links(policy)}
    cutting = tuple(type(method) for method in _table().values() if "split" in statements_of(method).written)
    cuts = ((link.cut, link.first) for link in given.values() if isinstance(link, cutting))  # type: ignore[attr-defined]
    methods = _table(*next(cuts, ()))
    found = {name: given.get(type(method), method) for name, method in methods.items()}
    widths = [link for link in links(policy) if isinstance(link, Width)]
    others = {_PROGRESSIVE: given.get(ProFL, ProFL()), _SPARSE: given.get(ZeroFL, ZeroFL())}
    return (
        found
        | dict(_NARROW)
        | others
        | {"HeteroFL" if link.channels in _BY_POSITION else "REFT": link for link in widths}
    )


def _resolved(method: Policy, view: View) -> Policy:
    """A method. What follows from the fleet or the model is found once for all devices: a deadline, the costliest stage."""
    if isinstance(method, ProFL):
        return costliest_stage(method, view)
    if isinstance(method, Width) and method.rule == "deadline" and method.deadline_s is None:
        return dataclasses.replace(method, deadline_s=median_s(view))
    if isinstance(method, ZeroFL):
        return method.with_deadline(view)
    return method


def cohorts(policy: Policy) -> list[Cohort]:
    """The cohorts of a chain's policies; a field ``cohort`` of another type, as in a user's policy, is left out."""
    return [link.cohort for link in links(policy) if is_cohort(getattr(link, "cohort", None))]  # type: ignore[attr-defined]
