"""Auxiliaries on the server: in the store as they start, from the first plan on that names them."""

from collections.abc import MutableMapping

from torch import Tensor

from ...learning.parts.structure import Role
from ...learning.workload import Workload


def provide(
    names: tuple[str, ...], workload: Workload, *, held: MutableMapping[str, Tensor], roles: MutableMapping[str, Role]
) -> None:
    """Put the tensors of these auxiliaries into ``held`` (the store's section) and ``roles``, where they are not there yet."""
    for name in names:
        tensors = workload.spec.auxiliary(name).tensors
        if tensors[0].name not in held:
            state = workload.new_auxiliary(name).state_dict()
            held.update({f"{name}.{key}": tensor for key, tensor in state.items()})
            roles.update({tensor.name: tensor.role for tensor in tensors})
