import subprocess
import sys
import time

import pytest
import torch
from fedbonsai.learning.sparse.kernels import native

from ....runtime.processes import LIMIT_S


def test_without_a_compiler_the_reason_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for find in (native.load, native.build):
        reason = find(tmp_path)
        assert reason == (
            "the native kernels need a C++ compiler, and no-such-compiler was not found (CXX names another)"
        )
    assert not list(tmp_path.iterdir())


def test_without_ninja_the_reason_says_so(monkeypatch, tmp_path) -> None:
    if native._compiler() is None:
        pytest.skip("no compiler")
    monkeypatch.setenv("CXX", str(native._compiler()))  # a full path
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.build(tmp_path) == "the native kernels need ninja, which was not found (pip install ninja)"


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-c*) echo "x.cpp:1: error: nothing works" >&2; exit 1;; esac\necho 12.2.0\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    reason = native.build(tmp_path / "cache")
    assert reason is not None
    if "ninja" not in reason:
        assert reason == "the native kernels could not be built: x.cpp:1: error: nothing works"
        assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    reason = native.build(tmp_path / "file" / "cache")
    assert reason is not None
    if "compiler" not in reason and "ninja" not in reason:
        assert str(tmp_path / "file") in reason


def test_loading_does_not_build(tmp_path) -> None:
    reason = native.load(tmp_path)
    assert reason is not None
    if native._compiler() is not None:
        assert reason.startswith("the native kernels have not been built on this machine")
    assert not list(tmp_path.iterdir())


def test_importing_neither_builds_nor_loads() -> None:
    code = """
import sys, torch
import fedbonsai.learning.sparse.kernels.measure
assert "torch.utils.cpp_extension" not in sys.modules
assert not hasattr(torch.ops.fedbonsai_sparse, "convolve")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)


@pytest.mark.usefixtures("native_library")
def test_loading_again_is_quick_and_harmless() -> None:
    begun = time.perf_counter()
    assert native.load() is None
    assert native.build() is None
    assert time.perf_counter() - begun < 1.0
    assert torch.ops.fedbonsai_sparse.scan_rows(torch.eye(2), 0.5)[1].tolist() == [0, 1]


TINY = """
#include <torch/library.h>
static int64_t count(int64_t n) { return n + 1; }
TORCH_LIBRARY(fedbonsai_sparse, library) {
  library.def("count(int n) -> int", count);
  library.def("scan_rows(int n) -> int", count);
}
"""


@pytest.mark.soak  # two compilers
@pytest.mark.usefixtures("native_library")
def test_processes_that_build_at_the_same_time_all_have_a_library(tmp_path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    (source / "tiny.cpp").write_text(TINY)  # the library's own sources take the compiler twice as long
    code = """
import sys, torch
from pathlib import Path
from fedbonsai.learning.sparse.kernels import native
native.SOURCE = Path(sys.argv[1])
assert native.build(Path(sys.argv[2])) is None
assert native.load(Path(sys.argv[2])) is None
print(torch.ops.fedbonsai_sparse.count(3))
"""
    command = [sys.executable, "-c", code, str(source), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=LIMIT_S)[0] for process in running] == ["4\n"] * 2
    assert [path.suffix for path in cache.iterdir()] == [".so"]
