"""Which layers of a model become sparse."""

import pytest
import torch
from fedbonsai.learning.models.cnn import digits_cnn
from fedbonsai.learning.models.zoo import resnet18
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.sparse.layers import SparseConv2d, SparseLinear, sparse_layers
from fedbonsai.learning.sparse.selection import eligible, make_sparse
from fedbonsai.learning.spec import Sparsity
from torch import nn


def names(model, *layers):
    return [name for name, _ in sparse_layers(make_sparse(model, Sparsity(layers=layers)))]


def test_resnet18_has_the_papers_sixteen_layers():
    model = resnet18()
    assert names(model) == [
        f"layer{layer}.{block}.conv{conv}" for layer in (1, 2, 3, 4) for block in (0, 1) for conv in (1, 2)
    ]
    eligible_weights = sum(layer.weight.numel() for _, layer in sparse_layers(model))
    assert eligible_weights == 10_985_472  # the specification's P_s


def test_the_first_and_the_last_layer_stay_dense():
    model = digits_cnn()
    assert names(model) == ["features.2", "classifier.0"]
    assert [type(model.features[i]) for i in (0, 2)] == [nn.Conv2d, SparseConv2d]
    assert [type(model.classifier[i]) for i in (0, 2)] == [SparseLinear, nn.Linear]


def test_the_state_of_the_model_does_not_change():
    model = digits_cnn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = make_sparse(model, Sparsity()).state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_named_layers_and_all_inside_named_modules_are_sparse():
    assert names(digits_cnn(), "features.0") == ["features.0"]
    assert names(digits_cnn(), "classifier") == ["classifier.0", "classifier.2"]
    assert names(digits_cnn(), "features", "classifier.0") == ["features.0", "features.2", "classifier.0"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.first, self.middle, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.last = nn.Linear(6, 2)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.last(self.decoder(self.middle(self.first(self.embedding(x)))))


def test_a_layer_whose_weight_another_module_uses_stays_dense():
    assert names(Tied()) == ["middle"]
    with pytest.raises(ValueError, match="names 'decoder', which cannot be sparse: another module uses its weight too"):
        make_sparse(Tied(), Sparsity(layers=("decoder",)))


def frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    return model


def depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)
    )


@pytest.mark.parametrize(("model", "layers"), [(frozen(), ["2"]), (depthwise(), ["3"])])
def test_frozen_depthwise_and_1x1_layers_stay_dense(model, layers):
    assert names(model) == layers


def test_layers_whose_module_may_use_their_weights_directly_stay_dense():
    """In evaluation torch's encoder layer takes a fast path, which does not call its linear layers."""
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1, 8), nn.Linear(4, 4), nn.Linear(4, 2))
    assert names(model) == ["2"]
    with pytest.raises(ValueError, match="a TransformerEncoderLayer may use its weight without calling it"):
        make_sparse(nn.Sequential(nn.TransformerEncoderLayer(4, 1, 8)), Sparsity(layers=("0.linear1",)))


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (("nope",), "training.sparsity.layers names 'nope', which the model does not have; its layers: features.0, "),
        (
            ("features.1",),
            "names 'features.1', which cannot be sparse: it is a ReLU; only torch's Conv2d and Linear can",
        ),
    ],
)
def test_a_wrong_name_is_refused_in_one_sentence(layers, sentence):
    with pytest.raises(ValueError, match=r"training\.sparsity") as caught:
        make_sparse(digits_cnn(), Sparsity(layers=layers))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("model", [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))])
def test_a_model_without_a_suitable_layer_is_refused(model):
    with pytest.raises(ValueError, match="no layer of this model can be sparse by default"):
        eligible(model)


def test_the_specification_says_which_weights_are_sparse():
    tensors = [t for block in cut(make_sparse(digits_cnn(), Sparsity())).spec.blocks for t in block.tensors]
    assert {t.name: t.role for t in tensors if t.name.endswith("weight")} == {
        "features.0.weight": "weight",
        "features.2.weight": "sparse",
        "classifier.0.weight": "sparse",
        "classifier.2.weight": "weight",
    }
    assert all(t.is_weight for t in tensors if t.role == "sparse")
