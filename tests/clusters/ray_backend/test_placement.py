"""Bundles that are placed independently, and the sentence where one cannot be placed."""

import re
from collections.abc import Iterator

import pytest
import ray
from fedbonsai.clusters.ray_backend import placement
from fedbonsai.clusters.ray_backend.nodes import cluster_nodes
from fedbonsai.clusters.ray_backend.placement import NODE_ID, Request, Reservation, is_placed
from fedbonsai.clusters.ray_backend.ray_cluster import start_local


@pytest.fixture(scope="module", autouse=True)
def cluster(own_ray: None) -> Iterator[None]:
    """One node: 2 CPU, one jetson."""
    with start_local(num_cpus=2, object_store_bytes=80 * 1024**2, resources={"jetson": 1}):
        yield


def requests(*bundles: dict[str, float]) -> list[Request]:
    """The first one is the server's."""
    return [Request("worker" if index else "server", bundle) for index, bundle in enumerate(bundles)]


@pytest.fixture
def reserve() -> Iterator[list[Reservation]]:
    """Reservations, which are released."""
    made: list[Reservation] = []
    yield made
    for each in made:
        each.close()


@pytest.mark.parametrize(
    "bundles",
    [
        [{"CPU": 1.0}, {"CPU": 0.5}],
        [{"CPU": 1.0, "jetson": 1.0}],
        [{"CPU": 0.1}] + [{"CPU": 1.9 / 19}] * 19,  # 2 CPU, but for the rounding of floats
    ],
)
def test_bundles_that_fit_are_reserved(bundles: list[dict[str, float]], reserve: list[Reservation]) -> None:
    reserve.append(Reservation(requests(*bundles)))
    assert list(reserve[0].wait(timeout_s=0)) == []
    assert [is_placed(group) for group in reserve[0].groups] == [True] * len(bundles)
    assert reserve[0].explain() == ""
    assert {group.bundle_count for group in reserve[0].groups} == {1}


@pytest.mark.parametrize(
    ("bundles", "sentence"),
    [
        (
            [{"CPU": 0.1}, {"CPU": 1.0}, {"CPU": 4.0}],
            "bundle 3 of 3 (worker: 4 CPU) cannot be placed: the largest node has 2 CPU",
        ),
        (
            [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}],
            "bundle 3 of 3 (worker: 1 CPU) cannot be placed: the most that is left on a node, after the others, is 0 CPU",
        ),
        (
            [{"CPU": 1.0, "orin": 1.0}],
            "bundle 1 of 1 (server: 1 CPU, 1 orin) cannot be placed: the largest node has 2 CPU, 0 orin",
        ),
        ([{"memory": 8e15}], "bundle 1 of 1 (server: 8000 TB memory) cannot be placed: the largest node has "),
    ],
)
def test_bundles_that_can_never_fit_are_refused_immediately(
    bundles: list[dict[str, float]], sentence: str, reserve: list[Reservation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "GRACE_S", 1000.0)
    reserve.append(Reservation(requests(*bundles)))
    with pytest.raises(ValueError) as caught:
        list(reserve[0].wait(timeout_s=0))
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).endswith(" (ray.placement_timeout_s is 0)")


def test_resources_that_others_hold_are_awaited_and_then_named(
    reserve: list[Reservation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "GRACE_S", 0.0)
    reserve.append(Reservation(requests({"CPU": 2.0})))
    assert list(reserve[0].wait(timeout_s=30)) == []
    reserve.append(Reservation(requests({"CPU": 1.0})))
    with pytest.raises(ValueError) as caught:
        list(reserve[1].wait(timeout_s=0.5))
    assert str(caught.value) == (
        "bundle 1 of 1 (server: 1 CPU) cannot be placed: the most that is left on a node, after the others, is 0 CPU "
        "(ray.placement_timeout_s is 0.5)"
    )
    reserve[0].close()
    assert list(reserve[1].wait(timeout_s=30)) == []  # it has been asked for all the time


def test_messages_while_waiting(reserve: list[Reservation], monkeypatch: pytest.MonkeyPatch) -> None:
    reserve.append(Reservation(requests({"CPU": 2.0})))
    assert list(reserve[0].wait(timeout_s=30)) == []
    monkeypatch.setattr("fedbonsai.clusters.ray_backend.nodes.FIRST_S", 0.1)
    reserve.append(Reservation(requests({"CPU": 1.0})))
    told = reserve[1].wait(timeout_s=60)
    assert next(told) == (
        "waiting for a place: bundle 1 of 1 (server: 1 CPU) cannot be placed: the most that is left on a node, after the "
        "others, is 0 CPU"
    )
    reserve[0].close()
    assert list(told) == []


def test_waiting_ends_when_enough_bundles_are_placed(
    reserve: list[Reservation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundles are placed independently: one that does not fit delays no other."""
    monkeypatch.setattr(placement, "GRACE_S", 0.5)
    reserve.append(Reservation(requests({"CPU": 0.1}, {"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0})))
    assert list(reserve[0].wait(timeout_s=60, enough=lambda placed: sum(placed) == 2)) == []
    assert sum(is_placed(group) for group in reserve[0].groups) == 2
    assert re.fullmatch(
        r"bundle [234] of 4 \(worker: 1 CPU\) cannot be placed: .* after the others, .*", reserve[0].explain()
    )


def test_nodes_are_kept_free_where_the_others_have_room(reserve: list[Reservation]) -> None:
    (node,) = cluster_nodes()
    assert node.labels[NODE_ID] == node.id
    reserve.append(Reservation(requests({"CPU": 1.0}), keep_off={node.id}))  # there is no other
    assert list(reserve[0].wait(timeout_s=30)) == []
    reserve.append(Reservation([], keep_off={node.id}))
    assert list(reserve[1].wait(timeout_s=0)) == []
    assert ray.cluster_resources()["CPU"] == 2
