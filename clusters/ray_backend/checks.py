"""Checks that every node has the versions and the data that a run needs, once before round 1.

Without them a node that differs would fail later, with a less helpful message.
"""

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..processor import emulates_bf16, inspector, tell_apart

PACKAGES = ("ray", "torch", "fedbonsai")


def versions_here() -> dict[str, str]:
    """The versions that every node must have: Python (major.minor) and the packages in ``PACKAGES``, as in this process."""
    return {"python": ".".join(platform.python_version_tuple()[:2])} | {
        name: metadata.version(name) for name in PACKAGES
    }


def check_nodes(*, data_root: str | None, versions: Mapping[str, str], timeout_s: float = 60.0) -> list[str]:
    """Run a small task on every node that is alive; raise ``ValueError`` in one sentence with the node and both values.

    ``data_root``: a folder that must exist on each node (None: none is needed). ``versions``: those of ``versions_here``; the
    label of a build (``2.13.0+cpu``) may differ. Returns notices for the operator, about nodes whose results differ in the last
    bits. This process must be connected to the cluster.
    """
    numerics: dict[str, dict[str, str]] = {}
    for address, reported in _ask_nodes(data_root, list(versions), timeout_s=timeout_s):
        _compare(f"node {address}", reported, data_root, versions)
        numerics[address] = reported["numerics"]
    return tell_apart(numerics)


def nodes_emulating_bf16(*, timeout_s: float = 60.0) -> list[str]:
    """Addresses of the nodes that are alive and whose processors lack bf16 instructions. Raises ``ValueError``."""
    return [
        address
        for address, reported in _ask_nodes(None, [], timeout_s=timeout_s)
        if emulates_bf16(reported["numerics"])
    ]


def _ask_nodes(data_root: str | None, packages: list[str], *, timeout_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run a small task on every node that is alive; address and answer of each. Raises ``ValueError``."""
    inspect = ray.remote(_inspector())
    answers = {}
    for node in [node for node in ray.nodes() if node["Alive"]]:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[inspect.options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(data_root, packages)] = (
            node
        )
    for answer, node in answers.items():
        name = f"node {node['NodeManagerAddress']}"
        try:
            reported = ray.get(answer, timeout=timeout_s)
        except GetTimeoutError as error:
            raise ValueError(
                f"{name} ran no task within {timeout_s:g} s; every node of the cluster must be able to"
            ) from error
        except RayError as error:
            # The task asks for no resources, so what cannot be scheduled has no node; Ray's list of nodes may follow later.
            if isinstance(error, NodeDiedError | TaskUnschedulableError) or not _alive(node["NodeID"]):
                continue  # it has left the cluster meanwhile; an error follows where the run needs it
            raise ValueError(f"{name} cannot run a task: {str(error).strip().splitlines()[-1]}") from error
        yield node["NodeManagerAddress"], reported


def check_versions(versions: Mapping[str, str]) -> None:
    """Raise ``ValueError`` where this process, on a node that has joined later, has other versions."""
    name = f"node {ray.util.get_node_ip_address()}"
    _compare(name, versions_here() | {"data_root": True}, None, versions)


def _compare(name: str, reported: Mapping[str, Any], data_root: str | None, versions: Mapping[str, str]) -> None:
    for package, required in versions.items():
        installed = reported[package]
        if installed is None:
            raise ValueError(f"{name} lacks {package}; every node needs version {required}")
        if _public(installed) != _public(required):
            raise ValueError(
                f"{name} has {package} {installed}, and this machine has {required}; they must be the same"
            )
    if data_root is not None and not reported["data_root"]:
        raise ValueError(f"data.root is {data_root!r}, which is not a folder on {name}; every node needs it")


def _alive(node: str) -> bool:
    """Whether a node, by its id, is still part of the cluster."""
    return any(entry["Alive"] for entry in ray.nodes() if entry["NodeID"] == node)


def _public(version: str) -> str:
    """A version without the label of its build."""
    return version.partition("+")[0]


def _inspector() -> Any:
    """The task. A nested function is sent by value, so that it runs on nodes without this package."""

    numerics = inspector()

    def inspect(data_root: str | None, packages: list[str]) -> dict[str, Any]:
        import os
        import platform
        from importlib import metadata

        found: dict[str, Any] = {"data_root": data_root is None or os.path.isdir(data_root), "numerics": numerics()}
        for package in packages:
            if package == "python":
                found[package] = ".".join(platform.python_version_tuple()[:2])
                continue
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                found[package] = None
        return found

    return inspect
