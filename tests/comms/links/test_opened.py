"""Residuals that a worker has opened: how far they lead, and which models are kept."""

import numpy as np
import pytest
from fedbonsai.comms.links.memory import HeldModel
from fedbonsai.comms.links.opened import Key, OpenedResiduals


def model(version: int) -> HeldModel:
    """Twenty bytes; its hash is ten times its version."""
    return HeldModel(version, 10 * version, {"w": np.full(5, version, "<f4")})


def key(version: int) -> Key:
    return (f"residual to {version}",)


@pytest.fixture(name="opened")
def opened_fixture() -> OpenedResiduals:
    """Residuals from version 1 to 2, 3, 4 and 5; room for two models."""
    opened = OpenedResiduals(most_bytes=40)
    for version in range(2, 6):
        opened.add(key(version), 10 * (version - 1), model(version))
    return opened


@pytest.mark.parametrize(
    ("start", "versions", "known", "reached"),
    [
        (1, (2, 3, 4, 5), 4, 5),  # also past models that were dropped
        (4, (5,), 1, 5),
        (2, (3, 4), 2, 4),
        (2, (3,), 0, None),  # known, but its model was dropped
        (3, (4, 5, 6), 2, 5),  # the last one is new
        (1, (3, 4, 5), 0, None),  # builds on another model
        (2, (3, 5), 0, None),  # has a gap
        (5, (6,), 0, None),
    ],
)
def test_known_residuals_lead_to_the_farthest_model_that_was_kept(
    opened: OpenedResiduals, start: int, versions: tuple[int, ...], known: int, reached: int | None
) -> None:
    count, found = opened.reach(10 * start, [key(version) for version in versions])
    assert (count, found.version if found is not None else None) == (known, reached)


def test_the_model_that_was_used_last_is_kept(opened: OpenedResiduals) -> None:
    opened.reach(30, [key(4)])
    opened.add(key(6), 50, model(6))
    assert opened.reach(30, [key(4)])[0] == 1
    assert opened.reach(40, [key(5)])[0] == 0


def test_the_newest_model_is_kept_whatever_its_size() -> None:
    opened = OpenedResiduals(most_bytes=1)
    for version in (2, 3):
        opened.add(key(version), 10 * (version - 1), model(version))
    assert opened.reach(10, [key(2), key(3)])[0] == 2
    assert opened.reach(10, [key(2)])[0] == 0


def test_kept_models_cannot_be_written_to(opened: OpenedResiduals) -> None:
    _, found = opened.reach(40, [key(5)])
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found.arrays["w"][0] = 1
