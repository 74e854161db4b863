"""What policies state of themselves, compared with each other and with the configuration, the fleet and the model.

A combination that cannot work, or in which a setting would be ignored, is refused. ``policies.policy`` describes the
statements, which may all be missing. Plans that contradict what their policy states are found at dispatch.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...clusters.fleet import Fleet
from ...clusters.units import shown
from ...learning.spec import Training
from ...policies.checks.statements import Statements, chain_fault, class_fault, statements_of
from ...policies.policy import Chain, Identity, Policy
from ...policies.resolve_policy import check_policy_object, make_policy
from ...policies.tasks import ServerTask
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
    chain = _stated(policy)
    if fault := chain_fault(chain):
        raise ConfigError(fault)
    for who, stated in chain:
        _check_codecs(who, stated, fleet)
        _check_kinds(who, stated, fleet)
        _check_replaced(who, stated, config)
        _check_settings(who, stated, config)
        _check_tasks(who, stated, config)
        _check_classes(who, stated, fleet)
    _check_families([stated for _, stated in chain], config, fleet)


def _stated(policy: Policy) -> list[tuple[str, Statements]]:
    """The policies of a chain, as errors name them, with what they state."""
    found = []
    for position, link in enumerate(links(policy)):
        who = f"policy[{position}] ({describe_policy(link)[0]['name']})"
        try:
            found.append((who, statements_of(link, who)))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return found


def _check_tasks(who: str, stated: Statements, config: Config) -> None:
    """A policy that distils needs a public set."""
    if stated.distils and not config.data.public_share and config.server.public is None:
        raise ConfigError(
            f"data.public_share is 0 and server.public is null; {who} distils on a public set: allowed are a share above 0, "
            "such as 0.1, or another data set"
        )


def _check_classes(who: str, stated: Statements, fleet: Fleet) -> None:
    """A field of the policy with a value for each class must name all classes of the fleet, and no other."""
    for field, named in stated.by_class.items():
        if fault := class_fault(field, named, [device_class.name for device_class in fleet.classes]):
            raise ConfigError(f"{who}: {fault}")


def _check_families(chain: Sequence[Statements], config: Config, fleet: Fleet) -> None:
    """Each family of models must be trained: by a class of the fleet, or by a task of the server."""
    used = {device_class.model for device_class in fleet.classes}
    unused = [name for name in config.models if name not in used]
    if unused and not any(stated.distils for stated in chain):
        raise ConfigError(
            f"models names {unused[0]!r}, which would never be trained: it is the model of no class of the fleet; "
            "allowed: names that classes have as their model, or a policy that distils, such as {name: distillation}"
        )


def _check_codecs(who: str, stated: Statements, fleet: Fleet) -> None:
    """Every class of the fleet must run the codecs that the policy needs."""
    for profile in (device_class.profile for device_class in fleet.classes):
        if profile.codecs is not None and not profile.codecs.issuperset(stated.needs_codecs):
            runs = ", ".join(sorted(profile.codecs)) or "none"
            needed = ", ".join(stated.needs_codecs)
            raise ConfigError(f"fleet class {profile.name!r} has codecs {runs}; {who} needs {needed} on every class")


def _check_kinds(who: str, stated: Statements, fleet: Fleet) -> None:
    """Every class of the fleet must be allowed to send what the policy has it send."""
    for profile in (device_class.profile for device_class in fleet.classes):
        if missing := [kind for kind in stated.needs_kinds if kind not in profile.may_send]:
            allowed = ", ".join(sorted(profile.may_send)) or "nothing"
            raise ConfigError(f"fleet class {profile.name!r} may send only {allowed}; {who} makes it send {missing[0]}")


def _check_replaced(who: str, stated: Statements, config: Config) -> None:
    """A codec chain that the policy replaces must not be configured."""
    # Evaluation on devices sends them the model as ``codecs.down`` says.
    unused = {"codec_up": "up"} | ({} if config.evaluation.where in ("devices", "both") else {"codec_down": "down"})
    for field, direction in unused.items():
        configured = getattr(config.codecs, direction)
        if configured and field in stated.replaces:
            names = ", ".join(codec.name for codec in configured)
            raise ConfigError(
                f"codecs.{direction} is [{names}], which {who} would replace in every plan; "
                "allowed: an empty list, or a policy that leaves that direction alone"
            )


def _check_settings(who: str, stated: Statements, config: Config) -> None:
    """Settings that the policy needs must be set, and those that it forbids must not be."""
    for wanted, settings in ((True, stated.needs_settings), (False, stated.forbids_settings)):
        for setting, reason in settings.items():
            value = _setting(setting, who, config)
            if bool(value) is not wanted:
                found = "null" if value is None else "empty" if value in ((), {}, "") else shown(value)
                raise ConfigError(f"{setting} is {found}; {who} {reason}")


def _setting(setting: str, who: str, config: Config) -> Any:
    """The value of a setting that a policy names by its path; null where the section that holds it is null."""
    value: Any = config
    for name in setting.split("."):
        if value is not None and not hasattr(value, name):
            raise ConfigError(f"{who} names the setting {setting!r}, which there is not; see docs/configuration.md")
        value = getattr(value, name, None)
    return value


def check_models(policy: Policy, workload: "Workload", fleet: Fleet, training: Training) -> None:
    """Raise ``ConfigError`` where a policy cannot cut or narrow the models that the fleet trains as it states."""
    for who, stated in _stated(policy):
        for family in sorted({profile.model for profile in fleet.profiles()}):
            _check_cuts(who, stated, workload, family, training)
            if "part.width" in stated.written:
                _check_narrow(who, workload, family)


def _check_cuts(who: str, stated: Statements, workload: "Workload", family: str, training: Training) -> None:
    """The blocks behind which a policy cuts must be of the model, not its last, and in its order.

    The auxiliaries that it trains there must be possible.
    """
    model, of = workload.family(family), f" of models.{family}" if family else ""
    names = model.spec.block_names
    if {"split", "path"} & set(stated.written) and (fault := model.cut_fault):
        which = f"the model models.{family}" if family else "the model"
        raise ConfigError(f"{who} cuts {which}, which cannot be cut: {fault}")
    if unknown := [cut for cut in stated.cuts if cut not in names[:-1]]:
        fronts = [(cut, model.boundary(names[: names.index(cut) + 1], training)) for cut in names[:-1]]
        clean = ", ".join(f"{cut} ({'x'.join(map(str, boundary.shape))})" for cut, boundary in fronts)
        raise ConfigError(f"{who} cuts behind {unknown[0]!r}; the clean cuts{of} are: {clean}")
    for before, after in pairwise(stated.cuts):
        if names.index(after) < names.index(before):
            raise ConfigError(f"{who} cuts behind {after!r}, which must be {before!r} or a block behind it")
    for auxiliary in stated.auxiliaries(names) if stated.auxiliaries is not None else ():
        try:
            model.spec.auxiliary(auxiliary)
        except ValueError as error:
            raise ConfigError(f"{who} needs {auxiliary!r}{of}, and there can be none: {error}") from error


def _check_narrow(who: str, workload: "Workload", family: str) -> None:
    """A model that a policy narrows must have channels that can be removed, and no frozen parameters."""
    which = f"models.{family}" if family else "model"
    try:
        _ = workload.family(family).groups
    except ValueError as error:
        raise ConfigError(f"{which}: {error}; {who} needs a model that can be narrowed") from error
    if frozen := workload.family(family).spec.frozen_parameters:
        raise ConfigError(
            f"{which}: {frozen:,} parameters are frozen (requires_grad is False), and are not sent; {who} narrows only models "
            "without such parameters"
        )


def distils(policy: Policy) -> bool:
    """Whether a policy of the chain states that it distils, for which the run has a distiller."""
    return any(statements_of(link).distils for link in links(policy))


def known_tasks(policy: Policy) -> list[ServerTask]:
    """The tasks that are known before the first decision: of policies with an attribute ``task``, the one that they give."""
    tasks = [getattr(link, "task", None) for link in links(policy)]
    return [task for task in tasks if isinstance(task, ServerTask)]


def links(policy: Policy) -> list[Policy]:
    """The policies of a chain, in order."""
    if isinstance(policy, Chain):
        return [link for inner in policy.links for link in links(inner)]
    return [] if type(policy) is Identity else [policy]
