"""Auxiliary heads: names, shapes, equal bits from equal seeds, and models that cannot have one."""

import pytest
import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.parts.auxiliaries import LinearHead, auxiliary_spec, build_head, empty_head
from fedbonsai.learning.parts.part import Part, cut_of, linear_head
from fedbonsai.learning.parts.structure import ModelSpec
from fedbonsai.learning.spec import Call
from fedbonsai.learning.workload import Workload
from fedbonsai.learning.workload_settings import WorkloadSettings


def workload(model="digits_cnn", seed=1):
    data = DataConfig(name="digits")
    return Workload(WorkloadSettings(model=Call(model), data=data, metrics=(), num_devices=2, seed=seed))


def test_a_head_maps_the_cuts_tensor_to_the_models_output():
    head = build_head((2, 3), (4,), seed=0)
    assert [(name, tuple(tensor.shape)) for name, tensor in head.state_dict().items()] == [
        ("weight", (4, 6)),
        ("bias", (4,)),
    ]
    x = torch.arange(12.0).reshape(2, 2, 3)
    expected = x.flatten(1) @ head.weight.T + head.bias
    torch.testing.assert_close(head(x), expected)
    assert build_head((2, 3), (2, 5), seed=0)(x).shape == (2, 2, 5)


def test_its_tensors_are_named_after_the_cut_and_travel_behind_the_blocks():
    name = linear_head("features.0")
    assert (name, cut_of(name)) == ("linear@features.0", "features.0")
    part = Part(blocks=("features.0",), trained=("features.0",), head=name, auxiliaries=(name,))
    names = ["features.0.weight", "features.0.bias", "linear@features.0.weight", "linear@features.0.bias"]
    assert [tensor.name for tensor in workload().submodel(part).down] == names
    up = workload().submodel(part).up(statistics=True)
    assert [(tensor.name, tensor.shape, tensor.role) for tensor in up[2:]] == [
        (names[2], (10, 16 * 8 * 8), "weight"),
        (names[3], (10,), "vector"),
    ]


def test_one_seed_gives_the_same_bits_and_each_cut_its_own():
    first, again, other = workload(), workload(), workload(seed=2)
    state = torch.random.get_rng_state()
    bits = [made.family("").new_auxiliary("linear@classifier.0").weight for made in (first, again, other)]
    assert torch.equal(bits[0], bits[1])
    assert not torch.equal(bits[0], bits[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.family("").new_auxiliary("linear@features.2").weight.shape == (10, 512)


def test_shapes_are_known_without_weights(monkeypatch):
    """Behind VGG11's first block at 224 x 224, with 1000 classes, they would take 3 GB."""
    built, made = workload().family("").new_auxiliary("linear@features.2"), workload()
    expected = auxiliary_spec("linear@features.2", built)

    def refused(*_, **__):
        raise MemoryError

    monkeypatch.setattr("fedbonsai.learning.architecture.build_head", refused)
    assert made.spec.auxiliary("linear@features.2") == expected
    assert made.family("").empty_auxiliary("linear@features.2").weight.is_meta
    assert empty_head((10**6, 10**6), (10**6,)).weight.shape == (10**6, 10**12)


def test_an_impossible_head_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match=r"^part.auxiliaries names 'head@x'; a head can stand behind"):
        workload().spec.auxiliary("head@x")
    with pytest.raises(
        ValueError, match=r"'linear@classifier.2'; a head can stand behind: features.0, features.2, classifier.0$"
    ):
        workload().spec.auxiliary("linear@classifier.2")
    with pytest.raises(ValueError, match="this model has no auxiliaries"):
        ModelSpec(()).auxiliary("linear@conv")


def test_its_roles_are_those_of_parameters():
    spec = auxiliary_spec("linear@a", LinearHead((3,), (2,)))
    assert [(t.name, t.shape, t.dtype, t.role) for t in spec.tensors] == [
        ("linear@a.weight", (2, 3), "<f4", "weight"),
        ("linear@a.bias", (2,), "<f4", "vector"),
    ]


def test_a_head_has_the_type_of_its_input():
    assert (
        build_head((2,), (3,), seed=0, dtype=torch.float64)(torch.ones(1, 2, dtype=torch.float64)).dtype
        == torch.float64
    )
    assert empty_head((2,), (3,), dtype=torch.float64).weight.dtype == torch.float64
