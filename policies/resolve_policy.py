"""The policy that the ``policy:`` list of a configuration names.

Each entry is a mapping: ``name``, and the fields of the policy beside it::

    policy:
      - {name: deadline, deadline_s: 60}          # built in
      - {name: their_policy, cohort: 10}          # an installed package's entry point, group "fedbonsai.policies"
      - {name: "my_module:MyPolicy", cohort: 4}   # a class that can be imported

Several entries are a chain, in this order. There is no registry: a name is looked up when a configuration uses it, so a broken
package affects only the configurations that name it.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from ..clusters.units import shown
from ..learning.resolve import resolve
from .aggregation.distillation import Distillation
from .checks.fields import convert_field
from .compression.residuals import Residuals
from .partitioning.ecofed import EcoFed
from .partitioning.local_loss import LocalLoss
from .partitioning.splitfed import SplitFed
from .policy import Chain, Policy, chain
from .progressive.profl import ProFL
from .pruning.common_width import AllSmall
from .pruning.width import Width
from .scheduling.asynchronous import Asynchronous
from .scheduling.closing import Closing
from .selection.deadline import ByDeadline
from .selection.oort import Oort
from .selection.plain import All, Fastest, RandomCohort
from .selection.power_of_choice import PowerOfChoice
from .sparsity.zerofl import ZeroFL

PolicySpec = Mapping[str, Any]

GROUP = "fedbonsai.policies"

BUILT_IN: Mapping[str, type[Policy]] = {
    "all": All,
    "random": RandomCohort,
    "fastest": Fastest,
    "deadline": ByDeadline,
    "closing": Closing,
    "power_of_choice": PowerOfChoice,
    "oort": Oort,
    "asynchronous": Asynchronous,
    "residuals": Residuals,
    "splitfed": SplitFed,
    "local_loss": LocalLoss,
    "ecofed": EcoFed,
    "width": Width,
    "distillation": Distillation,
    "profl": ProFL,
    "all_small": AllSmall,
    "zerofl": ZeroFL,
}


def make_policy(specs: Sequence[PolicySpec]) -> Policy:
    """The chain of the policies that ``specs`` names.

    Raises ``ValueError`` with one sentence for a name that is not known, a field that the policy does not have or that
    is missing, a value of the wrong type or range, and a class that is not a policy.
    """
    return chain(*(_make_one(f"policy[{position}]", spec) for position, spec in enumerate(specs)))


def _make_one(where: str, spec: PolicySpec) -> Policy:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where} is {spec!r}; allowed: a mapping, as in {{name: random, cohort: 10}}")
    name = spec.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.name is {name!r}; allowed: {_known()}")
    policy_class = _find_class(where, name)
    _check_class(where, name, policy_class)
    values = _convert_fields(
        where, name, policy_class, {field: value for field, value in spec.items() if field != "name"}
    )
    try:
        policy: Policy = policy_class(**values)
    except ValueError as error:
        raise ValueError(f"{where} ({name}): {error}") from error
    return policy


def _convert_fields(where: str, name: str, policy_class: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(policy_class) if field.init}
    if unknown := next((field for field in given if field not in fields), None):
        allowed = f"allowed: {', '.join(fields)}" if fields else "it has no fields"
        raise ValueError(f"{where}.{unknown} is not a field of {name!r}; {allowed}")
    for field in fields.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            raise ValueError(f"{where}.{field.name} is missing; {name!r} has no default for it")
    hints = get_type_hints(policy_class, include_extras=True)
    return {key: convert_field(f"{where}.{key}", value, hints[key]) for key, value in given.items()}


def _find_class(where: str, name: str) -> Any:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" in name:
        return resolve(name, what=f"{where}.name")
    offers = entry_points(group=GROUP, name=name)
    packages = sorted({offer.dist.name if offer.dist else "an unnamed package" for offer in offers})
    if not offers:
        close = difflib.get_close_matches(name, [*BUILT_IN, *_entry_point_names()], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{where}.name is {name!r}{hint}; allowed: {_known()}")
    if len(packages) > 1:
        raise ValueError(
            f"{where}.name is {name!r}, which {' and '.join(packages)} both offer; name it as 'module:Class'"
        )
    try:
        return next(iter(offers)).load()
    except Exception as error:  # any error of the module while it is imported
        raise ValueError(
            f"{where}.name is {name!r}, which {packages[0]} offers but which cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_policy_object(policy: Any, where: str = "policy") -> None:
    """Raise ``ValueError`` unless ``policy`` is an instance of a policy class; every link of a chain is checked.

    ``where``: the argument or setting that holds it.
    """
    if isinstance(policy, Chain):
        for position, link in enumerate(policy.links):
            check_policy_object(link, f"{where}.links[{position}]")
    elif isinstance(policy, type):
        raise ValueError(
            f"{where} is the class {policy.__name__}; allowed: an instance of it, as {policy.__name__}(...)"
        )
    elif fault := _fault(type(policy)):
        raise ValueError(f"{where} is {shown(policy)}, which is not a policy: {fault}; {_ALLOWED}")


_ALLOWED = "allowed: a frozen dataclass with init(self) and decide(self, view, state, decision)"


def _check_class(where: str, name: str, policy_class: Any) -> None:
    fault = _fault(policy_class) if isinstance(policy_class, type) else "it is not a class"
    if fault:
        raise ValueError(f"{where}.name is {name!r}, which is not a policy: {fault}; {_ALLOWED}")


def _fault(policy_class: type) -> str:
    """Why a class is not a policy; "" where it is one."""
    # typeshed does not know of __dataclass_params__, the only place where "frozen" can be read
    if not getattr(getattr(policy_class, "__dataclass_params__", None), "frozen", False):
        return "it is not a frozen dataclass"
    missing = [method for method in ("init", "decide") if not callable(getattr(policy_class, method, None))]
    return f"it has no {' and no '.join(missing)}" if missing else ""


def _entry_point_names() -> list[str]:
    return sorted({offer.name for offer in entry_points(group=GROUP)} - set(BUILT_IN))


def _known() -> str:
    names = ", ".join([*BUILT_IN, *_entry_point_names()])
    return f"{names}, or a class of your own as 'module:Class'"
