"""Training behind frozen stages: where all is trained it is training of the whole model, and frozen stages keep their bits."""

import copy

import pytest
import torch
from fedbonsai.learning.data.types import Samples
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.part import Part
from fedbonsai.learning.parts.submodel import Stage, compile_part
from fedbonsai.learning.spec import Optimiser, Training
from fedbonsai.learning.store import model_hash
from fedbonsai.learning.training.losses import make_loss
from fedbonsai.learning.training.staged import (
    Imitation,
    StagedModel,
    collect_statistics,
    entering,
    frozen_before,
    imitation_loss,
    run_stages,
)
from fedbonsai.learning.training.training import TrainingResult, train
from torch import nn

LOSS = make_loss(Training().loss)


def samples(num=23):
    generator = torch.Generator().manual_seed(1)
    return Samples(torch.randn(num, 1, 8, 8, generator=generator), torch.arange(num) % 10)


def same(x, generator):
    return x


class Normalised(nn.Module):
    """Blocks a, b, c and out, with normalisation and dropout in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 4, 3, padding=1) for n in (1, 4, 4))
        self.na, self.nb, self.nc = (nn.BatchNorm2d(4) for _ in range(3))
        self.drop, self.last = nn.Dropout(0.5), nn.Dropout(0.5)
        self.out = nn.Linear(4 * 64, 10)

    def forward(self, x):
        x = self.drop(self.na(self.a(x)).relu())
        x = self.nc(self.c(self.nb(self.b(x)).relu())).relu()
        return self.out(self.last(x.flatten(1)))


NAMES = ("a", "b", "c", "out")


@pytest.fixture(name="model")
def model_fixture():
    torch.manual_seed(3)
    model = Normalised()
    assert cut(copy.deepcopy(model)).spec.block_names == NAMES
    return model


def staged(model, part, training, data=None):
    """Train a part of a model, stage by stage."""
    blocks = cut(model)
    submodel = compile_part(part, blocks)
    gradient = StagedModel(submodel.stages, blocks.modules, training=training, loss=LOSS)
    data = data or samples()
    return train(
        model, data, training=training, loss=LOSS, transform=same, seed=7, trainable=submodel.trained, gradient=gradient
    )


def hashes(model):
    """The hash of each block, with counters."""
    state = model.state_dict()
    return {
        block.name: model_hash({t.name: state[t.name] for t in block.tensors})
        for block in cut(copy.deepcopy(model)).spec.blocks
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epochs": 2, "accumulation": 3},
        {"layout": "channels_last"},
        {"precision": "bf16"},
        {"optimiser": Optimiser(name="adam", learning_rate=0.01)},
        {"optimiser": Optimiser(proximal=0.1, weight_decay=0.01, clip_norm=1.0)},
    ],
    ids=str,
)
def test_where_all_is_trained_it_equals_training_of_the_whole_model_bit_for_bit(model, changes):
    training = Training(**({"batch_size": 8} | changes))
    whole = copy.deepcopy(model)
    expected = train(whole, samples(), training=training, loss=LOSS, transform=same, seed=7)
    found = staged(model, Part(blocks=NAMES, trained=NAMES), training)
    assert found == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("trained", [("out",), ("c", "out"), ("b",), ("b", "out")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_frozen_blocks_keep_all_bits_parameters_and_statistics(model, trained, accumulation):
    training = Training(batch_size=8, epochs=2, accumulation=accumulation, optimiser=Optimiser(weight_decay=0.1))
    before = hashes(model)
    staged(model, Part(blocks=NAMES, trained=trained), training)
    after = hashes(model)
    assert {name for name in NAMES if before[name] != after[name]} == set(trained)
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_kept_of_the_stages_before_the_first_trained_one(model):
    blocks = cut(model)
    submodel = compile_part(Part(blocks=NAMES, trained=("c", "out")), blocks)
    outputs, kept = {}, []

    def call(name, x):
        outputs[name] = blocks.modules[name](x)
        return outputs[name]

    for parameter in model.parameters():
        parameter.requires_grad_(True)  # whatever an earlier plan has left
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        run_stages(submodel.stages, call, samples(4).x)
    assert {name: output.grad_fn is not None for name, output in outputs.items()} == {
        "a": False,
        "b": False,
        "c": True,
        "out": True,
    }
    assert outputs["b"].data_ptr() in kept  # it enters the first trained stage
    assert outputs["a"].data_ptr() not in kept


def test_gradients_pass_through_a_frozen_stage_behind_a_trained_one(model):
    found = {}
    for trained in (("a",), ("a", "b", "c", "out")):
        trainee = copy.deepcopy(model)
        for module in trainee.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        staged(trainee, Part(blocks=NAMES, trained=trained), Training(batch_size=23))
        found[trained] = trainee.a.weight.detach()
    assert not torch.equal(found["a",], model.a.weight)


def test_the_input_needs_gradients_where_it_is_said():
    stages = (Stage("a", False), Stage("b", True))
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2, requires_grad=True)
    assert not run_stages(stages[:1], lambda name, z: layer(z), x).requires_grad
    assert run_stages(stages[:1], lambda name, z: layer(z), x, learning=True).requires_grad


def test_dropout_is_off_in_frozen_stages_and_on_in_trained_ones(model):
    """There is one layer in block a, and one in c."""
    blocks = cut(model)
    part = Part(blocks=NAMES, trained=("c", "out"))
    submodel = compile_part(part, blocks)
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in ("a", "c")}
    for name in outputs:
        blocks.modules[name].register_forward_hook(lambda module, x, out, to=outputs[name]: to.append(out.detach()))
    train(
        model,
        samples(6),
        training=Training(batch_size=6, epochs=2, optimiser=Optimiser(learning_rate=1e-9)),
        loss=LOSS,
        transform=same,
        seed=7,
        trainable=submodel.trained,
        gradient=StagedModel(submodel.stages, blocks.modules, training=Training(), loss=LOSS),
    )
    # The second batch is another permutation of the first.
    sums = {name: [x.flatten(1).sum(dim=1).sort()[0] for x in each] for name, each in outputs.items()}
    torch.testing.assert_close(*sums["a"])
    assert not torch.allclose(*sums["c"])


def test_frozen_stages_may_run_in_bf16_and_the_trained_ones_see_float32(model):
    blocks = cut(model.eval())
    stages = compile_part(Part(blocks=NAMES, trained=("c", "out")), blocks).stages
    assert frozen_before(stages) == ("a", "b")
    entered, x = {}, samples(4).x

    def call(name, z):
        entered[name] = z
        return blocks.modules[name](z)

    output = run_stages(stages, call, x, frozen="bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = blocks.modules["b"](blocks.modules["a"](x)).float()
    assert [z.dtype for z in entered.values()][2:] == [torch.float32, torch.float32]
    assert torch.equal(entered["c"], expected)
    assert not torch.equal(entered["c"], blocks.modules["b"](blocks.modules["a"](x)))
    assert output.dtype == torch.float32
    assert frozen_before(stages[:2]) == ("a", "b")
    assert frozen_before(stages[2:]) == ()


# Imitation.


def test_the_error_is_relative_to_the_length_of_the_target_by_hand():
    # |(1, 2) - (0, 2)|^2 / |(0, 2)|^2 = 1/4; |(3, 0) - (3, 4)|^2 / 25 = 16/25
    output, target = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert float(imitation_loss(output, target)) == pytest.approx((0.25 + 0.64) / 2)
    assert float(imitation_loss(10 * output, 10 * target)) == pytest.approx((0.25 + 0.64) / 2)
    assert float(imitation_loss(target, target)) == 0.0
    zero = torch.zeros(1, 2)
    assert float(imitation_loss(zero, zero)) == 0.0
    assert torch.isfinite(imitation_loss(output[:1], zero))
    assert imitation_loss(output.bfloat16(), target.bfloat16()).dtype == torch.float32


def teacher_and_proxy():
    """y = 2 x behind a stage that negates, and a proxy that begins at y = 0."""
    modules = {"front": nn.Linear(1, 1, bias=False), "block": nn.Linear(1, 1, bias=False)}
    proxy = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        modules["front"].weight.fill_(-1.0)
        modules["block"].weight.fill_(2.0)
        proxy.weight.fill_(0.0)
    return modules, proxy


def test_a_step_of_imitation_by_hand():
    modules, proxy = teacher_and_proxy()
    stages = (Stage("front", False), Stage("block", False))
    gradient = Imitation(stages, modules, blocks=("block",), proxy=proxy, training=Training())
    # h = -x; loss = mean of (w h - 2 h)^2 / (2 h)^2 = (w - 2)^2 / 4 = 1 at w = 0, with the gradient (w - 2) / 2 = -1
    x = torch.tensor([[1.0], [3.0]])
    assert gradient(x, torch.zeros(2), 1.0) == 1.0
    assert proxy.weight.grad.item() == -1.0
    gradient(x, torch.zeros(2), 0.5)
    assert proxy.weight.grad.item() == -1.5
    assert all(p.grad is None for module in modules.values() for p in module.parameters())
    with torch.no_grad():
        proxy.weight.fill_(2.0)
    assert gradient(x, torch.zeros(2), 1.0) == 0.0


def test_only_the_stages_before_and_of_the_blocks_are_computed():
    stages = tuple(Stage(name, False) for name in ("a", "b", "c"))
    assert entering(stages, ("b", "c")) == (stages[:1], stages[1:])
    assert entering(stages, ("c",)) == (stages[:2], stages[2:])
    assert entering(stages, ("a", "b", "c")) == ((), stages)


def test_a_proxy_learns_what_the_blocks_do_and_they_keep_all_bits(model):
    blocks = cut(model)
    stages = compile_part(Part(blocks=("a", "b"), trained=()), blocks).stages
    torch.manual_seed(5)
    proxy = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    training = Training(batch_size=8, epochs=1, optimiser=Optimiser(learning_rate=0.05, momentum=0.9))
    before, losses = hashes(model), []
    for _ in range(12):
        gradient = Imitation(stages, blocks.modules, blocks=("b",), proxy=proxy, training=training)
        result = train(
            model,
            samples(),
            training=training,
            loss=LOSS,
            transform=same,
            seed=7,
            trainable=(),
            gradient=gradient,
            auxiliaries=[proxy],
        )
        losses.append(result.loss)
    assert losses[-1] < 0.5 * losses[0]
    assert hashes(model) == before
    assert result.steps == 3


def test_what_a_block_teaches_itself_costs_nothing(model):
    blocks = cut(model.eval())
    stages = compile_part(Part(blocks=("a", "b"), trained=()), blocks).stages
    twin = copy.deepcopy(blocks.modules["b"]).eval()
    gradient = Imitation(stages, blocks.modules, blocks=("b",), proxy=twin, training=Training())
    assert gradient(samples(5).x, torch.zeros(5), 1.0) == 0.0


# Statistics.


def test_statistics_are_means_over_the_batches_by_hand():
    norm = nn.BatchNorm1d(1, momentum=0.3)
    with torch.no_grad():
        norm.running_mean.fill_(77.0)
    # Batches (0, 2) and (4, 10): means 1 and 7, unbiased variances 2 and 18.
    data = Samples(torch.tensor([[0.0], [2.0], [4.0], [10.0]]), torch.zeros(4))
    result = collect_statistics(
        (Stage("n", False),), {"n": norm}, data, training=Training(batch_size=2), transform=same, seed=1
    )
    assert (norm.running_mean.item(), norm.running_var.item()) == (4.0, 10.0)
    assert result == TrainingResult(steps=2, processed=4)
    assert (norm.momentum, norm.training, int(norm.num_batches_tracked)) == (0.3, False, 2)


def test_layers_normalise_by_each_batch_while_statistics_are_collected():
    # Behind a first normalisation by the batch (0, 2) the values are -1 and 1, whatever the statistics were before.
    modules = {"n": nn.BatchNorm1d(1), "m": nn.BatchNorm1d(1)}
    with torch.no_grad():
        modules["n"].running_mean.fill_(-50.0)
    stages = (Stage("n", False), Stage("m", False))
    data = Samples(torch.tensor([[0.0], [2.0]]), torch.zeros(2))
    collect_statistics(stages, modules, data, training=Training(batch_size=2), transform=same, seed=1)
    assert modules["m"].running_mean.item() == pytest.approx(0.0, abs=1e-6)
    assert modules["m"].running_var.item() == pytest.approx(2.0, rel=1e-4)


def test_batches_are_of_nearly_equal_sizes_so_that_none_has_one_sample():
    norm, sizes = nn.BatchNorm1d(1), []
    norm.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    data = Samples(torch.arange(9.0).reshape(9, 1), torch.zeros(9))
    training = Training(batch_size=4)
    result = collect_statistics((Stage("n", False),), {"n": norm}, data, training=training, transform=same, seed=1)
    assert (sizes, result.steps, result.processed) == ([3, 3, 3], 3, 9)


def test_dropout_is_off_and_parameters_stay_as_they_are(model):
    blocks = cut(model)
    stages = compile_part(Part(blocks=("a", "b"), trained=()), blocks).stages
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    state = torch.random.get_rng_state()
    found = []
    for seed in (1, 2):
        collect_statistics(
            stages, blocks.modules, samples(), training=Training(batch_size=8), transform=same, seed=seed
        )
        found.append(model.nb.running_mean.clone())
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.zeros(4))
    assert torch.equal(model.nc.running_mean, torch.zeros(4))  # of a block that the part does not hold
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_momenta_and_modes_are_restored_if_a_batch_fails():
    norm = nn.BatchNorm1d(1, momentum=0.3)
    data = Samples(torch.zeros(2, 5), torch.zeros(2))  # five features
    with pytest.raises(RuntimeError, match="running_mean"):
        collect_statistics((Stage("n", False),), {"n": norm}, data, training=Training(), transform=same, seed=1)
    assert (norm.momentum, norm.training) == (0.3, False)


def test_a_layer_without_statistics_is_left_alone():
    norm = nn.BatchNorm1d(1, track_running_stats=False, momentum=0.3)
    data = Samples(torch.arange(4.0).reshape(4, 1), torch.zeros(4))
    result = collect_statistics((Stage("n", False),), {"n": norm}, data, training=Training(), transform=same, seed=1)
    assert (result.steps, norm.running_mean, norm.momentum) == (1, None, 0.3)


def test_without_samples_nothing_is_collected():
    norm = nn.BatchNorm1d(1)
    empty = Samples(torch.zeros(0, 1), torch.zeros(0))
    result = collect_statistics((Stage("n", False),), {"n": norm}, empty, training=Training(), transform=same, seed=1)
    assert result == TrainingResult()
