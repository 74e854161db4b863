from collections.abc import Iterator

import pytest
import ray
from fedbonsai.clusters import placement
from fedbonsai.clusters.placement import make_placement_group
from fedbonsai.clusters.ray_cluster import start_local
from ray.util.placement_group import remove_placement_group


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One node: 2 CPU, one jetson, labelled as a Raspberry Pi 4."""
    with start_local(num_cpus=2, object_store_bytes=80 * 1024**2, resources={"jetson": 1}, labels={"board": "rpi4"}):
        yield


@pytest.mark.parametrize(
    ("bundles", "selectors"),
    [
        ([{"CPU": 1.0}, {"CPU": 0.5}], None),
        ([{"CPU": 1.0, "jetson": 1.0}], None),
        ([{"CPU": 1.0}, {"CPU": 1.0}], [{}, {"board": "rpi4"}]),
        ([{"CPU": 1.0}], [{"board": "in(nano,rpi4)"}]),
        ([{"CPU": 1.0}], [{"board": "!nano"}]),
        ([{"CPU": 0.1}] + [{"CPU": 1.9 / 19}] * 19, None),  # 2 CPU, but for the rounding of floats
    ],
)
def test_what_fits_is_reserved(bundles: list[dict[str, float]], selectors: list[dict[str, str]] | None) -> None:
    group = make_placement_group(bundles, strategy="PACK", timeout_s=0, label_selectors=selectors)
    assert group.bundle_count == len(bundles)
    remove_placement_group(group)


@pytest.mark.parametrize(
    ("bundles", "selectors", "sentence"),
    [
        (
            [{"CPU": 0.1}, {"CPU": 1.0}, {"CPU": 4.0}],
            None,
            "bundle 3 of 3 (worker: 4 CPU) cannot be placed: the largest node has 2 CPU",
        ),
        (
            [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}],
            None,
            "bundle 3 of 3 (worker: 1 CPU) cannot be placed: the most that is left on a node, after the others, is 0 CPU",
        ),
        (
            [{"CPU": 1.0}],
            [{"board": "nano"}],
            "bundle 1 of 1 (server: 1 CPU, board=nano) cannot be placed: no node has these labels",
        ),
        (
            [{"CPU": 1.0, "orin": 1.0}],
            None,
            "bundle 1 of 1 (server: 1 CPU, 1 orin) cannot be placed: the largest node has 2 CPU, 0 orin",
        ),
    ],
)
def test_what_can_never_fit_is_refused_at_once(
    bundles: list[dict[str, float]],
    selectors: list[dict[str, str]] | None,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At once: without asking Ray, which would only wait.
    monkeypatch.delattr(placement, "placement_group")
    names = ["server", *["worker"] * (len(bundles) - 1)]
    with pytest.raises(ValueError) as caught:
        make_placement_group(bundles, strategy="PACK", timeout_s=0, label_selectors=selectors, names=names)
    assert str(caught.value) == f"{sentence} (ray.placement_timeout_s is 0)"


def test_memory_is_named_with_its_unit() -> None:
    with pytest.raises(ValueError, match=r"\(bundle: 8 PB memory\)|\(bundle: 8000 TB memory\)"):
        make_placement_group([{"memory": 8e15}], strategy="PACK", timeout_s=0)


def test_what_others_hold_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "GRACE_S", 0.0)
    held = make_placement_group([{"CPU": 2.0}], strategy="PACK", timeout_s=30)
    with pytest.raises(ValueError) as caught:
        make_placement_group([{"CPU": 1.0}], strategy="PACK", timeout_s=0.5, names=["server"])
    assert str(caught.value) == (
        "bundle 1 of 1 (server: 1 CPU) cannot be placed: the most that is left on a node, after the others, is 0 CPU "
        "(ray.placement_timeout_s is 0.5)"
    )
    remove_placement_group(held)
    remove_placement_group(
        make_placement_group([{"CPU": 2.0}], strategy="PACK", timeout_s=30)
    )  # nothing stayed reserved


def test_what_the_strategy_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "GRACE_S", 0.0)
    with pytest.raises(ValueError, match=r"^2 bundles, from .* cannot be placed together by strategy STRICT_SPREAD"):
        make_placement_group([{"CPU": 0.5}, {"CPU": 0.5}], strategy="STRICT_SPREAD", timeout_s=0.5)
    assert ray.cluster_resources()["CPU"] == 2
