"""The methods compared for one experiment: with its fleet, its data, its own plans, and the costs that its clock charges."""

from collections.abc import Collection

from ...actors.support import PlanRefused, check_plan
from ...clusters.fleet import Fleet
from ...learning.parts.part import whole
from ...learning.workload import Workload
from ...policies.advice.compare_methods import MethodCost, Note, compare_methods, representatives, unheard
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
from ...policies.view import View
from ..configuration.config import Config
from ..configuration.default_plan import DefaultPlan
from ..configuration.describe_policy import describe_policy
from ..configuration.policy_checks import links
from ..errors import ConfigError
from ..simulation.costs import Costs

METHODS = ("FedAvg", "SplitFed", "local loss", "EcoFed")


class Comparison:
    """Methods compared for one experiment, by the costs that its clock charges."""

    def __init__(self, config: Config, workload: Workload, fleet: Fleet, costs: Costs) -> None:
        """Nothing is estimated yet."""
        self._config, self._workload, self._fleet, self._costs = config, workload, fleet, costs
        self._profiles = fleet.profiles()

    def rows(self, policy: Policy, *, names: Collection[str] = METHODS, note: Note = unheard) -> list[MethodCost]:
        """Of the methods of these names, with the fields and the cohort that ``policy`` gives them.

        ``note``: gets a line for each method and device that is asked.
        """
        view, chosen = self._view(), cohorts(policy)
        size = min(cohort_size(each, len(view.profiles)) for each in chosen) if chosen else None
        methods = {name: method for name, method in methods_of(policy).items() if name in names}
        if self._workload.cut_fault:
            methods = {PLAIN: methods[PLAIN]}
        rounds = self._config.stop.rounds
        return compare_methods(view, self._fleet, methods, rounds=rounds, cohort=size, refusal=self._refusal, note=note)

    def beside_plain(self, link: Policy, *, name: str) -> list[MethodCost]:
        """Two rows: of whole models, as FedAvg sends them, and of what one policy of a chain, called ``name``, makes of them.

        None where it cannot be asked by itself, before the first round: what is wrong with it is told when its turn comes.
        """
        methods = {PLAIN: Identity(), name: link}
        try:
            return compare_methods(
                self._view(), self._fleet, methods, rounds=self._config.stop.rounds, refusal=self._refusal
            )
        except Exception:  # whatever a user's policy raises
            return []

    def largest_upload(self, method: EcoFed) -> tuple[int, int]:
        """Who uploads most of those that can take part, and about how many bytes: of each kind of devices one is asked.

        Not always who has the most samples: an earlier cut sends more of each. (-1, 0): nobody can take part.
        """
        view, found = self._view(), (-1, 0)
        for device in representatives(view):
            decided, _ = method.decide(view, method.init(), Decision(plans=(view.new_plan(device),)))
            for plan in decided.plans:
                num_bytes = 0 if self._refusal(plan) else view.estimate(device, plan).up_bytes
                found = (device, num_bytes) if num_bytes > found[1] else found
        return found

    def left_random(self, policy: Policy) -> str:
        """Which blocks of a frozen trunk have no pretrained weights, where ``init`` gives them to the first ones only."""
        init, names = self._config.init, self._workload.spec.block_names
        if init.mode != "partial" or not isinstance(policy, EcoFed):
            return ""
        known = names.index(init.trunk) if init.trunk else 0
        depth = policy.depth or (policy.cut if policy.cut != AUTO else "") or policy.first or names[0]
        random = names[known + 1 : names.index(depth) + 1]
        return (
            f"{', '.join(random)} of the frozen trunk have random weights: init.trunk ends at {names[known]!r}, the trunk at "
            f"{depth!r}"
            if random
            else ""
        )

    def _view(self) -> View:
        """The run before its first round."""
        new_plan = DefaultPlan(self._config, whole(self._workload.spec))
        return View(
            time_s=0.0,
            version=0,
            seed=0,
            profiles=self._profiles,
            samples=[self._workload.data.num_samples(device) for device in range(len(self._profiles))],
            min_samples=self._workload.min_samples,
            hosts=self._fleet.hosts.count,
            plan_maker=lambda device: new_plan(device, 0, 0),
            estimator=self._costs.estimate,
        )

    def _refusal(self, plan: Plan) -> str:
        """Why a plan would be refused, without saying whose it is."""
        try:
            check_plan(plan, spec=self._workload.spec, profile=self._profiles[plan.device])
        except PlanRefused as error:
            return str(error).partition(": ")[2]
        return ""


def check_replay(policy: Policy, config: Config, comparison: Comparison) -> None:
    """Raise ``ConfigError`` where the replay buffer has no room for a single view."""
    for method in (link for link in links(policy) if isinstance(link, EcoFed)):
        device, num_bytes = comparison.largest_upload(method)
        if num_bytes > config.replay.memory_bytes:
            raise ConfigError(
                f"replay.memory_bytes is {config.replay.memory_bytes}; what device {device} uploads takes about {num_bytes} "
                "bytes, and a host must have room for one view at least"
            )


def advice(policy: Policy, config: Config, comparison: Comparison) -> list[str]:
    """What an operator should know of a policy, and of settings that go together and are seldom meant."""
    stated = [statements_of(link) for link in links(policy)]
    found = [text for each in stated for text in each.notices]
    if not any(each.freezes for each in stated):
        return found + _many_bytes(policy, comparison)
    if config.init.mode == "random":
        found.append("the frozen trunk has random weights, since init.mode is 'random'; see fedbonsai pretrain")
    found += [text for link in links(policy) if (text := comparison.left_random(link))]
    if any(isinstance(link, EcoFed) for link in links(policy)):
        told = cheaper(comparison.rows(policy, names=("FedAvg", "SplitFed", "EcoFed")), "EcoFed")
        return [*found, f"{told}; see fedbonsai advise"] if told else found
    return found + _many_bytes(policy, comparison)


def _many_bytes(policy: Policy, comparison: Comparison) -> list[str]:
    """A notice for each policy that cuts the model where what crosses is many times the model."""
    found = []
    for position, link in enumerate(links(policy)):
        if "split" in statements_of(link).written:
            name = f"policy[{position}] ({describe_policy(link)[0]['name']})"
            rows = comparison.beside_plain(link, name=name)
            found += [text] if rows and (text := many_bytes(*rows)) else []
    return [f"{text}; see fedbonsai advise" for text in found]


def methods_of(policy: Policy) -> dict[str, Policy]:
    """The methods, with the fields that ``policy`` gives them; one that it does not hold is cut where it cuts.

    Where it cuts nothing they have "auto" cuts, but EcoFed its defaults: how deep a trunk may be is no question of cost.
    """
    held = {type(link): link for link in links(policy)}
    cutting = next(
        (link for link in held.values() if isinstance(link, SplitFed | LocalLoss | EcoFed)), SplitFed(cut=AUTO)
    )
    cut, first = cutting.cut, cutting.first
    usual: dict[str, Policy] = {
        "FedAvg": Identity(),
        "SplitFed": SplitFed(cut=cut, first=first),
        "local loss": LocalLoss(cut=cut, first=first),
        "EcoFed": EcoFed(cut="" if cut == AUTO else cut, first=first),
    }
    return {name: held.get(type(method), method) for name, method in usual.items()}


def cohorts(policy: Policy) -> list[Cohort]:
    """Of the policies of a chain that choose so many devices; what a user's policy means by the name may be something else."""
    return [link.cohort for link in links(policy) if is_cohort(getattr(link, "cohort", None))]  # type: ignore[attr-defined]
