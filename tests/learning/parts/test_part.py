from typing import Any

import msgspec
import pytest
from fedbonsai.learning.parts.part import Part, blocks_of, cut_of, path, proxy, replaced_by, whole
from fedbonsai.learning.parts.structure import BlockSpec, ModelSpec, TensorSpec

SPEC = ModelSpec(
    (
        BlockSpec(
            "conv",
            (
                TensorSpec("conv.weight", (4, 1, 3, 3), "<f4", "weight"),
                TensorSpec("norm.weight", (4,), "<f4", "vector"),
                TensorSpec("norm.running_mean", (4,), "<f4", "statistic"),
                TensorSpec("norm.num_batches_tracked", (), "<i8", "counter"),
            ),
        ),
        BlockSpec("hidden", (TensorSpec("hidden.weight", (2, 4), "<f4", "weight"),)),
        BlockSpec(
            "fc", (TensorSpec("fc.weight", (3, 2), "<f8", "weight"), TensorSpec("fc.bias", (3,), "<f8", "vector"))
        ),
    )
)


def test_equal_parts_have_one_key_and_every_field_counts() -> None:
    part = whole(SPEC)
    assert part.key == msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=Part).key
    others = [
        {"blocks": ("conv",)},
        {"trained": ("conv",)},
        {"cached": (("conv", "00"),)},
        {"model": "vgg"},
        {"width": 0.5},
        {"min_channels": 8},
        {"channels": "l1"},
        {"turn": 1},
        {"scaled": True},
        {"index_map": "ab"},
        {"head": "small"},
        {"auxiliaries": ("proxy",)},
        {"untrained": ("proxy",)},
    ]
    assert {field for other in others for field in other} == set(Part.__struct_fields__) - {"frozen"}
    keys = {msgspec.structs.replace(part, **other).key for other in others}
    assert len(keys | {part.key}) == len(others) + 1
    assert msgspec.structs.replace(part, frozen="ab").key == part.key  # ``frozen`` follows from the blocks


def test_figures_of_a_model() -> None:
    assert SPEC.block_names == ("conv", "hidden", "fc")
    assert SPEC.parameters == 36 + 4 + 8 + 6 + 3
    assert [(t.items, t.num_bytes) for t in SPEC.tensors_of(("conv",))] == [(36, 144), (4, 16), (4, 16), (1, 8)]
    assert SPEC.tensors_of(()) == ()


NAMES = ("a", "b", "c", "d")


def test_a_proxy_is_named_by_the_first_and_the_last_of_its_blocks() -> None:
    assert proxy("b", "c") == "proxy@b..c"
    assert replaced_by("proxy@b..c") == ("b", "c")
    assert replaced_by(proxy("layer.0", "layer.1")) == ("layer.0", "layer.1")
    assert [replaced_by(name) for name in ("linear@b", "b..c", "proxy@b", "")] == [None] * 4
    assert cut_of("proxy@b..c") == ""
    assert blocks_of("proxy@b..d", NAMES) == ("b", "c", "d")
    assert blocks_of("proxy@b..b", NAMES) == ("b",)


@pytest.mark.parametrize("name", ["proxy@b..x", "proxy@x..b", "proxy@c..b", "linear@b", "b"])
def test_a_proxy_of_other_blocks_than_neighbours_is_refused(name: str) -> None:
    sentence = f"^part.auxiliaries names {name!r}; a proxy stands for neighbouring blocks of: a, b, c, d$"
    with pytest.raises(ValueError, match=sentence):
        blocks_of(name, NAMES)


def part(*blocks: str, auxiliaries: tuple[str, ...] = (), **changes: Any) -> Part:
    return Part(**{"blocks": blocks, "trained": (), "auxiliaries": auxiliaries} | changes)


def test_the_stages_are_blocks_and_proxies_in_the_models_order() -> None:
    assert path(part("a", "d", auxiliaries=("proxy@b..c",)), NAMES) == ("a", "proxy@b..c", "d")
    assert path(part("a", "d", auxiliaries=("proxy@c..c", "proxy@b..b")), NAMES) == (
        "a",
        "proxy@b..b",
        "proxy@c..c",
        "d",
    )
    assert path(part("a", "b", "c", "d"), NAMES) == NAMES
    # What is behind the last stage is on a host, or an auxiliary head is in its place.
    assert path(part("a", "b"), NAMES) == ("a", "b")
    assert path(part("a", auxiliaries=("linear@a",)), NAMES) == ("a",)
    # A proxy of blocks that are held is not a stage: it imitates them.
    assert path(part("a", "b", "c", auxiliaries=("proxy@b..c",)), NAMES) == ("a", "b", "c")


def test_two_proxies_for_one_block_are_refused() -> None:
    sentence = "^part.auxiliaries names 'proxy@b..c' and 'proxy@c..c', which both stand for 'c'$"
    with pytest.raises(ValueError, match=sentence):
        path(part("a", "d", auxiliaries=("proxy@b..c", "proxy@c..c")), NAMES)
    with pytest.raises(ValueError, match=r"which both stand for 'b'$"):
        path(part("a", "d", auxiliaries=("proxy@b..b", "proxy@b..b")), NAMES)


def test_a_part_learns_if_a_block_or_an_auxiliary_does() -> None:
    proxies = ("proxy@b..b", "proxy@c..c")
    assert part("a", trained=("a",)).learns
    assert not part("a").learns
    first = part("a", auxiliaries=proxies, untrained=proxies[1:])
    assert (first.trained_auxiliaries, first.learns) == (proxies[:1], True)
    none = part("a", auxiliaries=proxies, untrained=proxies)
    assert (none.trained_auxiliaries, none.learns) == ((), False)
