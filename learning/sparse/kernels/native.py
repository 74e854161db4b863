"""The native library: built once on a machine, and then loaded by every process.

The operators are ``torch.ops.fedbonsai_sparse.*``, which exist in a process after ``load`` or ``build`` has returned None.
The library is compiled for the machine's own vector instructions, or for those that torch is limited to
(``ATEN_CPU_CAPABILITY``). Its file is named by all that it depends on, so a change of torch, processor, compiler or source
leads to another build. Processes that build at the same time each have a folder of their own, and the finished file takes
its place by one rename. A process loads one library: the first one, since operators cannot be defined twice.

``torch.utils.cpp_extension`` builds, in a process of its own: it loads what it has built, from where that cannot stay.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

NAME = "fedbonsai_sparse"
SOURCE = Path(__file__).parent / "source"
BUILD = "import json, sys; from torch.utils.cpp_extension import load; load(**json.loads(sys.argv[1]))"


def cache_folder() -> Path:
    """Where libraries are kept unless the caller names a folder: ``fedbonsai/kernels`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedbonsai" / "kernels"


def load(folder: Path | None = None) -> str | None:
    """Load a library that ``build`` has left in ``folder``; takes milliseconds, and never compiles.

    Returns None, or the sentence that says why there is none.
    """
    compiler = _compiler()
    if compiler is None:
        return _no_compiler()
    path = _path(folder or cache_folder(), compiler)
    if not path.exists():
        return f"the native kernels have not been built on this machine ({path.name} is not in {path.parent})"
    if hasattr(torch.ops.fedbonsai_sparse, "scan_rows"):
        return None
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the native kernels cannot be loaded: {error}"
    return None


def build(folder: Path | None = None) -> str | None:
    """Load the library; build it first, about 15 s on one core, if ``folder`` has none for this machine.

    Returns None, or the sentence that says why it cannot be had.
    """
    compiler = _compiler()
    if compiler is None:
        return _no_compiler()
    path = _path(folder or cache_folder(), compiler)
    if not path.exists():
        if not shutil.which("ninja"):
            return "the native kernels need ninja, which was not found (pip install ninja)"
        if reason := _compile(path):
            return f"the native kernels could not be built: {reason}"
    return load(folder)


def _compile(path: Path) -> str | None:
    """Build in a folder of this process's own, and move the library to ``path``; returns None, or what went wrong."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as own:
            settings = {
                "name": NAME,
                "sources": [str(source) for source in sorted(SOURCE.glob("*.cpp"))],
                "extra_cflags": ["-O3", *_vector_flags()],
                "build_directory": own,
                "is_python_module": False,
            }
            command = [sys.executable, "-c", BUILD, json.dumps(settings)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                return _error_line(result.stdout + result.stderr)
            os.replace(Path(own) / f"{NAME}.so", path)
    except OSError as error:
        return str(error)
    return None


def _compiler() -> Path | None:
    """The C++ compiler that torch's builder uses."""
    found = shutil.which(os.environ.get("CXX") or "c++")
    return Path(found).resolve() if found else None


def _no_compiler() -> str:
    return f"the native kernels need a C++ compiler, and {os.environ.get('CXX') or 'c++'} was not found (CXX names another)"


def _vector_flags() -> list[str]:
    """The machine's instructions, without AVX-512 where torch goes without it."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    narrow = is_x86 and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return ["-march=native", *(["-mno-avx512f"] if narrow else [])]


def _path(folder: Path, compiler: Path) -> Path:
    status = compiler.stat()
    parts = [
        torch.__version__,
        _processor(),
        str(compiler),
        str(status.st_size),
        str(status.st_mtime_ns),
        *_vector_flags(),
    ]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(SOURCE.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return folder / f"{NAME}-{digest.hexdigest()[:24]}.so"


def _processor() -> str:
    """The processor's instruction sets; elsewhere than on Linux, its name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    model = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    found = [match[1].strip() for match in (model, flags) if match]
    return " ".join([platform.machine(), *(found or [platform.processor()])])


def _error_line(text: str) -> str:
    """The compiler's first error line, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "no message")
