"""Costs of parts: FLOPs and memory, computed by hand and against published and measured figures."""

import pytest
import torch
import torch.nn.functional as F
from fedbonsai.learning.costs.cost import part_cost
from fedbonsai.learning.models import build
from fedbonsai.learning.parts.auxiliaries import LinearHead, empty_head
from fedbonsai.learning.parts.blocks import cut
from fedbonsai.learning.parts.part import Part, whole
from fedbonsai.learning.parts.submodel import compile_part
from fedbonsai.learning.spec import Call, Optimiser, PartCost, Training
from fedbonsai.learning.training.split import boundary
from torch import Tensor, nn

IMAGE = (torch.zeros(3, 32, 32), torch.tensor(1))
MIB = 2**20


def cost(
    model: nn.Module,
    *,
    example: tuple[Tensor, Tensor] = IMAGE,
    held: tuple[str, ...] = (),
    trained: tuple[str, ...] | None = None,
    loss: object = F.cross_entropy,
    ahead: int = 1,
    **training: object,
) -> PartCost:
    """Cost of the whole model, or of some blocks."""
    blocks = cut(model)
    part = whole(blocks.spec) if not held else Part(blocks=held, trained=held if trained is None else trained)
    return part_cost(compile_part(part, blocks), example=example, training=Training(**training), loss=loss, ahead=ahead)


def named(name: str, **kwargs: object) -> nn.Module:
    return build(Call(name, kwargs), seed=0, outputs=10)


def two_layers() -> nn.Module:
    """4 to 3 to 2: 12 and 6 multiplications a sample."""
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))


VECTORS = (torch.zeros(4), torch.zeros(2))


def test_flops_by_hand():
    found = cost(two_layers(), example=VECTORS, loss=F.mse_loss)
    assert found.parameters == 18
    assert found.forward_flops == 2 * (12 + 6)
    # Backward: weights of both layers, and the input's gradient of the second only.
    assert found.training_flops == 2 * (12 + 6) + 2 * (12 + 6) + 2 * 6
    assert found.boundary_items == 2


def test_a_hosts_part_that_returns_no_gradient_computes_none_for_its_input():
    blocks = cut(two_layers())
    found = [
        part_cost(
            compile_part(Part(blocks=("1",), trained=("1",)), blocks),
            example=VECTORS,
            training=Training(),
            loss=F.mse_loss,
            entering_gradient=entering,
        ).training_flops
        for entering in (True, False)
    ]
    assert found == [12 + 12 + 12, 12 + 12]


@pytest.mark.parametrize(
    ("held", "trained", "parameters", "forward", "training", "boundary"),
    [
        (("0",), ("0",), 12, 24, 24 + 24, 3),
        (("0", "1"), ("1",), 18, 36, 36 + 12, 2),  # the frozen first one runs without gradients
        (("0", "1"), ("0",), 18, 36, 36 + 12 + 24, 2),  # gradients pass the frozen second one
        (("0", "1"), (), 18, 36, 36, 2),
        (("1",), ("1",), 6, 12, 12 + 12 + 12, 2),  # a host's part: it computes the gradient of its input too
    ],
)
def test_parts_by_hand(held, trained, parameters, forward, training, boundary):
    found = cost(two_layers(), example=VECTORS, loss=F.mse_loss, held=held, trained=trained)
    assert (found.parameters, found.forward_flops) == (parameters, forward)
    assert (found.training_flops, found.boundary_items) == (training, boundary)


def test_an_auxiliary_head_is_trained_with_its_part():
    blocks, head = cut(two_layers()), LinearHead((3,), (2,))
    part = Part(blocks=("0",), trained=("0",), head="linear@0", auxiliaries=("linear@0",))
    example, loss = VECTORS, F.mse_loss
    found = part_cost(compile_part(part, blocks), example=example, training=Training(), loss=loss, head=head)
    assert (found.parameters, found.boundary_items) == (12 + 6 + 2, 2)
    assert (found.forward_flops, found.training_flops) == (
        24 + 12,
        36 + 24 + 12 + 12,
    )  # weights of both, the head's input
    shapes = empty_head((3,), (2,))  # only the sizes of the weights are used
    assert found == part_cost(compile_part(part, blocks), example=example, training=Training(), loss=loss, head=shapes)
    alone = part_cost(
        compile_part(Part(blocks=("0",), trained=("0",)), blocks), example=example, training=Training(), loss=loss
    )
    assert found.peak_memory_bytes > alone.peak_memory_bytes
    for head_given, other in ((None, part), (head, Part(blocks=("0",), trained=("0",)))):
        with pytest.raises(ValueError, match="auxiliary heads; costs are known with"):
            part_cost(compile_part(other, blocks), head=head_given, example=example, training=Training(), loss=loss)


def test_memory_by_hand():
    """One layer of 1000 x 1000 with negligible activations: 4 MB for each copy of it."""
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Flatten())
    example = (torch.zeros(1000), torch.zeros(1000))

    def copies(**training: object) -> float:
        return cost(model, example=example, loss=F.mse_loss, batch_size=2, **training).peak_memory_bytes / 4e6

    def optimiser(**settings: object) -> dict[str, Optimiser]:
        return {"optimiser": Optimiser(**settings)}

    assert copies(**optimiser(momentum=0.0)) == pytest.approx(2, rel=0.02)  # weights, gradients
    assert copies(**optimiser(momentum=0.9)) == pytest.approx(3, rel=0.02)
    assert copies(**optimiser(name="adam")) == pytest.approx(4, rel=0.02)
    assert copies(**optimiser(momentum=0.0, proximal=0.1)) == pytest.approx(4, rel=0.02)  # plus start and difference
    # Three outstanding micro-batches: also the weights of each. Two halves of one batch share theirs.
    assert copies(**optimiser(momentum=0.0), ahead=3) == pytest.approx(2 + 3, rel=0.02)
    assert copies(**optimiser(momentum=0.0), ahead=3, accumulation=2) == pytest.approx(2 + 2 + 1, rel=0.02)


def test_what_is_ahead_keeps_its_activations():
    """Four outstanding micro-batches of 8 need the activations of one of 32; resfed_cnn's 1,020,160 parameters take 4 MB."""
    model, weights = named("resfed_cnn"), 4 * 1_020_160
    ahead = cost(model, batch_size=8, ahead=4).peak_memory_bytes - 4 * weights
    together = cost(model, batch_size=32).peak_memory_bytes
    alone = cost(model, batch_size=8).peak_memory_bytes
    assert alone < 0.5 * together
    assert 0.7 * together < ahead < 1.2 * together


def test_memory_of_micro_batches_and_checkpointing():
    model = named("resfed_cnn")
    plain = cost(model, batch_size=64)
    half = cost(model, batch_size=64, accumulation=2)
    assert half.peak_memory_bytes < 0.6 * plain.peak_memory_bytes
    assert (
        half.peak_memory_bytes > cost(model, batch_size=32).peak_memory_bytes
    )  # gradients of earlier micro-batches are live
    recomputed = cost(model, batch_size=64, checkpointing=True)
    assert recomputed.peak_memory_bytes < plain.peak_memory_bytes
    # Every block is recomputed, except the last layer: recomputation stops at the last tensor that is needed, its input.
    assert recomputed.training_flops == plain.training_flops + plain.forward_flops - 2 * 4096 * 10
    assert cost(model, batch_size=64, precision="bf16").peak_memory_bytes < plain.peak_memory_bytes


def test_blocks_may_exchange_tuples():
    found = cost(named("torchvision/shufflenet_v2_x0_5", stem="cifar"))
    assert found.training_flops > 2 * found.forward_flops
    assert found.process_memory_bytes > found.peak_memory_bytes


def test_resfed_cnn_flops_by_hand():
    macs = 1024 * (3 * 32 * 9 + 32 * 64 * 9) + 256 * (64 * 128 * 9 + 128 * 256 * 9) + 64 * 256 * 256 * 9 + 4096 * 10
    found = cost(named("resfed_cnn"))
    assert found.forward_flops == 2 * macs
    # The backward pass costs twice as much, without the image's gradient, which is not needed.
    assert found.training_flops == 6 * macs - 2 * 1024 * 3 * 32 * 9
    assert found.parameters == 1_020_160


def test_vgg16_has_the_papers_0_33_giga_multiplications():
    assert cost(named("vgg16_bn")).forward_flops / 2e9 == pytest.approx(0.3321, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "batch_size", "measured_mib"),
    [
        ("resnet18", 32, 258),
        ("resnet18", 128, 679),
        ("torchvision/resnet34", 128, 1158),
    ],
)
def test_peak_memory_of_resnets_is_what_was_measured(name, batch_size, measured_mib):
    """Peak of live tensors of real training steps: ResNets with the CIFAR stem, SGD with momentum, 32x32 images."""
    found = cost(named(name, stem="cifar"), batch_size=batch_size)
    assert found.peak_memory_bytes / MIB == pytest.approx(measured_mib, rel=0.01)


def test_the_last_of_four_stages_behind_a_frozen_prefix_is_what_was_measured():
    model = named("resnet18")
    names = cut(model).spec.block_names
    found = cost(model, held=names, trained=names[-3:], batch_size=32)
    assert found.peak_memory_bytes / MIB == pytest.approx(110, rel=0.01)
    assert found.training_flops < 1.5 * found.forward_flops


def test_large_batches_are_not_allocated():
    """A batch of a million images would need terabytes."""
    assert cost(named("resnet18"), batch_size=1_000_000).peak_memory_bytes > 2**42


def test_attention_recurrent_and_grouped_layers_are_counted():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Flatten(), nn.Linear(16, 2, bias=False)
    )
    found = cost(model, example=(torch.zeros(4, 2, 2), torch.zeros(2)), loss=F.mse_loss)
    assert found.forward_flops == 2 * (4 * 4 * 9 + 32)
    assert found.training_flops == 2 * (2 * 4 * 4 * 9 + 3 * 32)

    found = cost(Recurrent(), example=(torch.zeros(7, 4), torch.zeros(1)), loss=F.mse_loss)
    assert found.forward_flops == 2 * (7 * 20 * (4 + 5) + 5)
    assert found.training_flops == 3 * found.forward_flops

    # Attention over 6 tokens of 8: in and out projections, scores and mixture.
    found = cost(Attention(), example=(torch.zeros(6, 8), torch.zeros(6, 8)), loss=F.mse_loss)
    assert found.forward_flops == 2 * (4 * 6 * 8 * 8 + 2 * 6 * 6 * 8)


class Recurrent(nn.Module):
    """A sequence of 4 features to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """One layer of self-attention, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Branching(nn.Module):
    """Branches on a value, so torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_models_may_branch_on_values():
    model = Branching()
    found = cost(model, example=VECTORS, loss=F.mse_loss)
    assert (found.forward_flops, found.training_flops, found.parameters) == (16, 32, 8)
    assert model.layer.weight.grad is None


class Elsewhere(nn.Module):
    """Leaves torch in its forward pass: for numpy, or for what ``leave`` does."""

    def __init__(self, leave: object) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, bias=False)
        self.leave = leave

    def forward(self, x: Tensor) -> Tensor:
        self.leave(x)
        return self.layer(x)


@pytest.mark.parametrize(
    "leave",
    [lambda x: x.numpy(), lambda x: f"{x.sum():.1f}", lambda x: x.nonzero(), lambda x: x.tolist()],
    ids=["numpy", "format", "nonzero", "list"],
)
def test_models_may_leave_torch_in_the_forward_pass(leave):
    assert cost(Elsewhere(leave), example=VECTORS, loss=F.mse_loss).forward_flops == 16


FLOATS, LABEL = torch.zeros(4), torch.tensor(1)


@pytest.mark.parametrize(
    ("x", "y", "loss", "words"),
    [
        (FLOATS, LABEL.int(), F.cross_entropy, r"\(torch.int32\): RuntimeError: expected target dtype to be Long .*Int; most"),
        (FLOATS.double(), LABEL, F.cross_entropy, r"\(torch.float64\) .* RuntimeError: .*dtype.*double != float; most"),
        (FLOATS.half(), LABEL, F.cross_entropy, r"\(torch.float16\) .* int64 labels$"),
        (FLOATS.long(), LABEL, F.cross_entropy, r"\(torch.int64\) with .* long int != float$"),
    ],
)  # fmt: skip
def test_types_that_do_not_go_together_are_refused(x, y, loss, words):
    """Training would fail on every device."""
    with pytest.raises(ValueError, match=words) as caught:
        cost(two_layers(), example=(x, y), loss=loss)
    assert "\n" not in str(caught.value)


def test_unusual_types_that_go_together_are_not():
    found = cost(two_layers().double(), example=(FLOATS.double(), torch.zeros(2).double()), loss=F.mse_loss)
    assert found.forward_flops == 36
    with pytest.raises(ValueError, match="fail on a sample"):
        cost(two_layers().double(), example=VECTORS, loss=F.mse_loss)


def test_the_model_is_unchanged():
    model = named("resnet18").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    cost(model, batch_size=4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_any_input_and_target():
    """Maps token numbers to one number per token."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 1))
    example = (torch.zeros(5, dtype=torch.int64), torch.zeros(5, 1))
    assert cost(model, example=example, loss=F.mse_loss).forward_flops == 2 * 5 * 4
    assert cost(model, example=example, loss=F.mse_loss, held=("0",)).boundary_items == 20


def test_normalisation_whose_momentum_is_a_mean_over_all_batches():
    """Reads a counter's value in its forward pass."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 2, bias=False))
    found = cost(model, example=VECTORS, loss=F.mse_loss)
    assert found.forward_flops == 2 * (12 + 6)
    assert model[1].num_batches_tracked == 0
    crossing = boundary(cut(model), ("0",), example=VECTORS[0], training=Training())
    assert crossing.shape == (3,)
    assert model[1].num_batches_tracked == 0


def test_the_cost_of_a_large_head_is_counted_without_its_weights():
    """A billion weights behind the first block: 4 GB for each copy."""
    blocks = cut(nn.Sequential(nn.Conv2d(1, 100, 1, bias=False), nn.Flatten(), nn.Linear(100 * 100, 2)))
    head = empty_head((100, 10, 10), (100_000,))
    part = Part(blocks=("0",), trained=("0",), head="linear@0", auxiliaries=("linear@0",))
    example, training = (torch.zeros(1, 10, 10), torch.tensor(3)), Training(batch_size=2)
    found = part_cost(compile_part(part, blocks), example=example, training=training, loss=F.cross_entropy, head=head)
    assert found.forward_flops == 2 * (100 * 100 + 10**9)
    assert found.training_flops == 2 * (2 * 100 * 100 + 3 * 10**9)  # the picture's gradient is not needed
    assert found.peak_memory_bytes == pytest.approx(3 * 4e9, rel=0.01)  # weights, gradients, momentum


def test_errors():
    with pytest.raises(ValueError, match=r"model and its loss fail on a sample of shape \(3, 16, 16\) .*mat1 and mat2"):
        cost(named("digits_cnn", in_channels=3), example=(torch.zeros(3, 16, 16), torch.tensor(1)))
    with pytest.raises(ValueError, match=r"part\.blocks names 'other', which this model does not have"):
        cost(two_layers(), held=("other",))
    with pytest.raises(
        ValueError, match=r"part\.blocks is \('1', '0'\); it must be neighbours, in order, of these: 0, 1"
    ):
        cost(two_layers(), held=("1", "0"))
    with pytest.raises(ValueError, match=r"part\.trained names '1', which is not in part.blocks: 0"):
        cost(two_layers(), held=("0",), trained=("1",))
