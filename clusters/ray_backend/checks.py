"""Is every node fit for the run? Asked once, before round 1: a node that differs would fail later, and with a worse message."""

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..processor import inspector, tell_apart

PACKAGES = ("ray", "torch", "fedbonsai")


def versions_here() -> dict[str, str]:
    """What every node is compared with: Python (major.minor) and the packages that must agree, as this process has them."""
    return {"python": ".".join(platform.python_version_tuple()[:2])} | {
        name: metadata.version(name) for name in PACKAGES
    }


def check_nodes(*, data_root: str | None, versions: Mapping[str, str], timeout_s: float = 60.0) -> list[str]:
    """Run a small task on every node that is alive; raise ``ValueError`` in one sentence, naming node and both values.

    ``data_root``: a folder that must exist on each (None: none is needed). ``versions``: as ``versions_here`` gives them; a
    build's label (``2.13.0+cpu``) may differ. Returns what an operator should know: nodes whose results differ in the last
    bits. Call it while connected.
    """
    inspect = ray.remote(_inspector())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    answers, numerics = {}, dict[str, dict[str, str]]()
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[
            inspect.options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(data_root, list(versions))
        ] = node
    for answer, node in answers.items():
        name = f"node {node['NodeManagerAddress']}"
        try:
            found = ray.get(answer, timeout=timeout_s)
        except GetTimeoutError as error:
            raise ValueError(
                f"{name} ran no task within {timeout_s:g} s; every node of the cluster must be able to"
            ) from error
        except RayError as error:
            if not _alive(node["NodeID"]):
                continue  # it has left meanwhile; what needed it says so
            raise ValueError(f"{name} cannot run a task: {str(error).strip().splitlines()[-1]}") from error
        _compare(name, found, data_root, versions)
        numerics[node["NodeManagerAddress"]] = found["numerics"]
    return tell_apart(numerics)


def check_versions(versions: Mapping[str, str]) -> None:
    """Raise ``ValueError`` where this process has other versions than a node that joins later must have."""
    name = f"node {ray.util.get_node_ip_address()}"
    _compare(name, versions_here() | {"data_root": True}, None, versions)


def _compare(name: str, found: Mapping[str, Any], data_root: str | None, versions: Mapping[str, str]) -> None:
    for package, wanted in versions.items():
        has = found[package]
        if has is None:
            raise ValueError(f"{name} lacks {package}; every node needs version {wanted}")
        if _public(has) != _public(wanted):
            raise ValueError(f"{name} has {package} {has}, and this machine has {wanted}; they must be the same")
    if data_root is not None and not found["data_root"]:
        raise ValueError(f"data.root is {data_root!r}, which is not a folder on {name}; every node needs it")


def _alive(node: str) -> bool:
    """Whether a node, by its id, is still part of the cluster."""
    return any(found["Alive"] for found in ray.nodes() if found["NodeID"] == node)


def _public(version: str) -> str:
    """A version without the label of its build."""
    return version.partition("+")[0]


def _inspector() -> Any:
    """The task. A nested function travels by value, so that it runs where our package is not installed at all."""

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
