"""Whole runs over links with memory in which devices hold narrow parts, whose channels change."""

from dataclasses import dataclass
from typing import Any

import fedbonsai
import pytest
from fedbonsai.comms.codec import CodecSpec
from fedbonsai.comms.links.predict import Residual
from fedbonsai.policies.policy import NEEDS_PLANS, chain
from fedbonsai.policies.pruning.width import Width
from fedbonsai.policies.selection.plain import RandomCohort
from fedbonsai.runtime.events import PlanEnded
from msgspec.structs import replace

# Updates arrive in the same order whatever their sizes: six speeds, and fast links.
LINK = {"memory_bytes": 10**9, "up_bytes_per_s": 10**10, "down_bytes_per_s": 10**10}
FLEET = {"classes": [{"name": f"c{i}", "flop_per_s": 1e9 / 20**i} | LINK for i in range(6)]}
WIDTHS = {f"c{i}": [1.0, 0.5, 0.25][i % 3] for i in range(6)}
BASE = {"backend": "inline", "seed": 5, "fleet": FLEET, "server": {"statistics": "batch"}}
LZ4 = (CodecSpec("lz4"),)


@dataclass(frozen=True)
class Linked:
    """Links and codecs for the plans of the policies before it."""

    down: Residual | None
    up: Residual | None
    codecs: tuple[CodecSpec, ...] = ()
    needs = NEEDS_PLANS

    def init(self) -> None:
        return None

    def decide(self, view: Any, state: None, decision: Any) -> tuple[Any, None]:
        links = {"link_down": self.down, "link_up": self.up, "codec_down": self.codecs, "codec_up": self.codecs}
        return replace(decision, plans=tuple(replace(plan, **links) for plan in decision.plans)), None


def width(channels: str, *, refresh: int = 1, widths: dict[str, float] = WIDTHS) -> Width:
    return Width(rule="fixed", widths=widths, channels=channels, refresh=refresh, warm_up=0, min_channels=2)


def finished(*, chained: Any = None, rounds: int = 4, **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    run = fedbonsai.run(BASE | {"stop": {"rounds": rounds}} | changes, policy=chained)
    events = list(run)
    return run.summary, events


def bits(rule: str) -> Residual:
    return Residual(rule=rule, arithmetic="bits")


@pytest.mark.parametrize(
    ("channels", "cohort"),
    [
        ("rolling", 0.5),
        ("l1", 1.0),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in (("rolling", 1.0), ("l1", 0.5))),
    ],
)
def test_lossless_residuals_of_narrow_parts_equal_dense_links_bit_for_bit(channels: str, cohort: float) -> None:
    before = [RandomCohort(cohort=cohort), width(channels)]
    dense, _ = finished(chained=chain(*before))
    patched = set()
    for down, up in (("stationary", "delta"), ("stationary", "drift"), ("half_step", "half_step")):
        for codecs in ((), LZ4):
            found, _ = finished(chained=chain(*before, Linked(bits(down), bits(up), codecs)))
            assert found["model_hash"] == dense["model_hash"]
            assert found["outcomes"]["failed"] == found["outcomes"]["rejected"] == 0
            patched |= {(down, bool(codecs))} if "patch" in found["down_by_kind"] else set()
    assert patched == {("stationary", True), ("half_step", True), ("half_step", False)}  # else dense models are shorter
    for alone in ({"down": None, "up": bits("drift")}, {"down": bits("stationary"), "up": None}):
        assert finished(chained=chain(*before, Linked(**alone)))[0]["model_hash"] == dense["model_hash"]


def chain_of(*behind: dict[str, Any]) -> list[dict[str, Any]]:
    narrow = {"name": "width", "rule": "fixed", "widths": WIDTHS, "channels": "l1", "refresh": 2, "warm_up": 0}
    return [{"name": "random", "cohort": 1.0}, narrow | {"min_channels": 2}, *behind]


def test_narrow_devices_over_lossy_links_need_no_resynchronisation() -> None:
    """The patches of six rounds, in which the channels change twice, are far smaller than one dense round."""
    dense, _ = finished(rounds=6, policy=chain_of())
    sparse, events = finished(rounds=6, policy=chain_of({"name": "residuals"}))
    assert sparse["resyncs"] == 0
    assert sparse["outcomes"]["done"] == 36
    down = sparse["down_by_kind"]
    assert set(down) == {"agreed", "control", "map", "patch", "weights"}
    assert 0 < down["patch"] < dense["down_by_kind"]["weights"] / 6
    ended = [event.report for event in events if isinstance(event, PlanEnded)]
    assert sum(report.virtual.down_bytes for report in ended) == sum(down.values()) - down["control"]
    assert sum(report.virtual.up_bytes for report in ended) == sparse["up_by_kind"]["weights"]


@pytest.mark.soak
@pytest.mark.ray
def test_in_process_and_on_ray_the_bits_are_equal(shared_ray: Any) -> None:
    policy = chain_of({"name": "residuals"})
    here, _ = finished(policy=policy)
    there, _ = finished(policy=policy, backend="ray", workers=2)
    for name in ("model_hash", "down_by_kind", "up_by_kind", "resyncs"):
        assert there[name] == here[name]


def test_families_of_models_over_links_with_memory() -> None:
    """Each class has its own family: first the dense part, then residuals; the families' tensors are trained."""
    fleet = {
        "classes": [{**each, "model": "small" if number % 2 else ""} for number, each in enumerate(FLEET["classes"])]
    }
    summary, _ = finished(rounds=3, fleet=fleet, models={"small": {"name": "digits_cnn"}}, preset="resfed")
    assert summary["resyncs"] == 0
    assert summary["outcomes"]["done"] == 18
    assert summary["down_by_kind"]["agreed"] == 3 * 64
