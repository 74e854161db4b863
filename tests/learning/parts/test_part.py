import msgspec
from fedbonsai.learning.parts.part import Part, whole
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
