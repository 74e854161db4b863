"""Narrow models against the full ones: in whose tensors their elements are, what they compute, what they cost."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from fedbonsai.learning.costs.flops import FlopCounter
from fedbonsai.learning.models import build
from fedbonsai.learning.narrowing.find_groups import find_groups
from fedbonsai.learning.narrowing.narrow import narrow, scale_outputs
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.channels import channel_counts, choose_channels, score_channels
from fedbonsai.learning.parts.slices import gather, put, slices
from fedbonsai.learning.spec import Call
from torch import nn

CASES = {
    "digits_cnn": ({}, (1, 8, 8)),
    "resfed_cnn": ({}, (3, 32, 32)),
    "resnet18": ({}, (3, 32, 32)),
    "vgg11_bn": ({"hidden": 64}, (3, 32, 32)),
    "vgg16_bn": ({"hidden": 64}, (3, 32, 32)),
    "mobilenet_v3_small": ({}, (3, 32, 32)),
    "densenet121": ({"stem": "cifar"}, (3, 32, 32)),
}


def chosen(groups, tensors, *, rule, width, min_channels, turn=0):
    """The map that a rule chooses."""
    scores = score_channels(groups, tensors, rule=rule) if rule in ("l1", "batchnorm") else None
    turn = turn if rule == "rolling" else None
    return choose_channels(groups, width=width, min_channels=min_channels, scores=scores, turn=turn)


@functools.cache
def case(name):
    """A model with random statistics and shifts in evaluation mode, its groups, and a batch. It must not be changed."""
    kwargs, shape = CASES[name]
    model = build(Call(name, kwargs), seed=1, outputs=10)
    generator = torch.Generator().manual_seed(2)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 1:  # scales, shifts, means and variances; around 1, so that signals neither fade nor grow
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    inputs = torch.randn(2, *shape, generator=generator)
    return model.eval(), find_groups(model, inputs), inputs


def narrowed(model, groups, kept):
    copied = copy.deepcopy(model)
    narrow(copied, groups, kept)
    return copied


def silenced(model, groups, kept):
    """The full model in which removed channels are 0: filters, shifts, scales and means of these channels."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    for name, owners in groups.owners.items():
        if 0 in owners and not name.endswith("running_var"):
            removed = (owners[0] >= 0) & ~kept[owners[0]]
            state[name][torch.from_numpy(removed)] = 0.0
    return model


@pytest.mark.parametrize("rule", ["l1", "prefix"])
@pytest.mark.parametrize("name", CASES)
def test_a_narrow_model_equals_the_full_one_with_removed_channels_silenced(name, rule):
    model, groups, inputs = case(name)
    kept = chosen(groups, model.state_dict(), rule=rule, width=0.5, min_channels=1)
    with torch.no_grad():
        small, expected = narrowed(model, groups, kept)(inputs), silenced(model, groups, kept)(inputs)
    assert float((small - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert not torch.allclose(expected, model(inputs), rtol=0.1)


@pytest.mark.parametrize("name", CASES)
def test_tensors_that_are_taken_out_and_put_back_change_nothing(name):
    model, groups, _ = case(name)
    state = model.state_dict()
    kept = chosen(groups, state, rule="batchnorm", width=0.3, min_channels=2)
    small = narrowed(model, groups, kept).state_dict()
    parts = slices(groups, kept)
    assert small.keys() == state.keys()
    for key, tensor in state.items():
        held = gather(tensor, parts.get(key, ()))
        assert torch.equal(held, small[key])
        assert (tensor.shape != held.shape) == (key in parts)
        again = tensor.clone()
        put(again, parts.get(key, ()), held)
        assert torch.equal(again, tensor)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torch_pruning_removes_the_same_elements(name):
    """Tensors hold their own flat indices, so that what is left of them says where it was."""
    from torch_pruning import DependencyGraph

    model, groups, inputs = case(name)
    kept = chosen(groups, model.state_dict(), rule="l1", width=0.4, min_channels=1)
    twin = copy.deepcopy(model)
    for tensor in [*twin.parameters(), *twin.buffers()]:
        tensor.data.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    expected = narrowed(twin, groups, kept)
    graph = DependencyGraph().build_dependency(twin, inputs, forward_fn=lambda module, x: module(x), verbose=False)
    for producers, start, size in zip(groups.producers, groups.starts, groups.sizes, strict=True):
        layer = twin.get_submodule(producers[0].rpartition(".")[0])
        removed = np.flatnonzero(~kept[start : start + size]).tolist()
        graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, removed).prune()
    found = twin.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.state_dict().items())
    assert str(expected) == str(twin)  # the layers' sizes


@pytest.mark.parametrize(
    ("width", "parameters", "flops"),
    [(1.0, "33.64M", ".3321"), (0.75, "18.94M", ".1872"), (0.5, "8.43M", ".0835"), (0.25, "2.11M", ".0211")],
)
def test_parameters_and_multiplications_of_vgg16(width, parameters, flops):
    model, groups, inputs = vgg16_on_meta()
    kept = chosen(groups, {}, rule="prefix", width=width, min_channels=1)
    small = narrowed(model, groups, kept)
    assert all(tensor.is_meta for tensor in small.state_dict().values())
    assert f"{sum(p.numel() for p in small.parameters()) / 1e6:.2f}M" == parameters
    with torch.no_grad(), FlopCounter() as counter:
        assert small(inputs).shape == (1, 10)
    assert f"{counter.total / 2e9:.4f}".lstrip("0") == flops


@functools.cache
def vgg16_on_meta():
    with torch.device("meta"):
        model = build(Call("vgg16_bn", {}), seed=0, outputs=10)
    inputs = torch.empty(1, 3, 32, 32, device="meta")
    return model.eval(), find_groups(model, inputs), inputs


@pytest.mark.parametrize("name", CASES)
def test_a_narrow_model_has_the_blocks_of_the_full_one(name):
    model, groups, inputs = case(name)
    small = narrowed(
        model, groups, chosen(groups, model.state_dict(), rule="rolling", width=0.4, min_channels=1, turn=3)
    )
    blocks, full = cut(small), cut(copy.deepcopy(model))
    assert blocks.spec.block_names == full.spec.block_names
    assert [[t.name for t in block.tensors] for block in blocks.spec.blocks] == [
        [t.name for t in block.tensors] for block in full.spec.blocks
    ]
    assert torch.equal(blocks.run(blocks.modules, inputs), small(inputs))


def test_sizes_modes_and_gradients():
    model, groups, inputs = case("mobilenet_v3_small")
    model = copy.deepcopy(model).train()
    model.features[0].requires_grad_(False)
    model.features[2].eval()
    kept = chosen(groups, model.state_dict(), rule="prefix", width=0.25, min_channels=8)
    small = narrowed(model, groups, kept)
    assert channel_counts(groups, width=0.25, min_channels=8)[:2] == (8, 8)
    depthwise = small.features[1].block[0][0]
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (8, 8, 8)
    assert small.features[1].block[0][1].num_features == 8
    assert small.classifier[0].in_features == small.features[12][0].out_channels == 144
    pairs = [*zip(model.parameters(), small.parameters(), strict=True)]
    assert all(type(one) is type(other) and one.requires_grad == other.requires_grad for one, other in pairs)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    small(inputs).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in small.parameters())
    untouched = narrowed(model, groups, np.ones(groups.channels, np.bool_))
    assert all(
        torch.equal(a, b) for a, b in zip(untouched.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_outputs_are_scaled_in_training_only():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False, track_running_stats=True), nn.Linear(4, 2))
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    groups = find_groups(model, inputs)
    plain = copy.deepcopy(model)
    scale_outputs(model, groups, 0.25)
    assert torch.equal(model[0](inputs), plain[0](inputs) / 0.25)
    assert torch.equal(model[2](plain[0](inputs)), plain[2](plain[0](inputs)))  # the outputs of the model itself
    assert torch.equal(model.eval()(inputs), plain.eval()(inputs))
    frozen = model.train()[0].eval()
    assert torch.equal(frozen(inputs), plain[0](inputs))
    model.train()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again[0](inputs), model[0](inputs))


def test_a_scaled_model_is_cut_into_the_same_blocks():
    model, groups, inputs = case("resfed_cnn")
    kept = chosen(groups, {}, rule="prefix", width=0.5, min_channels=1)
    small = narrowed(model, groups, kept)
    names = cut(copy.deepcopy(small)).spec.block_names
    scale_outputs(small, groups, 0.5)
    blocks = cut(small.train())
    assert blocks.spec.block_names == names
    state = copy.deepcopy(small.state_dict())
    expected = small(inputs)
    small.load_state_dict(state)
    assert torch.equal(blocks.run(blocks.modules, inputs), expected)
