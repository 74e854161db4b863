"""Places: their names, and moves between the channels of a model."""

import numpy as np
import pytest
from fedbonsai.actors.messages.messages import array_specs
from fedbonsai.actors.messages.places import Places, family_of, kept_channels
from fedbonsai.comms.errors import OutOfSync
from fedbonsai.comms.links.memory import WHOLE
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload import Workload
from msgspec.structs import replace

from ..steps import IMAGES

SETTINGS = replace(IMAGES, model=Call("my_models:Small"), models={"twin": Call("my_models:Small")})  # one group of four


def narrow(workload: Workload, width: float = 0.5, **changes: object) -> Part:
    return replace(whole(workload.spec), width=width, **changes)


def test_a_place_is_the_family_and_the_channels() -> None:
    workload = Workload(SETTINGS)
    places = Places(workload)
    assert places.of(whole(workload.spec)) == WHOLE
    assert places.of(narrow(workload)) == b"\0\xc0"  # channels 0 and 1 of four
    assert places.of(narrow(workload, channels="rolling", turn=1)) == b"\0\x60"
    # The same channels by another rule, and all of them, rounded up.
    assert places.of(narrow(workload, 0.3, channels="rolling", turn=4, scaled=True)) == b"\0\xc0"
    assert places.of(narrow(workload, 0.9)) == WHOLE
    assert places.of(replace(whole(workload.spec), model="twin")) == b"twin"
    assert places.of(narrow(workload, model="twin")) == b"twin\0\xc0"
    name = workload.add_map(np.array([True, False, False, True]))
    assert places.of(narrow(workload, channels="l1", index_map=name)) == b"\0\x90"
    assert [kept_channels(place) for place in (WHOLE, b"twin", b"\0\xc0", b"twin\0\x90")] == ["all", "all", "2", "2"]
    assert family_of(b"twin\0\xc0") == b"twin"


def test_channels_of_rules_that_rank_can_be_foreseen() -> None:
    workload = Workload(SETTINGS)
    places = Places(workload, choose=lambda part: np.array([False, True, False, True]))
    assert places.of(narrow(workload, channels="l1")) == b"\0\x50"


def test_moves_by_hand() -> None:
    """Of conv.weight [4, 1, 3, 3] dimension 0 has the channels, of out.weight [3, 64] dimension 1, sixteen columns each."""
    places = Places(Workload(SETTINGS))
    move = places.move(b"\0\xc0", b"\0\x60")
    assert move is not None
    assert move("conv.bias", np.float32([1, 2])).tolist() == [2, 0]
    old = np.arange(3 * 32, dtype="<f4").reshape(3, 32)
    new = move("out.weight", old)
    assert new[:, :16].tolist() == old[:, 16:].tolist()
    assert not new[:, 16:].any()
    bias = np.float32([1, 2, 3])
    assert move("out.bias", bias) is bias
    assert places.move(b"\0\xc0", b"twin\0\xc0") is None
    widened = places.move(b"\0\x60", WHOLE)
    assert widened is not None
    assert widened("conv.bias", np.float32([5, 6])).tolist() == [0, 5, 6, 0]


def test_new_elements_are_counted() -> None:
    workload = Workload(SETTINGS)
    places = Places(workload)
    specs = array_specs(workload.submodel(narrow(workload)).down)
    found = places.new_items(b"\0\xc0", b"\0\x60", specs)
    assert found == {
        "conv.weight": 9,
        "conv.bias": 1,
        "norm.weight": 1,
        "norm.bias": 1,
        "norm.running_mean": 1,
        "norm.running_var": 1,
        "out.weight": 48,
    }
    assert places.new_items(WHOLE, b"\0\x60", specs) == {}
    assert places.new_items(b"\0\xc0", b"\0\xc0", specs) == {}


@pytest.mark.parametrize(
    ("old", "words"),
    [
        (b"\0\x00", "keeps none of"),
        (b"\0\xff", "names more channels"),
        (b"\0\xff\xff", "2 bytes"),
        (b"none\0\xc0", "none"),
        (b"\xff", "channels that the model does not have"),
    ],
)
def test_bytes_that_are_no_place_are_out_of_sync(old: bytes, words: str) -> None:
    places = Places(Workload(SETTINGS))
    with pytest.raises(OutOfSync, match=words):
        places.move(old, family_of(old) + b"\0\xc0")
    assert places.problem(old, {})


def test_an_array_of_another_shape_cannot_be_moved() -> None:
    places = Places(Workload(SETTINGS))
    move = places.move(b"\0\xc0", b"\0\x60")
    assert move is not None
    with pytest.raises(OutOfSync, match=r"the memory of 'conv\.bias' cannot be moved"):
        move("conv.bias", np.float32([1, 2, 3]))
    assert places.problem(b"\0\xc0", {"conv.bias": (2,), "out.weight": (3, 32)}) == ""
    assert "conv.bias" in places.problem(b"\0\xc0", {"conv.bias": (3,)})
