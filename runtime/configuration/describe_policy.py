"""From a policy object to the ``policy:`` list that names it, as ``resolve_policy`` reads it: a run folder tells the whole run.

A policy is a frozen dataclass and its fields are its configuration, so nothing else is needed. One that was defined where
it cannot be imported again (a notebook, inside a function) is named all the same.
"""

import dataclasses
from typing import Any

import msgspec

from ...policies.policy import Chain, Identity, Policy
from ...policies.resolve_policy import BUILT_IN


def describe_policy(policy: Policy) -> tuple[dict[str, Any], ...]:
    """One entry for each link of the chain: its name, and the fields that differ from their defaults."""
    if isinstance(policy, Chain):
        return tuple(entry for link in policy.links for entry in describe_policy(link))
    if type(policy) is Identity:
        return ()
    kind = type(policy)
    name = next((name for name, known in BUILT_IN.items() if known is kind), f"{kind.__module__}:{kind.__qualname__}")
    entry: dict[str, Any] = {"name": name}
    declared: dict[str, dataclasses.Field[Any]] = getattr(kind, "__dataclass_fields__", {})
    for field in declared.values():
        value = getattr(policy, field.name)
        if field.init and value != field.default:
            entry[field.name] = msgspec.to_builtins(value, enc_hook=repr)
    return (entry,)
