from pathlib import Path

import pytest
import torch
from fedbonsai.learning.spec import Call
from fedbonsai.learning.training.losses import (
    LOSSES,
    METRICS,
    default_metrics,
    lower_is_better,
    make_loss,
    make_metric,
    scalar_loss,
    summed_metric,
)
from torch import Tensor

MODULE = """
def scaled(output, target, *, by):
    return by * (output - target).abs().mean()

def error(output, target, *, power=1):
    return (output - target).abs() ** power

error.lower_is_better = True
number = 5
"""
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_losses.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_losses"


# every metric: output, target, one figure for each sample
TABLE = {
    "accuracy": (LOGITS, torch.tensor([0, 1, 1]), [1.0, 1.0, 0.0]),
    "squared_error": (torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]]), [5.0, 2.0]),
    "absolute_error": (torch.tensor([[1.0], [-2.0]]), torch.tensor([3.0, 0.0]), [2.0, 2.0]),
}


def test_the_table_is_complete() -> None:
    assert TABLE.keys() == METRICS.keys()


@pytest.mark.parametrize(("name", "output", "target", "expected"), [(n, *row) for n, row in TABLE.items()])
def test_metrics_by_hand(name: str, output: Tensor, target: Tensor, expected: list[float]) -> None:
    values = make_metric(Call(name))(output, target)
    assert values.tolist() == expected
    assert summed_metric(values, samples=len(output), name=name) == sum(expected)


def test_accuracy_of_a_sequence_is_the_share_of_right_steps() -> None:
    output = torch.tensor([[[5.0, 0.0, 5.0, 5.0], [0.0, 5.0, 0.0, 0.0]]])  # [sample, class, step]
    assert METRICS["accuracy"](output, torch.tensor([[0, 1, 0, 1]])).tolist() == [0.75]


@pytest.mark.parametrize(
    ("call", "output", "target", "expected"),
    [
        (Call("mse"), torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0]), 5.0),
        (Call("smooth_l1"), torch.tensor([[0.5], [3.0]]), torch.tensor([0.0, 0.0]), (0.125 + 2.5) / 2),
        (Call("smooth_l1", {"beta": 2.0}), torch.tensor([[1.0]]), torch.tensor([0.0]), 0.25),
        (Call("cross_entropy"), torch.zeros(3, 4), torch.tensor([0, 1, 2]), 1.3862944),
        (Call("nll"), -torch.ones(2, 3), torch.tensor([0, 2]), 1.0),
        (Call("bce_with_logits"), torch.zeros(2, 1), torch.ones(2, 1), 0.6931472),
    ],
    ids=lambda value: value.name if isinstance(value, Call) else "",
)
def test_losses_by_hand(call: Call, output: Tensor, target: Tensor, expected: float) -> None:
    assert call.name in LOSSES
    assert scalar_loss(make_loss(call)(output, target)).item() == pytest.approx(expected)


def test_a_keyword_reaches_torch() -> None:
    smoothed = make_loss(Call("cross_entropy", {"label_smoothing": 1.0}))
    assert smoothed(LOGITS, torch.tensor([0, 0, 0])) == smoothed(LOGITS, torch.tensor([1, 1, 1]))


def test_a_users_own_by_module_and_function(mine: str) -> None:
    loss = make_loss(Call(f"{mine}:scaled", {"by": 10}))
    metric = make_metric(Call(f"{mine}:error", {"power": 2}))
    output, target = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])
    assert loss(output, target).item() == 15
    assert metric(output, target).tolist() == [1, 4]
    assert lower_is_better(metric)
    assert lower_is_better(make_metric(Call(f"{mine}:error")))


def test_which_way_is_better() -> None:
    assert [name for name in METRICS if lower_is_better(METRICS[name])] == ["squared_error", "absolute_error"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (Call("crossentropy"), "training.loss is 'crossentropy'; it must be one of cross_entropy, nll, mse"),
        (Call("mse", {"beta": 1}), r"training.loss: 'mse' is called as fn\(output, target, \*\*kwargs\) with kwargs "),
        (Call("cross_entropy", {"smoothing": 1}), "unexpected keyword argument 'smoothing'"),
        (Call("my_losses:scaled"), "missing a required argument: 'by'"),
        (Call("my_losses:number"), "training.loss: 'my_losses:number' is not a function"),
        (Call("my_losses:nothing"), "has no 'nothing'"),
    ],
    ids=lambda value: value.name if isinstance(value, Call) else "",
)
@pytest.mark.usefixtures("mine")
def test_one_sentence_for_what_is_wrong(call: Call, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make_loss(call)
    assert "\n" not in str(caught.value)


def test_an_unknown_metric_names_its_field() -> None:
    with pytest.raises(ValueError, match=r"evaluation.metrics is 'f1'; it must be one of accuracy, squared_error"):
        make_metric(Call("f1"))


@pytest.mark.parametrize(
    ("value", "words"),
    [(torch.ones(3), r"shape \(3,\)"), (0.5, "a float"), (None, "a NoneType")],
)
def test_a_loss_is_one_number(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"training.loss returned {words}; it must return one number"):
        scalar_loss(value)
    assert scalar_loss(torch.tensor([2.0])).item() == 2


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.ones(3, 1), r"shape \(3, 1\)"),
        (torch.ones(2), r"shape \(2,\)"),
        (1.0, "a float"),
    ],
)
def test_a_metric_is_one_number_for_each_sample(value: object, words: str) -> None:
    with pytest.raises(
        ValueError, match=f"metric 'mine' returned {words}; it must return one number per sample, shape"
    ):
        summed_metric(value, samples=3, name="mine")


def test_hits_may_be_booleans() -> None:
    assert summed_metric(torch.tensor([True, False, True]), samples=3, name="hit") == 2.0


@pytest.mark.parametrize(
    ("output", "target"), [((4, 3), (4, 1)), ((4, 1), (4,)), ((4,), (4,)), ((4, 3), (4, 3)), ((4, 3, 2), (4,))]
)
def test_accuracy_of_other_shapes_is_refused(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="accuracy takes scores"):
        METRICS["accuracy"](torch.zeros(output), torch.zeros(target, dtype=torch.int64))


@pytest.mark.parametrize(
    ("loss", "target", "expected"),
    [
        ("cross_entropy", torch.tensor(3), ["accuracy"]),
        ("nll", torch.tensor([1, 2]), ["accuracy"]),
        ("my:own", torch.tensor(3), ["accuracy"]),
        ("cross_entropy", torch.tensor([0.5, 0.5]), []),
        ("my:own", torch.tensor(0.5), []),
        ("mse", torch.tensor(3), []),
        ("smooth_l1", torch.tensor(3.0), []),
        ("bce_with_logits", torch.tensor(1), []),
    ],
)
def test_the_default_metric_is_accuracy_of_class_labels(loss: str, target: Tensor, expected: list[str]) -> None:
    assert [call.name for call in default_metrics(Call(loss), target)] == expected
