"""What policies say of themselves, held against the configuration: what could not work, or would be ignored, is refused.

See ``policies.policy`` for the attributes, which may all be missing. A policy that lies is found out later, at dispatch.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...clusters.fleet import Fleet
from ...learning.spec import Training
from ...policies.policy import Chain, Identity, Policy
from ...policies.resolve_policy import check_policy_object, make_policy
from ..errors import ConfigError
from .config import Config
from .resolution import describe_policy

if TYPE_CHECKING:
    from ...learning.workload import Workload  # which imports torch


def configured_policy(config: Config) -> Policy:
    """The chain that is configured; raises ``ConfigError``."""
    try:
        return make_policy(config.policy)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def described(policy: Any) -> tuple[dict[str, Any], ...]:
    """The ``policy:`` list that names a policy object; raises ``ConfigError`` for what is none."""
    try:
        check_policy_object(policy)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return describe_policy(policy)


def check_policy(policy: Policy, config: Config, fleet: Fleet) -> None:
    """Raise ``ConfigError`` with one sentence for the first thing that does not go together."""
    if not links(policy):
        raise ConfigError("policy is empty, so that no device would be chosen; allowed: a list such as [{name: all}]")
    chosen = False
    for position, link in enumerate(links(policy)):
        name, where = describe_policy(link)[0]["name"], _told(position, link)
        if getattr(link, "needs_plans", False):
            if not chosen:
                raise ConfigError(
                    f"{where} only changes plans of the policies before it, and none of them chooses devices; "
                    f"allowed: a selection before it, as in [{{name: all}}, {{name: {name}}}]"
                )
        else:
            chosen = True
        _check_codecs(where, link, fleet)
        _check_kinds(where, link, fleet)
        _check_replaced(where, link, config)
        if getattr(link, "needs_staleness", False) and config.server.staleness is None:
            raise ConfigError(
                f"server.staleness is null, so that late updates count nothing; {where} needs a rule: "
                "constant, polynomial or hinge, as in {rule: polynomial, a: 0.5}"
            )
    _check_together(links(policy))
    _check_cutting(policy, config)


def _told(position: int, policy: Policy) -> str:
    """A policy of a chain, as errors name it."""
    return f"policy[{position}] ({describe_policy(policy)[0]['name']})"


def _first(chain: Sequence[Policy], says: Callable[[Policy], bool]) -> int | None:
    """Place of the first policy that says something of itself."""
    return next((position for position, link in enumerate(chain) if says(link)), None)


def _cuts(policy: Policy) -> bool:
    return getattr(policy, "cuts", None) is not None


def _check_together(chain: Sequence[Policy]) -> None:
    """What one policy of a chain does must leave room for what the others do."""
    _check_closing(chain)
    turns = _first(chain, lambda link: getattr(link, "takes_turns", False))
    cutting = _first(chain, _cuts)
    remembers = _first(chain, lambda link: getattr(link, "remembers", False))
    for position, link in enumerate(chain):
        if turns is not None and position > turns and not getattr(link, "needs_plans", False):
            raise ConfigError(
                f"{_told(position, link)} would choose among the plans of one turn only, behind {_told(turns, chain[turns])}, "
                "which sends them one after another; allowed: the selection before it"
            )
        if cutting is not None and position > cutting and _cuts(link):
            raise ConfigError(
                f"{_told(position, link)} would cut what {_told(cutting, chain[cutting])} has cut; "
                "allowed: one policy that cuts the model"
            )
    if cutting is not None and remembers is not None:
        raise ConfigError(
            f"{_told(remembers, chain[remembers])} gives links a memory, which those of a model that "
            f"{_told(cutting, chain[cutting])} cuts cannot have yet; allowed: one of the two"
        )


def _check_closing(chain: Sequence[Policy]) -> None:
    """When versions close, and who stops early for that, must go with how plans are sent and what they are."""
    turns = _first(chain, lambda link: getattr(link, "takes_turns", False))
    early = _first(chain, lambda link: getattr(link, "stops_early", False))
    counting = _first(chain, lambda link: getattr(link, "counts_plans", False))
    freezing = _first(chain, lambda link: getattr(link, "freezes", False))
    told = [_told(position, link) for position, link in enumerate(chain)]
    closing = [name for name, link in zip(told, chain, strict=True) if getattr(link, "closes", False)]
    if len(closing) > 1:
        raise ConfigError(
            f"{closing[1]} says at how many updates a version closes, as {closing[0]} does; allowed: one of the two"
        )
    if turns is not None and early is not None:
        raise ConfigError(
            f"{told[early]} has devices stop early when their round closes, where {told[turns]} sends them one after another; "
            "allowed: one of the two"
        )
    if turns is not None and counting is not None and counting > turns:
        raise ConfigError(
            f"{told[counting]} closes at a share of the plans, of which {told[turns]} sends one after another; "
            "allowed: a number of updates, or the other way round"
        )
    if early is not None and freezing is not None and early < freezing:
        raise ConfigError(
            f"{told[early]} has devices stop early, before {told[freezing]} makes some upload views, which must be whole; "
            "allowed: the other way round"
        )


def _check_cutting(policy: Policy, config: Config) -> None:
    """What cannot be trained in two legs must not have been asked for."""
    norm = config.training.optimiser.clip_norm
    for position, link in enumerate(links(policy)):
        if _cuts(link) and norm is not None:
            raise ConfigError(
                f"training.optimiser.clip_norm is {norm:g}; {_told(position, link)} cuts the model, and neither side of a cut "
                "sees the whole gradient; allowed: null"
            )


def _check_codecs(where: str, policy: Policy, fleet: Fleet) -> None:
    """Every class of the fleet must run what the policy needs."""
    needed: tuple[str, ...] = getattr(policy, "needs_codecs", ())
    for profile in (kind.profile for kind in fleet.classes):
        if profile.codecs is not None and not profile.codecs.issuperset(needed):
            runs = ", ".join(sorted(profile.codecs)) or "none"
            raise ConfigError(
                f"fleet class {profile.name!r} has codecs {runs}; {where} needs {', '.join(needed)} on every class"
            )


def _check_kinds(where: str, policy: Policy, fleet: Fleet) -> None:
    """Every class of the fleet must be allowed to send what the policy makes it send."""
    needed: tuple[str, ...] = getattr(policy, "needs_kinds", ())
    for profile in (kind.profile for kind in fleet.classes):
        if missing := [kind for kind in needed if kind not in profile.may_send]:
            allowed = ", ".join(sorted(profile.may_send)) or "nothing"
            raise ConfigError(
                f"fleet class {profile.name!r} may send only {allowed}; {where} makes it send {missing[0]}"
            )


def check_cuts(policy: Policy, workload: "Workload", training: Training) -> None:
    """Blocks behind which a policy cuts must be of the model, not its last, and in its order; else ``ConfigError``.

    The auxiliaries that it trains there must be possible.
    """
    names = workload.spec.block_names
    for position, link in enumerate(links(policy)):
        told = _told(position, link)
        wanted: tuple[str, ...] = getattr(link, "cuts", ())
        if _cuts(link) and (fault := workload.cut_fault):
            raise ConfigError(f"{told} cuts the model, which cannot be cut: {fault}")
        if unknown := [cut for cut in wanted if cut not in names[:-1]]:
            fronts = [(cut, workload.boundary(names[: names.index(cut) + 1], training)) for cut in names[:-1]]
            clean = ", ".join(f"{cut} ({'x'.join(map(str, found.shape))})" for cut, found in fronts)
            raise ConfigError(f"{told} cuts behind {unknown[0]!r}; the clean cuts are: {clean}")
        for before, after in pairwise(wanted):
            if names.index(after) < names.index(before):
                raise ConfigError(f"{told} cuts behind {after!r}, which must be {before!r} or a block behind it")
        for auxiliary in link.auxiliaries(names) if hasattr(link, "auxiliaries") else ():
            try:
                workload.spec.auxiliary(auxiliary)
            except ValueError as error:
                raise ConfigError(f"{told} needs {auxiliary!r}, and there can be none: {error}") from error


def _check_replaced(where: str, policy: Policy, config: Config) -> None:
    """What the policy replaces must not have been asked for."""
    replaced: tuple[str, ...] = getattr(policy, "replaces", ())
    # Evaluation on devices sends them the model as ``codecs.down`` says.
    unused = {"codec_up": "up"} | ({} if config.evaluation.where in ("devices", "both") else {"codec_down": "down"})
    for field, direction in unused.items():
        chain = getattr(config.codecs, direction)
        if chain and field in replaced:
            names = ", ".join(codec.name for codec in chain)
            raise ConfigError(
                f"codecs.{direction} is [{names}], which {where} would replace in every plan; "
                "allowed: an empty list, or a policy that leaves that direction alone"
            )


def links(policy: Policy) -> list[Policy]:
    """The policies of a chain, in order."""
    if isinstance(policy, Chain):
        return [link for inner in policy.links for link in links(inner)]
    return [] if type(policy) is Identity else [policy]
