import pytest
from fedbonsai.clusters.processor import emulates_bf16, numerics_here, tell_apart


def test_numerics_of_this_machine(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    found = numerics_here()
    assert list(found) == ["processor", "torch", "numpy"]
    assert found["torch"][0].isdigit()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert "ATEN_CPU_CAPABILITY=default" in numerics_here()["processor"]


@pytest.mark.parametrize(
    ("processor", "emulates"),
    [
        ("x86_64 avx avx2 fma avx512f", True),
        ("x86_64 avx avx2 fma avx512f avx512_bf16", False),
        ("x86_64 avx2 amx_bf16 ATEN_CPU_CAPABILITY=default", False),
        ("aarch64 asimd", True),
        ("aarch64 asimd bf16", False),
        ("arm64", False),  # a system that does not tell: nothing is known
        ("x86_64 ONEDNN_MAX_CPU_ISA=AVX2", False),
    ],
)
def test_processors_that_emulate_bf16(processor, emulates):
    assert emulates_bf16({"processor": processor}) == emulates


def test_a_notice_only_where_nodes_differ():
    old, new = {"processor": "x86_64 avx2", "numpy": "2.4"}, {"processor": "x86_64 avx2 avx512f", "numpy": "2.4"}
    assert tell_apart({"10.0.0.1": old, "10.0.0.2": dict(old)}) == tell_apart({}) == []
    assert tell_apart({"10.0.0.1": old, "10.0.0.2": new, "10.0.0.3": old}) == [
        "the nodes are of 2 kinds, between which results differ in the last bits, so the model depends on where each plan "
        "runs: 10.0.0.1, 10.0.0.3: processor x86_64 avx2, numpy 2.4; 10.0.0.2: processor x86_64 avx2 avx512f, numpy 2.4"
    ]
