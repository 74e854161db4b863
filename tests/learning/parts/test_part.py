import msgspec
import pytest
from fedbonsai.learning.parts.part import Part, down_tensors, frozen_tensors, trained_tensors, up_tensors, whole
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


def names(tensors: tuple[TensorSpec, ...]) -> list[str]:
    return [tensor.name for tensor in tensors]


def test_the_whole_model_is_held_trained_and_sent() -> None:
    part = whole(SPEC)
    assert part.blocks == part.trained == part.sent == ("conv", "hidden", "fc")
    assert names(down_tensors(SPEC, part)) == [
        "conv.weight", "norm.weight", "norm.running_mean", "hidden.weight", "fc.weight", "fc.bias"
    ]  # fmt: skip
    assert down_tensors(SPEC, part) == up_tensors(SPEC, part, statistics=True)


def test_statistics_come_back_on_demand_and_counters_never() -> None:
    part = Part(blocks=("conv",), trained=("conv",))
    assert names(up_tensors(SPEC, part, statistics=True)) == ["conv.weight", "norm.weight", "norm.running_mean"]
    assert names(up_tensors(SPEC, part, statistics=False)) == ["conv.weight", "norm.weight"]


def test_what_is_frozen_goes_down_but_not_up() -> None:
    part = Part(blocks=("conv", "hidden", "fc"), trained=("fc",))
    assert len(down_tensors(SPEC, part)) == 6
    assert names(up_tensors(SPEC, part, statistics=True)) == ["fc.weight", "fc.bias"]


def test_what_is_cached_is_not_sent() -> None:
    part = Part(blocks=("conv", "hidden"), trained=("hidden",), cached=(("conv", "00ff"),))
    assert part.sent == ("hidden",)
    assert names(down_tensors(SPEC, part)) == ["hidden.weight"]


def test_tensors_come_in_the_models_order_whatever_the_parts() -> None:
    part = Part(blocks=("fc", "conv"), trained=("fc", "conv"))
    assert names(up_tensors(SPEC, part, statistics=False)) == ["conv.weight", "norm.weight", "fc.weight", "fc.bias"]


def test_what_the_author_has_frozen_travels_in_no_direction() -> None:
    tensors = (
        TensorSpec("a.weight", (2, 2), "<f4", "weight", frozen=True),
        TensorSpec("a.bias", (2,), "<f4", "vector"),
    )
    spec = ModelSpec((BlockSpec("a", tensors),))
    assert names(down_tensors(spec, whole(spec))) == names(up_tensors(spec, whole(spec), statistics=True)) == ["a.bias"]
    assert names(trained_tensors(spec, ("a",))) == ["a.bias"]
    assert names(frozen_tensors(spec, ("a",))) == ["a.weight"]
    assert (spec.parameters, spec.frozen_parameters) == (6, 4)


def test_a_block_that_the_model_does_not_have() -> None:
    with pytest.raises(
        ValueError, match=r"part.blocks names 'head', which this model does not have; its blocks are: conv,"
    ):
        down_tensors(SPEC, Part(blocks=("conv", "head"), trained=()))


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
