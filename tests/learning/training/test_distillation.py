"""Ensemble distillation: the loss by hand, teachers, their corrected mean, what of the student is kept, and that it helps."""

import copy
import dataclasses
import itertools
import math

import msgspec
import numpy as np
import pytest
import torch
from fedbonsai.learning.data.config import DataConfig, Dirichlet, Partition, Shards
from fedbonsai.learning.data.load import load
from fedbonsai.learning.data.public import PublicSet, load_public_set
from fedbonsai.learning.data.types import FederatedData, Samples
from fedbonsai.learning.models import build
from fedbonsai.learning.spec import Call, Distillation, Training
from fedbonsai.learning.store import model_hash
from fedbonsai.learning.training.distillation import (
    DistillationResult,
    Figures,
    TeacherMean,
    adjust,
    distil,
    distillation_loss,
    teacher_logits,
)
from fedbonsai.learning.training.evaluation import evaluate
from fedbonsai.learning.training.losses import METRICS, make_loss
from fedbonsai.learning.training.training import train
from torch import Tensor, nn

CROSS_ENTROPY = make_loss(Call("cross_entropy"))
NONE = -math.inf


def as_it_is(x: Tensor, generator: torch.Generator) -> Tensor:
    return x


def public_set(x: Tensor, y: Tensor | None = None, *, held_out: int) -> PublicSet:
    """The last ``held_out`` samples are held out."""
    labels = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    order = np.arange(len(x))
    return PublicSet(
        samples=Samples(x, labels),
        transform=as_it_is,
        labelled=y is not None,
        train=order[:-held_out],
        held_out=order[-held_out:],
        digest="",
    )


def waves(count: int, *, features: int = 6) -> Tensor:
    return torch.arange(float(count * features)).mul(0.7).sin().view(count, features)


def network(*layers: nn.Module) -> nn.Sequential:
    """With the same weights each time."""
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(float(parameter.numel())).add(number).cos().view_as(parameter) / 2)
    return model


def small_net(*, dropout: float = 0.0) -> nn.Sequential:
    return network(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def goals(x: Tensor) -> Tensor:
    """Logits of three classes that a small net can learn."""
    return 4 * torch.stack([x[:, 0], x[:, 1], x[:, 2] - x[:, 0]], dim=1)


def short(**changes: object) -> Distillation:
    return Distillation(**{"steps": 40, "batch_size": 16, "learning_rate": 0.02, "check_every": 5} | changes)


def distilled(student: nn.Module, public: PublicSet, targets: Tensor, **changes: object) -> DistillationResult:
    return distil(student, public, targets, settings=short(**changes), trainable=None, seed=3)


# The loss.


def test_the_loss_by_hand_is_from_the_teacher_to_the_student() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2). The other direction gives 0.144."""
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(student, teacher, temperature=1.0).item() == pytest.approx(expected, abs=1e-7)
    assert expected == pytest.approx(0.1308, abs=1e-4)
    twice = distillation_loss(student.repeat(2, 1), torch.stack([teacher[0], torch.zeros(2)]), temperature=1.0)
    assert twice.item() == pytest.approx(expected / 2, abs=1e-7)  # a mean over samples, not over classes


def test_temperature_divides_logits_and_multiplies_the_loss_by_its_square() -> None:
    teacher, student = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[0.0, 1.0, 0.0]])
    hot = distillation_loss(student, teacher, temperature=3.0)
    assert hot.item() == pytest.approx(
        9 * distillation_loss(student / 3, teacher / 3, temperature=1.0).item(), rel=1e-6
    )
    # In the limit of large T the loss is half the mean squared difference of centred logits (Hinton et al., eq. 4).
    difference = (teacher - teacher.mean()) - (student - student.mean())
    limit = difference.square().mean() / 2
    assert distillation_loss(student, teacher, temperature=50.0).item() == pytest.approx(limit.item(), rel=2e-2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(temperature: float) -> None:
    logits = (5 * waves(8, features=10)).requires_grad_()
    loss = distillation_loss(logits, logits.detach() + 2, temperature=temperature)  # a constant changes nothing
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert abs(loss.item()) < 1e-7 * max(1.0, temperature**2)
    assert logits.grad.abs().max() < 1e-7 * max(1.0, temperature)


def test_a_class_without_a_target_is_left_out_and_gets_no_gradient() -> None:
    teacher, student = torch.tensor([[1.0, NONE, -1.0]]), torch.tensor([[0.5, 3.0, 0.0]], requires_grad=True)
    loss = distillation_loss(student, teacher, temperature=2.0)
    kept = [0, 2]
    without = distillation_loss(student[:, kept].detach(), teacher[:, kept], temperature=2.0)
    assert loss.item() == pytest.approx(without.item(), rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad[0, 1] == 0
    assert (student.grad[0, kept] != 0).all()


# Teachers.


def test_a_teacher_is_in_evaluation_mode_and_keeps_its_statistics() -> None:
    model, x = small_net(dropout=0.5), waves(20)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    logits = teacher_logits(model.train(), Samples(x, torch.zeros(20)), transform=as_it_is, batch_size=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert (logits.shape, logits.dtype, logits.requires_grad) == ((20, 3), torch.float32, False)
    assert torch.allclose(logits, model(x), atol=1e-6)


class Counting(nn.Module):
    """Counts its calls and draws random numbers, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(x.shape)
        return x + torch.randn(x.shape)


def test_what_a_teachers_code_changes_is_undone_and_its_random_numbers_repeat() -> None:
    model, samples = Counting(), Samples(waves(9), torch.zeros(9))
    first = teacher_logits(model, samples, transform=as_it_is, batch_size=4)
    assert torch.equal(teacher_logits(model, samples, transform=as_it_is, batch_size=4), first)
    assert (int(model.calls), model.shapes) == (0, [])


def test_logits_can_be_targets_of_a_loss() -> None:
    x = waves(4)
    targets = teacher_logits(small_net(), Samples(x, torch.zeros(4)), transform=as_it_is)
    student = nn.Linear(6, 3)
    distillation_loss(student(x), targets, temperature=1.0).backward()  # type: ignore[no-untyped-call]
    assert student.weight.grad is not None


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (nn.Unflatten(1, (3, 2)), r"shape \(4, 3, 2\)"),
        (nn.Linear(6, 1), r"shape \(4, 1\)"),
        (nn.Flatten(0), r"shape \(24,\)"),
        (Pair(), "a tuple"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused(model: nn.Module, given: str) -> None:
    with pytest.raises(ValueError, match=rf"needs logits \[sample, class\] .* the model gives {given} for 4 samples"):
        teacher_logits(model, Samples(waves(4), torch.zeros(4)), transform=as_it_is)


def test_without_samples_there_are_no_logits() -> None:
    with pytest.raises(ValueError, match="at least one public sample"):
        teacher_logits(small_net(), Samples(waves(4)[:0], torch.zeros(0)), transform=as_it_is)


# The correction for class shares.


def test_adjusted_logits_by_hand() -> None:
    """Shares 1/4, 3/4, 0: z - log p is (1 + log 4, 2 - log 3/4), whose mean is subtracted."""
    logits = torch.tensor([[1.0, 2.0, 9.0]])
    first, second = 1 + math.log(4), 2 - math.log(0.75)
    half = (first - second) / 2
    assert adjust(logits, [10, 30, 0], 1.0)[0].tolist() == pytest.approx([half, -half, NONE], abs=1e-6)
    weaker = (-1 + 0.5 * math.log(3)) / 2
    assert adjust(logits, [10, 30, 0], 0.5)[0].tolist() == pytest.approx([weaker, -weaker, NONE], abs=1e-6)


def test_a_teacher_of_all_classes_alike_is_changed_by_a_constant_for_each_sample() -> None:
    logits = waves(5)
    adjusted = adjust(logits, [7] * 6, 1.5)
    assert torch.allclose(torch.softmax(adjusted, 1), torch.softmax(logits, 1), atol=1e-6)
    moved = adjusted - logits
    assert torch.allclose(moved, moved[:, :1].expand(5, 6), atol=1e-6)
    assert torch.allclose(adjusted.sum(1), torch.zeros(5), atol=1e-5)


def test_strength_0_is_no_correction_at_all() -> None:
    logits = waves(5)
    assert torch.equal(adjust(logits, [3, 0, 0, 1, 0, 0], 0.0), logits)


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, -1], [1, 2, math.nan], [1, 2, 3, 4]])
def test_label_counts_that_do_not_fit_are_refused(counts: list[float]) -> None:
    with pytest.raises(ValueError, match="for logits of 3 classes; there must be a number from 0 for each class"):
        adjust(torch.zeros(2, 3), counts, 1.0)


def test_a_teacher_has_samples() -> None:
    with pytest.raises(ValueError, match="label counts are all 0"):
        adjust(torch.zeros(2, 3), [0, 0, 0], 1.0)


# The mean of the teachers.


def mean_of(teachers: list[tuple[Tensor, float]]) -> Tensor:
    mean = TeacherMean()
    for logits, weight in teachers:
        mean.add(logits, weight)
    assert mean.num_teachers == len(teachers)
    return mean.mean()


def teachers() -> list[tuple[Tensor, float]]:
    return [(10 * waves(7) * number, weight) for number, weight in enumerate((3.0, 1.0, 0.25, 700.0), start=1)]


def test_the_running_mean_is_the_plain_mean_in_any_order_and_repeats_to_the_bit() -> None:
    some = teachers()
    plain = sum((logits.double() * weight for logits, weight in some), torch.zeros(())) / sum(w for _, w in some)
    found = mean_of(some)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(mean_of(some), found)
    for order in itertools.permutations(some):
        assert torch.allclose(mean_of(list(order)), found, rtol=1e-6, atol=1e-6)


def test_a_teacher_is_not_changed_and_one_teacher_is_its_own_mean() -> None:
    logits = waves(4)
    before = logits.clone()
    assert torch.equal(mean_of([(logits, 1.0)]), before)
    mean_of([(logits, 2.0), (logits, 1.0)])
    assert torch.equal(logits, before)


def test_a_class_is_the_mean_of_the_teachers_that_have_seen_it() -> None:
    first = torch.tensor([[1.0, 3.0, NONE, NONE], [0.0, 2.0, NONE, NONE]])
    second = torch.tensor([[5.0, NONE, 4.0, NONE], [4.0, NONE, 6.0, NONE]])
    expected = [[4.0, 3.0, 4.0, NONE], [3.0, 2.0, 6.0, NONE]]
    assert mean_of([(first, 1.0), (second, 3.0)]).tolist() == expected
    assert mean_of([(second, 3.0), (first, 1.0)]).tolist() == expected


def test_teachers_that_cannot_be_added_change_nothing() -> None:
    mean = TeacherMean()
    with pytest.raises(ValueError, match="there is no teacher"):
        mean.mean()
    mean.add(waves(4), 1.0)
    before = mean.mean()
    for logits, weight, message in (
        (waves(4), 0.0, "the weight of a teacher is 0.0"),
        (waves(4), math.nan, "the weight of a teacher is nan"),
        (waves(5), 1.0, r"have shape \(5, 6\); those of others have \(4, 6\)"),
        (waves(4) / 0.0, 1.0, "not finite"),
        (torch.where(torch.arange(24).view(4, 6) == 7, NONE, waves(4)), 1.0, "not finite"),  # not the whole class
    ):
        with pytest.raises(ValueError, match=message):
            mean.add(logits, weight)
    assert mean.num_teachers == 1
    assert torch.equal(mean.mean(), before)


# The student.


def test_a_student_that_equals_its_teacher_stays_as_it_is() -> None:
    """Adam turns the rounding errors of a gradient of 0 into steps of full size; none of them is kept."""
    student, x = network(nn.Linear(6, 3)), waves(40)
    targets = teacher_logits(student, Samples(x, torch.zeros(40)), transform=as_it_is)
    before = model_hash(student.state_dict())
    result = distilled(student, public_set(x, held_out=10), targets)
    assert result.before.loss == pytest.approx(0.0, abs=1e-7)  # rounding depends on the processor
    assert result.best_step == 0
    assert model_hash(student.state_dict()) == before


def test_it_is_adam_with_a_cosine_to_0_and_clipped_gradients() -> None:
    """All samples in one batch, so that their order does not matter. The first gradients are far above the limit of 5."""
    x = 30 * waves(32)
    public, targets = public_set(x, held_out=8), 3 * goals(x)
    student, reference = network(nn.Linear(6, 3)), network(nn.Linear(6, 3))
    optimiser, norms = torch.optim.Adam(reference.parameters(), lr=0.05), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=6)
    for _ in range(6):
        optimiser.zero_grad()
        loss = 4 * nn.functional.kl_div(
            torch.log_softmax(reference(x[:24]) / 2, 1), torch.softmax(targets[:24] / 2, 1), reduction="batchmean"
        )
        loss.backward()  # type: ignore[no-untyped-call]
        norms.append(float(nn.utils.clip_grad_norm_(reference.parameters(), 5.0)))
        optimiser.step()
        schedule.step()
    assert norms[0] > 20
    result = distilled(
        student, public, targets, steps=6, learning_rate=0.05, temperature=2.0, batch_size=24, check_every=99
    )
    assert (result.steps, result.best_step, result.processed) == (6, 6, 6 * 24)
    assert torch.allclose(student[0].weight, reference[0].weight, atol=1e-5)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_best_student_is_kept_with_its_statistics_and_its_figures(labelled: bool) -> None:
    """Targets that contradict those held out: after a good beginning the student becomes worse and worse."""
    x = waves(60)
    targets = goals(x)
    y = targets.argmax(1) if labelled else None
    good = public_set(x, y, held_out=20)
    student = small_net()
    first = distilled(student, good, targets)
    assert first.best_step > 0
    assert first.after.better_than(first.before)
    assert (first.before.accuracy is not None) is labelled

    targets[:40] = -targets[:40]
    before = copy.deepcopy(student.state_dict())
    second = distilled(student, good, targets, patience=1000)
    assert second.steps == 40
    assert second.best_step == 0
    assert second.after == second.before
    assert second.before == first.after
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert (
        int(before["1.num_batches_tracked"]) == first.best_step
    )  # trained in training mode, and kept with the weights


def test_what_is_kept_is_the_best_of_all_evaluations() -> None:
    """The learning rate is so large that the figures go up and down."""
    x = waves(60)
    public, targets, student, losses = public_set(x, held_out=20), goals(x), small_net(), list[float]()

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        if not module.training:
            losses.append(distillation_loss(output, targets[40:], temperature=1.0).item())

    with student.register_forward_hook(note):
        result = distilled(student, public, targets, learning_rate=0.6, check_every=1, steps=12, patience=1000)
    assert len(losses) == 13
    assert losses != sorted(losses, reverse=True)
    assert 0 < result.best_step < 12
    assert result.best_step == losses.index(min(losses))
    assert (result.before.loss, result.after.loss) == pytest.approx((losses[0], min(losses)), rel=1e-6)
    assert result.evaluated == 13 * 20
    logits = teacher_logits(student, public.samples, transform=as_it_is)
    assert distillation_loss(logits[40:], targets[40:], temperature=1.0).item() == pytest.approx(min(losses), rel=1e-5)


def test_it_stops_after_so_many_steps_without_a_gain() -> None:
    x = waves(60)
    targets = goals(x)
    targets[:40] = -targets[:40]
    student = small_net()
    distilled(student, public_set(x, held_out=20), goals(x))
    result = distilled(student, public_set(x, held_out=20), targets, steps=1000, check_every=4, patience=10)
    assert (result.best_step, result.steps) == (0, 12)  # the first evaluation at or after step 10
    assert result.processed == 4 * 40  # three batches are one pass
    assert result.evaluated == 4 * 20


def test_without_steps_it_only_evaluates() -> None:
    x = waves(30)
    student = small_net(dropout=0.5)
    before = model_hash(student.state_dict())
    result = distilled(student, public_set(x, goals(x).argmax(1), held_out=10), goals(x), steps=0)
    assert model_hash(student.state_dict()) == before
    assert (result.steps, result.best_step, result.processed, result.evaluated) == (0, 0, 0, 10)
    assert result.before == result.after
    assert result.before.accuracy is not None


def test_equal_calls_give_equal_bits_and_leave_no_trace_in_the_random_state() -> None:
    x = waves(60)
    hashes = []
    for seed in (1, 1, 2):
        student, random = small_net(dropout=0.3), torch.get_rng_state()
        distil(student, public_set(x, held_out=20), goals(x), settings=short(), trainable=None, seed=seed)
        assert torch.equal(torch.get_rng_state(), random)
        hashes.append(model_hash(student.state_dict()))
        assert not student.training
        assert all(parameter.grad is None for parameter in student.parameters())
    assert hashes[0] == hashes[1] != hashes[2]


def test_only_named_tensors_are_trained() -> None:
    x, student = waves(60), small_net()
    before = copy.deepcopy(student.state_dict())
    names = ["4.weight", "4.bias"]
    result = distil(student, public_set(x, held_out=20), goals(x), settings=short(), trainable=names, seed=1)
    assert result.best_step > 0
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(names)
    frozen = distil(student, public_set(x, held_out=20), goals(x), settings=short(), trainable=[], seed=1)
    assert frozen.steps == 0


def test_figures_that_are_not_finite_are_never_the_best() -> None:
    x, student = waves(60), small_net()
    before = model_hash(student.state_dict())
    result = distilled(student, public_set(x, held_out=20), goals(x), learning_rate=1e30, patience=1000)
    assert (result.steps, result.best_step) == (40, 0)
    assert model_hash(student.state_dict()) == before
    assert Figures(9.0).better_than(Figures(math.nan))
    assert not Figures(math.nan, 1.0).better_than(Figures(math.inf, 0.0))
    assert Figures(2.0, 0.5).better_than(Figures(1.0, 0.4))
    assert Figures(1.0, 0.5).better_than(Figures(2.0, 0.5))


def test_targets_of_other_shapes_are_refused() -> None:
    x, student = waves(30), small_net()
    with pytest.raises(ValueError, match=r"are of shape \[6\] for each sample; the student gives 3 classes"):
        distilled(student, public_set(x, held_out=10), x)
    with pytest.raises(ValueError, match=r"have shape \(29, 3\) for 30 public samples"):
        distilled(student, public_set(x, held_out=10), goals(x)[1:])


def test_bf16_and_channels_last_are_close_to_float32() -> None:
    x = waves(40, features=32).view(40, 2, 4, 4)
    model = network(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    targets = 3 * x.flatten(1)[:, :3]
    losses = []
    for options in ({}, {"layout": "channels_last"}, {"precision": "bf16"}):
        student = copy.deepcopy(model)
        result = distil(
            student, public_set(x, held_out=10), targets, settings=short(), trainable=None, seed=1, **options
        )
        assert result.after.loss < 0.9 * result.before.loss
        losses.append(result.after.loss)
    assert losses == pytest.approx([losses[0]] * 3, rel=0.1)
    assert losses[2] != losses[0]


# On real data.


def federation(
    partition: Partition, num_devices: int, *, seed: int
) -> tuple[FederatedData, PublicSet, list[nn.Module]]:
    """Digits over devices with few classes each, a public share of 0.3, and a model trained on each device."""
    config = DataConfig(partition=partition, public_share=0.3)
    data = load(config, num_devices=num_devices, seed=seed)
    public = load_public_set(config, None, num_devices=num_devices, seed=seed, held_out=0.2, num_classes=10)
    models = []
    for device in range(num_devices):
        model = build(Call("digits_cnn"), seed=seed, outputs=10)
        train(
            model,
            data.train(device),
            training=Training(epochs=8),
            loss=CROSS_ENTROPY,
            transform=data.train_transform,
            seed=device,
        )
        models.append(model)
    return data, public, models


def counts(data: FederatedData, device: int) -> list[int]:
    return torch.bincount(data.train(device).y, minlength=10).tolist()


def targets_of(data: FederatedData, public: PublicSet, models: list[nn.Module], *, strength: float) -> Tensor:
    mean = TeacherMean()
    for device, model in enumerate(models):
        logits = teacher_logits(model, public.samples, transform=public.transform)
        mean.add(adjust(logits, counts(data, device), strength), 1.0)
    return mean.mean()


def averaged(data: FederatedData, models: list[nn.Module]) -> nn.Module:
    """FedAvg of one round."""
    result = copy.deepcopy(models[0])
    total = sum(data.num_samples(device) for device in range(len(models)))
    for name, tensor in result.state_dict().items():
        parts = [m.state_dict()[name] * (data.num_samples(device) / total) for device, m in enumerate(models)]
        tensor.copy_(torch.stack(parts).sum(0))
    return result


def test_distillation_raises_the_accuracy_of_the_averaged_model_under_label_skew() -> None:
    data, public, models = federation(Dirichlet(alpha=0.1), 3, seed=1)
    test = data.server_test()
    assert test is not None

    def accuracy(model: nn.Module) -> float:
        figures = evaluate(
            model,
            test,
            loss=CROSS_ENTROPY,
            metrics={"accuracy": METRICS["accuracy"]},
            transform=data.test_transform,
        )
        return figures["accuracy"]

    student = averaged(data, models)
    initial = accuracy(student)
    targets = targets_of(data, public, models, strength=1.0)
    settings = Distillation(steps=200, learning_rate=3e-3)
    result = distil(student, public, targets, settings=settings, trainable=None, seed=1)
    assert result.after.accuracy is not None
    assert result.before.accuracy is not None
    assert result.after.accuracy > result.before.accuracy + 0.08
    assert accuracy(student) > initial + 0.08
    assert accuracy(student) > max(accuracy(model) for model in models)
    # Labels are needed for the choice of the best student only.
    blind = averaged(data, models)
    without = dataclasses.replace(public, labelled=False)
    unlabelled = distil(blind, without, targets, settings=settings, trainable=None, seed=1)
    assert unlabelled.after.accuracy is None
    assert accuracy(blind) > initial + 0.08


def test_the_correction_for_class_shares_raises_the_accuracy_of_an_ensemble_of_two_class_teachers() -> None:
    data, public, models = federation(Shards(shards_per_device=2), 10, seed=1)
    assert all(np.count_nonzero(counts(data, device)) <= 4 for device in range(10))
    reached = {
        strength: (targets_of(data, public, models, strength=strength).argmax(1) == public.samples.y).double().mean()
        for strength in (0.0, 1.0)
    }
    assert reached[1.0] > reached[0.0] + 0.1, reached


def test_a_class_that_no_teacher_has_seen_is_left_as_it_is() -> None:
    data, public, models = federation(Dirichlet(alpha=0.1), 3, seed=1)
    mean = TeacherMean()
    logits = teacher_logits(models[0], public.samples, transform=public.transform)
    mean.add(adjust(logits, counts(data, 0), 1.0), 1.0)
    absent = [label for label, count in enumerate(counts(data, 0)) if not count]
    assert absent
    assert torch.isneginf(mean.mean()[:, absent]).all()
    student = averaged(data, models)
    last = [name for name, _ in student.named_parameters()][-1]
    before = student.get_parameter(last).detach().clone()
    settings = msgspec.structs.replace(short(), steps=10)
    result = distil(student, public, mean.mean(), settings=settings, trainable=[last], seed=1)
    assert math.isfinite(result.after.loss)
    assert result.best_step > 0
    after = student.get_parameter(last)
    assert torch.equal(after[absent], before[absent])
    assert not torch.equal(after, before)
