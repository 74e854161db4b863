"""What of a machine decides the bits of a result: its processor's vector units, and the builds of the numerical libraries.

Kernels are chosen by vector unit, and each sums in its own order, so float32 results agree bit for bit only between machines
where all of this is the same.
"""

from collections.abc import Mapping
from typing import Any

# Restrict the kernels that torch and oneDNN choose from.
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def numerics_here() -> dict[str, str]:
    """Processor and library builds of this process, each as one short text."""
    found: dict[str, str] = inspector()()
    return found


def tell_apart(nodes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A sentence where ``nodes`` (numerics by address) are of several kinds; none where all agree."""
    kinds: dict[str, list[str]] = {}
    for address, numerics in nodes.items():
        kinds.setdefault(", ".join(f"{name} {value}" for name, value in numerics.items()), []).append(address)
    if len(kinds) < 2:
        return []
    told = "; ".join(f"{', '.join(addresses)}: {kind}" for kind, addresses in kinds.items())
    return [
        f"the nodes are of {len(kinds)} kinds, between which results differ in the last bits, so the model depends on where "
        f"each plan runs: {told}"
    ]


def inspector() -> Any:
    """The function behind ``numerics_here``. A nested function travels to other nodes by value, without our package."""
    limits = _LIMITS

    def inspect() -> dict[str, str]:
        import os
        import platform
        from importlib import metadata

        known = ["avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm", "sve"]
        flags: set[str] = set()
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                for line in file:
                    name, _, value = line.partition(":")
                    if name.strip() in ("flags", "Features"):
                        flags = set(value.split())
                        break
        except OSError:
            known = []  # not Linux: the architecture alone is known
        processor = [platform.machine() or "unknown", *(flag for flag in known if flag in flags)]
        processor += [f"{name}={os.environ[name]}" for name in limits if name in os.environ]
        found = {"processor": " ".join(processor)}
        for package in ("torch", "numpy"):
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                found[package] = "not installed"
        return found

    return inspect
