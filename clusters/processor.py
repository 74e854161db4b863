"""The properties of a machine on which the bits of a result depend: vector units and builds of the numerical libraries.

Kernels are chosen by vector unit, and each sums in an order of its own, so float32 results agree bit for bit only between
machines where all of these are the same.
"""

from collections.abc import Mapping
from typing import Any

_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of processors with bf16 instructions
# Environment variables that restrict the kernels from which torch and oneDNN choose.
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def numerics_here() -> dict[str, str]:
    """Processor and library builds of this process, each as one short text."""
    numerics: dict[str, str] = inspector()()
    return numerics


def emulates_bf16(numerics: Mapping[str, str]) -> bool:
    """Whether a processor, of which ``numerics_here`` gave ``numerics``, lacks bf16 instructions; no if that is not known."""
    _, *words = numerics["processor"].split()
    instructions = {word for word in words if "=" not in word}
    return bool(instructions) and not instructions & _BF16


def tell_apart(nodes: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A notice where ``nodes`` (numerics by address) differ; an empty list where all agree."""
    kinds: dict[str, list[str]] = {}
    for address, numerics in nodes.items():
        kinds.setdefault(", ".join(f"{name} {value}" for name, value in numerics.items()), []).append(address)
    if len(kinds) < 2:
        return []
    listed = "; ".join(f"{', '.join(addresses)}: {kind}" for kind, addresses in kinds.items())
    return [
        f"the nodes are of {len(kinds)} kinds, between which results differ in the last bits, so the model depends on where "
        f"each plan runs: {listed}"
    ]


def inspector() -> Any:
    """The function behind ``numerics_here``. A nested function is sent to other nodes by value, without this package."""
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
