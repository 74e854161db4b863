from collections.abc import Iterator
from pathlib import Path

import pytest
from fedbonsai.clusters.processor import emulates_bf16, numerics_here
from fedbonsai.clusters.ray_backend.checks import check_nodes, nodes_emulating_bf16, versions_here
from fedbonsai.clusters.ray_backend.ray_cluster import start_local


@pytest.fixture(scope="module", autouse=True)
def cluster(own_ray: None) -> Iterator[None]:
    with start_local(num_cpus=1, object_store_bytes=80 * 1024**2):
        yield


def test_a_node_with_the_versions_of_this_machine_passes(tmp_path: Path) -> None:
    versions = versions_here()
    assert set(versions) == {"python", "ray", "torch", "fedbonsai"}
    check_nodes(data_root=str(tmp_path), versions=versions)
    check_nodes(data_root=None, versions=versions)


def test_nodes_without_bf16_instructions_are_named() -> None:
    assert nodes_emulating_bf16() == (["127.0.0.1"] if emulates_bf16(numerics_here()) else [])


def test_the_label_of_a_build_may_differ() -> None:
    check_nodes(data_root=None, versions={"torch": versions_here()["torch"].partition("+")[0] + "+another"})


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        (
            {"ray": "1.0.0"},
            f"node 127.0.0.1 has ray {versions_here()['ray']}, and this machine has 1.0.0; they must be the same",
        ),
        (
            {"python": "2.7"},
            f"node 127.0.0.1 has python {versions_here()['python']}, and this machine has 2.7; they must be the same",
        ),
        ({"no-such-package": "3"}, "node 127.0.0.1 lacks no-such-package; every node needs version 3"),
    ],
)
def test_a_version_that_differs(versions: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_nodes(data_root=None, versions=versions)
    assert str(caught.value) == sentence


def test_a_missing_data_root(tmp_path: Path) -> None:
    root = str(tmp_path / "absent")
    with pytest.raises(ValueError) as caught:
        check_nodes(data_root=root, versions=versions_here())
    assert str(caught.value) == f"data.root is {root!r}, which is not a folder on node 127.0.0.1; every node needs it"
