"""The state of a device's end of its link: named arrays and back, models by name, and what remains after a fold."""

import copy

import numpy as np
import pytest
from fedbonsai.comms.codec import NO_CONTEXT
from fedbonsai.comms.errors import OutOfSync
from fedbonsai.comms.links.memory import DeviceEnd, LinkMemory
from fedbonsai.comms.links.state import (
    copy_state,
    from_state,
    models_only,
    named_models,
    seal_named,
    settled,
    split_held,
    state_bytes,
    to_state,
)
from fedbonsai.comms.packet import PacketKind, Stamp, seal

from ..fakes import Halve
from .test_memory import ENDS, assert_same_end, named


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_an_end_is_restored_from_its_state(end: DeviceEnd) -> None:
    assert_same_end(from_state(to_state(end)), end)
    assert_same_end(from_state(copy_state(to_state(end))), end)


def test_no_state_is_an_empty_end() -> None:
    assert_same_end(from_state(None), DeviceEnd())


def test_a_state_is_named_arrays_and_counts_its_bytes() -> None:
    state = to_state(ENDS["pending without a model"])
    assert set(state) == {"head"} | {f"{group}/{name}" for group in ("model0", "pending_error") for name in named(0)}
    # 2 float32, one float64, nothing, 2 float16: 20 bytes, twice
    assert state_bytes(state) == state["head"].nbytes + 2 * 20


def test_a_copied_state_owns_its_memory() -> None:
    store = np.arange(8, dtype="<f4")
    state = {"view": store[2:4], "own": np.ones(2)}
    copied = copy_state(state)
    assert copied["own"] is state["own"]
    store[:] = 0
    assert copied["view"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("head", None),
        ("head", np.zeros(0, np.uint8)),
        ("head", np.frombuffer(b"\xc1", np.uint8)),
        ("head", np.frombuffer(b"\x01", np.uint8)),
    ],
    ids=["missing", "empty", "never used in msgpack", "no map"],
)
def test_a_damaged_head_is_out_of_sync(key: str, array: np.ndarray | None) -> None:
    state = {name: value for name, value in to_state(ENDS["all"]).items() if name != key}
    with pytest.raises(OutOfSync, match="the state of the device's end of its link cannot be read"):
        from_state(state if array is None else state | {key: array})


@pytest.mark.parametrize("group", ["model1", "base2", "local0", "pending_base", "pending_local"])
def test_a_state_that_lacks_a_group_is_out_of_sync(group: str) -> None:
    state = {name: array for name, array in to_state(ENDS["all"]).items() if not name.startswith(f"{group}/")}
    with pytest.raises(OutOfSync, match=group):
        from_state(state)


def test_a_model_of_which_the_state_holds_the_name_comes_from_its_packet() -> None:
    end = ENDS["all"]
    first, second = end.memory.models
    state = to_state(end, named=[second.name])
    assert named_models(state) == (second.name,)
    assert not [name for name in state if name.startswith("model1/")]
    assert [name for name in state if name.startswith("model0/")]
    found = from_state(state, [seal_named(second)])
    assert_same_end(found, end)
    for packets in ([], [seal_named(first)], [seal_named(second)[:-1]]):
        with pytest.raises(OutOfSync, match="cannot be read"):
            from_state(state, packets)


def test_packets_of_named_models_are_split_from_others() -> None:
    other, _ = seal(named(1), codec=Halve(), context=NO_CONTEXT, stamp=Stamp(kind=PacketKind.WEIGHTS))
    held = seal_named(ENDS["models"].memory.models[0])
    damaged = held[:-1]
    assert split_held([other, held, damaged]) == ([held, damaged], [other])
    assert split_held([]) == ([], [])


def test_models_that_no_state_names_are_refused() -> None:
    model = ENDS["models"].memory.models[0]
    for state in (None, to_state(DeviceEnd()), to_state(ENDS["models"])):
        with pytest.raises(OutOfSync, match="names"):
            from_state(state, [seal_named(model)])


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("folded", [0, 5, 2**63])
def test_a_settled_state_is_that_of_an_end_that_has_acknowledged(end: DeviceEnd, folded: int) -> None:
    acknowledged = copy.deepcopy(end)
    acknowledged.acknowledge(folded)
    names = [model.name for model in end.memory.models]
    packets = [seal_named(model) for model in end.memory.models]
    found = settled(to_state(end, named=names), before=None, folded=folded)
    assert_same_end(from_state(found, packets), acknowledged)
    without = settled(to_state(end, named=names, error=False), before=to_state(end), folded=folded)
    assert {name: a.tobytes() for name, a in without.items()} == {name: a.tobytes() for name, a in found.items()}


def test_a_state_to_evaluate_holds_the_models_alone() -> None:
    end = ENDS["all"]
    first, second = end.memory.models
    found = models_only(to_state(end, named=[second.name]))
    assert_same_end(from_state(found, [seal_named(second)]), DeviceEnd(memory=LinkMemory([first, second])))


@pytest.mark.parametrize("function", [named_models, models_only, lambda state: settled(state, before=None, folded=1)])
def test_a_damaged_head_is_noticed_by_every_reader(function) -> None:
    with pytest.raises(OutOfSync, match="cannot be read"):
        function({"head": np.zeros(3, np.uint8)})
