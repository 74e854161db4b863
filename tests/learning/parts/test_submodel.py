import numpy as np
import pytest
import torch
from fedbonsai.learning.parts.blocks import Blocks
from fedbonsai.learning.parts.part import Part, proxy, whole
from fedbonsai.learning.parts.slices import Slice, put
from fedbonsai.learning.parts.structure import BlockSpec, ModelSpec, TensorSpec
from fedbonsai.learning.parts.submodel import SubModel
from msgspec.structs import replace
from torch import nn

from .test_part import SPEC


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


# The first two blocks at half the width: rows 0 and 2 of the convolution, and these columns of the layer behind it.
ROWS = np.array([0, 2])
SLICES: dict[str, Slice] = {
    "conv.weight": (ROWS,), "norm.weight": (ROWS,), "norm.running_mean": (ROWS,), "hidden.weight": (None, ROWS)
}  # fmt: skip
NARROW = ModelSpec(
    (
        BlockSpec(
            "conv",
            (
                TensorSpec("conv.weight", (2, 1, 3, 3), "<f4", "weight"),
                TensorSpec("norm.weight", (2,), "<f4", "vector"),
                TensorSpec("norm.running_mean", (2,), "<f4", "statistic"),
                TensorSpec("norm.num_batches_tracked", (), "<i8", "counter"),
            ),
        ),
        BlockSpec("hidden", (TensorSpec("hidden.weight", (2, 2), "<f4", "weight"),)),
        SPEC.blocks[2],
    )
)


def narrow(part: Part, *, prefix: str = "") -> SubModel:
    return SubModel(part, Blocks(nn.Identity(), {}, NARROW), NARROW, prefix, lambda: SLICES)


def full_tensors(prefix: str = "") -> dict[str, torch.Tensor]:
    """Every element is another number."""
    tensors, start = {}, 0
    for spec in (t for block in SPEC.blocks for t in block.tensors):
        count = int(np.prod(spec.shape))
        dtype = {"<f4": torch.float32, "<f8": torch.float64, "<i8": torch.int64}[spec.dtype]
        tensors[prefix + spec.name] = torch.arange(start, start + count, dtype=dtype).reshape(spec.shape)
        start += count
    return tensors


def test_a_narrow_part_has_the_models_names_with_smaller_shapes() -> None:
    part = Part(blocks=("conv", "hidden"), trained=("hidden",), width=0.5)
    assert [(t.name, t.shape) for t in narrow(part).down] == [
        ("conv.weight", (2, 1, 3, 3)), ("norm.weight", (2,)), ("norm.running_mean", (2,)), ("hidden.weight", (2, 2))
    ]  # fmt: skip
    assert [(t.name, t.shape) for t in narrow(part).up(statistics=True)] == [("hidden.weight", (2, 2))]
    assert narrow(part).parameters == 18 + 2 + 4
    assert compiled(SPEC, part).parameters == 36 + 4 + 8


@pytest.mark.parametrize("prefix", ["", "tiny:"])
def test_values_are_taken_out_and_put_back(prefix: str) -> None:
    submodel, tensors = narrow(whole(SPEC), prefix=prefix), full_tensors(prefix)
    gathered = submodel.gather(tensors)
    assert list(gathered) == names(submodel.down)
    assert [tuple(gathered[t.name].shape) for t in submodel.down] == [t.shape for t in submodel.down]
    assert gathered["norm.weight"].tolist() == [36, 38]
    assert gathered["hidden.weight"].tolist() == [[45, 47], [49, 51]]
    assert gathered["fc.bias"] is tensors[prefix + "fc.bias"]
    assert all(tensor.is_contiguous() for tensor in gathered.values())
    assert submodel.gather(tensors, submodel.down[1:2]).keys() == {"norm.weight"}

    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in submodel.server_names({n: t + 100 for n, t in gathered.items()}).items():
        if name in submodel.server_slices:
            put(changed[name], submodel.server_slices[name], tensor)
    # Read again they are as they were put; all others have kept their values.
    again = submodel.gather(changed)
    assert all(torch.equal(again[name], gathered[name] + 100) for name in SLICES)
    assert changed[prefix + "norm.weight"].tolist() == [136, 37, 138, 39]
    assert sorted(submodel.server_slices) == sorted(prefix + name for name in SLICES)


def test_without_a_prefix_names_stay_and_the_mapping_is_another_one() -> None:
    submodel, tensors = compiled(SPEC, whole(SPEC)), full_tensors()
    assert submodel.server_names(tensors) == tensors
    assert submodel.server_names(tensors) is not tensors
    assert submodel.server_slices == {}


def test_slices_are_found_once_and_only_when_they_are_needed() -> None:
    calls: list[int] = []

    def locate() -> dict[str, Slice]:
        calls.append(1)
        return SLICES

    submodel = SubModel(whole(SPEC), Blocks(nn.Identity(), {}, NARROW), NARROW, "", locate)
    assert (len(submodel.down), calls) == (6, [])
    submodel.gather(full_tensors())
    submodel.gather(full_tensors())
    assert calls == [1]


def test_the_rest_of_a_cut_part_is_as_wide_and_of_the_same_family() -> None:
    part = Part(
        blocks=("conv",),
        trained=("conv",),
        model="tiny",
        width=0.5,
        min_channels=2,
        channels="l1",
        turn=3,
        index_map="ab",
    )
    rest = narrow(part).rest()
    assert rest == Part(
        blocks=("hidden", "fc"), trained=("hidden", "fc"), model="tiny", width=0.5, min_channels=2, channels="l1", turn=3,
        index_map="ab",
    )  # fmt: skip


def test_the_rest_behind_a_trunk_trains_what_is_behind_its_depth() -> None:
    part = Part(
        blocks=("conv",), trained=(), cached=(("conv", "00"),), head="linear@conv", auxiliaries=("linear@conv",)
    )
    assert compiled(SPEC, part).rest(frozen_to="hidden") == Part(blocks=("hidden", "fc"), trained=("fc",))


def test_stages_are_the_blocks_that_are_held_in_order() -> None:
    stages = compiled(SPEC, Part(blocks=("conv", "fc"), trained=("fc",))).stages
    assert [(stage.name, stage.trained, stage.auxiliary) for stage in stages] == [
        ("conv", False, False),
        ("fc", True, False),
    ]


def test_a_proxy_stands_where_its_blocks_were_and_gives_way_to_them() -> None:
    name = proxy("hidden", "hidden")
    spec = ModelSpec(
        SPEC.blocks, auxiliary=lambda name: BlockSpec(name, (TensorSpec(f"{name}.weight", (2, 3), "<f4", "weight"),))
    )
    part = Part(blocks=("conv", "fc"), trained=("fc",), auxiliaries=(name,))
    submodel = compiled(spec, part)
    assert [stage.name for stage in submodel.stages] == ["conv", name, "fc"]
    assert [stage.trained for stage in submodel.stages] == [False, True, True]
    assert names(submodel.up(statistics=True)) == ["fc.weight", "fc.bias", f"{name}.weight"]
    held = compiled(spec, replace(part, blocks=("conv", "hidden"), trained=(), untrained=(name,)))
    assert [stage.name for stage in held.stages] == ["conv", "hidden"]
    assert held.up(statistics=True) == ()
    assert names(held.statistics) == ["norm.running_mean"]
