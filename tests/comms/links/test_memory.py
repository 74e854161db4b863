"""The memory of one end of a link: as named arrays, its length, and when it advances."""

import numpy as np
import pytest
from fedbonsai.comms.codec import Arrays
from fedbonsai.comms.links.memory import (
    FORGET,
    WHOLE,
    DeviceEnd,
    HeldModel,
    LinkMemory,
    PendingUpdate,
    SentUpdate,
    history_lengths,
)
from fedbonsai.comms.links.predict import Residual, RuleName, hash_arrays


def named(value: float) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Tensors of unusual kinds: no dimension, no entry, a name with a slash, half precision."""
    return {
        "block/conv.weight": np.full((2, 1), value, "<f4"),
        "scale": np.array(-value, "<f8"),
        "none": np.zeros((0, 3), "<f4"),
        "half": np.full(2, value, "<f2"),
    }


def memory(models: int, sent: int) -> LinkMemory:
    return LinkMemory(
        models=[HeldModel.of(10 + i, named(i)) for i in range(models)],
        sent=[SentUpdate(base=named(20 + i), local=named(30 + i)) for i in range(sent)],
    )


def assert_same(found: Arrays, wanted: Arrays) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def assert_same_end(found: DeviceEnd, wanted: DeviceEnd) -> None:
    ours, theirs = found.memory, wanted.memory
    assert [(m.version, m.hash) for m in ours.models] == [(m.version, m.hash) for m in theirs.models]
    for model, other in zip(ours.models, theirs.models, strict=True):
        assert_same(model.arrays, other.arrays)
    for sent, other_sent in zip(ours.sent, theirs.sent, strict=True):
        assert_same(sent.base, other_sent.base)
        assert_same(sent.local, other_sent.local)
    assert_same(found.error, wanted.error)
    assert (found.pending is None) == (wanted.pending is None)
    if found.pending is not None and wanted.pending is not None:
        assert found.pending.plan == wanted.pending.plan
        assert_same(found.pending.error, wanted.pending.error)
        assert (found.pending.sent is None) == (wanted.pending.sent is None)
        if found.pending.sent is not None and wanted.pending.sent is not None:
            assert_same(found.pending.sent.base, wanted.pending.sent.base)
            assert_same(found.pending.sent.local, wanted.pending.sent.local)


ENDS = {
    "empty": DeviceEnd(),
    "models": DeviceEnd(memory=memory(2, 0)),
    "all": DeviceEnd(
        memory=memory(2, 3),
        error=named(7),
        pending=PendingUpdate(2**63, SentUpdate(named(1), named(2)), error=named(8)),
    ),
    "pending without a model": DeviceEnd(memory=memory(1, 0), pending=PendingUpdate(5, None, error=named(8))),
    "pending without an error": DeviceEnd(
        memory=memory(1, 1), pending=PendingUpdate(5, SentUpdate(named(1), named(2)), error={})
    ),
    # (Two digits: model10 must not be taken for model1.)
    "long": DeviceEnd(memory=memory(11, 11)),
}


def test_a_model_has_the_hash_of_its_arrays() -> None:
    assert HeldModel.of(3, named(1)).hash == hash_arrays(named(1)) != HeldModel.of(3, named(2)).hash


@pytest.mark.parametrize(
    ("down", "up", "models", "sent"),
    [
        (None, None, 1, 0),
        ("stationary", None, 1, 0),
        ("half_step", None, 1, 2),
        ("second_order", None, 2, 3),
        (None, "delta", 1, 0),
        (None, "drift", 1, 1),
        (None, "stationary", 1, 1),
        (None, "half_step", 1, 1),
        (None, "second_order", 1, 2),
        ("stationary", "second_order", 1, 2),
        ("half_step", "second_order", 1, 2),
        ("second_order", "delta", 2, 3),
    ],
)
def test_histories_are_as_long_as_the_rules_need(
    down: RuleName | None, up: RuleName | None, models: int, sent: int
) -> None:
    rules = Residual(rule=down) if down else None, Residual(rule=up) if up else None
    assert history_lengths(*rules) == (models, sent)
    trimmed, whole = memory(5, 5), memory(5, 5)
    trimmed.trim(*rules)
    assert [m.version for m in trimmed.models] == [m.version for m in whole.models[5 - models :]]
    assert [s.local["half"][0] for s in trimmed.sent] == [s.local["half"][0] for s in whole.sent[5 - sent :]]


def test_trimming_does_not_change_a_short_history() -> None:
    short = memory(1, 1)
    short.trim(Residual(rule="second_order"), Residual(rule="second_order"))
    assert (len(short.models), len(short.sent)) == (1, 1)


def test_predictions_from_a_memory_by_hand() -> None:
    ends = LinkMemory(
        models=[HeldModel.of(1, {"w": np.float32([10])}), HeldModel.of(2, {"w": np.float32([14])})],
        sent=[
            SentUpdate({"w": np.float32([10])}, {"w": np.float32([3])}),
            SentUpdate({"w": np.float32([14])}, {"w": np.float32([8])}),
        ],
    )
    # Down: own 10, 14 and other 3, 8: 14 + (8 - 3) / 2. Up, from a base of 20: own 3, 8 and other 10, 14, 20:
    # half_step 8 + (20 - 14) / 2, drift 20 + (8 - 14) / 2.
    assert ends.predict_down(Residual(rule="half_step"), ["w"])["w"].tolist() == [16.5]
    base = {"w": np.float32([20])}
    assert ends.predict_up(Residual(rule="half_step"), base, ["w"])["w"].tolist() == [11]
    assert ends.predict_up(Residual(rule="drift"), base, ["w"])["w"].tolist() == [17]
    assert ends.predict_up(Residual(rule="delta"), base, ["w"])["w"] is base["w"]


def pending_end(sent: SentUpdate | None = None) -> DeviceEnd:
    return DeviceEnd(memory=memory(1, 1), error=named(6), pending=PendingUpdate(4, sent, error=named(7)))


def test_a_folded_update_becomes_history() -> None:
    sent = SentUpdate(named(1), named(2))
    end = pending_end(sent)
    end.acknowledge(4)
    assert end.pending is None
    assert end.memory.sent[-1] is sent
    assert_same(end.error, named(7))


@pytest.mark.parametrize("plan", [0, 3, 5])
def test_an_update_that_was_not_folded_is_dropped(plan: int) -> None:
    end = pending_end(SentUpdate(named(1), named(2)))
    end.acknowledge(plan)
    assert end.pending is None
    assert len(end.memory.sent) == 1
    assert_same(end.error, named(6))


def test_a_folded_update_that_no_rule_needs_leaves_only_its_error() -> None:
    end = pending_end()
    end.acknowledge(4)
    assert len(end.memory.sent) == 1
    assert_same(end.error, named(7))


def test_acknowledging_without_a_pending_update_changes_nothing() -> None:
    end = DeviceEnd(memory=memory(1, 1), error=named(6))
    end.acknowledge(4)
    assert_same_end(end, DeviceEnd(memory=memory(1, 1), error=named(6)))


def test_forgetting_drops_the_histories_and_keeps_the_error() -> None:
    end = pending_end(SentUpdate(named(1), named(2)))
    end.acknowledge(FORGET)
    assert_same_end(end, DeviceEnd(error=named(6)))


def test_a_restart_drops_the_histories_and_keeps_the_error() -> None:
    end, model = pending_end(), HeldModel.of(9, named(3))
    end.move(WHOLE, None, LinkMemory(models=[model]))
    assert end.memory.models == [model]
    assert not end.memory.sent
    assert_same(end.error, named(6))
