import pytest
from fedbonsai.learning.parts.blocks import Blocks
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.parts.structure import BlockSpec, ModelSpec, TensorSpec
from fedbonsai.learning.parts.submodel import SubModel
from torch import nn

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


def compiled(spec: ModelSpec, part: Part) -> SubModel:
    """A part of a model of which only the structure is needed."""
    return SubModel(part, Blocks(nn.Identity(), {}, spec), spec)


def names(tensors: tuple[TensorSpec, ...]) -> list[str]:
    return [tensor.name for tensor in tensors]


def test_the_whole_model_is_held_trained_and_sent() -> None:
    part = whole(SPEC)
    assert part.blocks == part.trained == part.sent == ("conv", "hidden", "fc")
    assert names(compiled(SPEC, part).down) == [
        "conv.weight", "norm.weight", "norm.running_mean", "hidden.weight", "fc.weight", "fc.bias"
    ]  # fmt: skip
    assert compiled(SPEC, part).down == compiled(SPEC, part).up(statistics=True)


def test_statistics_come_back_on_demand_and_counters_never() -> None:
    part = Part(blocks=("conv",), trained=("conv",))
    assert names(compiled(SPEC, part).up(statistics=True)) == ["conv.weight", "norm.weight", "norm.running_mean"]
    assert names(compiled(SPEC, part).up(statistics=False)) == ["conv.weight", "norm.weight"]


def test_what_is_frozen_goes_down_but_not_up() -> None:
    part = Part(blocks=("conv", "hidden", "fc"), trained=("fc",))
    assert len(compiled(SPEC, part).down) == 6
    assert names(compiled(SPEC, part).up(statistics=True)) == ["fc.weight", "fc.bias"]


def test_what_is_cached_is_not_sent() -> None:
    part = Part(blocks=("conv", "hidden"), trained=("hidden",), cached=(("conv", "00ff"),))
    assert part.sent == ("hidden",)
    assert names(compiled(SPEC, part).down) == ["hidden.weight"]


def test_tensors_come_in_the_models_order_whatever_the_parts() -> None:
    part = Part(blocks=("fc", "conv"), trained=("fc", "conv"))
    assert names(compiled(SPEC, part).up(statistics=False)) == ["conv.weight", "norm.weight", "fc.weight", "fc.bias"]


def test_what_the_author_has_frozen_travels_in_no_direction() -> None:
    tensors = (
        TensorSpec("a.weight", (2, 2), "<f4", "weight", frozen=True),
        TensorSpec("a.bias", (2,), "<f4", "vector"),
    )
    spec = ModelSpec((BlockSpec("a", tensors),))
    assert (
        names(compiled(spec, whole(spec)).down) == names(compiled(spec, whole(spec)).up(statistics=True)) == ["a.bias"]
    )
    assert list(compiled(spec, whole(spec)).trained) == ["a.bias"]
    assert list(compiled(spec, whole(spec)).frozen) == ["a.weight"]
    assert (spec.parameters, spec.frozen_parameters) == (6, 4)


def test_a_block_that_the_model_does_not_have() -> None:
    with pytest.raises(
        ValueError, match=r"part.blocks names 'head', which this model does not have; its blocks are: conv,"
    ):
        _ = compiled(SPEC, Part(blocks=("conv", "head"), trained=())).down
