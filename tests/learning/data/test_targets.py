"""Targets that do not fit the loss and the model's output are refused before training."""

from typing import Any

import numpy as np
import pytest
import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.data.devices import DeviceData, PoolShares
from fedbonsai.learning.data.load import load
from fedbonsai.learning.data.targets import known_targets, unfit_targets
from fedbonsai.learning.data.types import SamplePool, Samples
from fedbonsai.learning.spec import Call

ONE_HOT = [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]


def found(targets: list[Any], output: tuple[int, ...], loss: str = "cross_entropy", **kwargs: Any) -> str:
    return unfit_targets(np.array(targets), place="test", loss=Call(loss, kwargs), output=output)


@pytest.mark.parametrize(
    ("targets", "output", "loss"),
    [
        ([0, 2, 1], (2, 3), "cross_entropy"),
        ([0, 2, -100], (2, 3), "nll"),  # torch's default of ignore_index
        ([[0, 2], [1, 1]], (2, 3, 2), "cross_entropy"),  # a label for each position
        (ONE_HOT, (2, 3), "cross_entropy"),
        ([0.0, 1.0, 0.5], (2,), "bce_with_logits"),
        ([[-3.5], [9.0]], (2, 1), "mse"),
        ([7, -2], (2, 1), "smooth_l1"),
        ([99, -99], (2, 1), "module:own"),  # nothing is checked for it
    ],
)
def test_what_goes_together(targets, output, loss):
    assert found(targets, output, loss) == ""


@pytest.mark.parametrize(
    ("targets", "output", "loss", "sentence"),
    [
        ([0, 1, 3], (2, 3), "cross_entropy", "data: the target of test sample 2 is 3; the model gives 3 scores, so that labels "
         "must be 0 to 2"),
        ([0, -1, 3], (2, 3), "nll", "data: the target of test sample 1 is -1; the model gives 3 scores"),
        ([[0, 1], [2, 5]], (2, 3, 2), "cross_entropy", "data: the target of test sample 1 is [2, 5, ...]; the model gives 3"),
        ([[0], [1]], (2, 3), "cross_entropy", "data: targets of test samples have shape [1]; training.loss 'cross_entropy' "
         "takes one label for each, where the model gives shape [3]; for targets that are numbers use mse or smooth_l1"),
        ([[0.5], [1.5]], (2, 1), "cross_entropy", "training.loss is 'cross_entropy', which takes a score for each of two "
         "classes or more, [sample, class, ...]; the model gives shape [2, 1] for 2 samples; for targets that are numbers"),
        ([0, 0], (2, 1), "nll", "training.loss is 'nll', which takes a score for each of two classes or more"),
        ([0, 0], (2,), "cross_entropy", "training.loss is 'cross_entropy', which takes a score for each"),
        ([0.5, 1.5], (2, 3), "cross_entropy", "data: targets of test samples have shape []; training.loss 'cross_entropy' "
         "takes probabilities of shape [3] for each"),
        ([[0.2, 0.8], [1.5, -0.5]], (2, 2), "cross_entropy", "data: the target of test sample 1 is [1.5, -0.5, ...]; "
         "training.loss is 'cross_entropy', whose targets must be labels, or probabilities that sum to 1"),
        ([[0.2, 0.8], [0.5, 0.6]], (2, 2), "cross_entropy", "data: the target of test sample 1 is [0.5, 0.6, ...]"),
        ([0.0, 2.0], (2,), "bce_with_logits", "data: the target of test sample 1 is 2.0; training.loss is 'bce_with_logits', "
         "whose targets must be 0 to 1"),
    ],
)  # fmt: skip
def test_what_does_not(targets, output, loss, sentence):
    assert found(targets, output, loss).startswith(sentence)


def test_a_label_that_the_user_ignores_may_be_any():
    assert found([0, 255], (2, 3), ignore_index=255) == ""
    assert found([0, -100], (2, 3), ignore_index=255).startswith("data: the target of test sample 1 is -100")


def test_of_a_pool_all_targets_are_known_and_of_others_the_first_devices():
    pool = SamplePool(train=Samples(torch.zeros(4), torch.arange(4)), test=Samples(torch.zeros(2), torch.arange(2)))
    shares = PoolShares(pool, [np.array([0, 1]), np.array([2, 3])])
    plain = {"num_classes": 4, "train_transform": None, "test_transform": None, "with_server_test": True}
    data = DeviceData(shares=shares, test_share=0.0, seed=0, **plain)
    assert [(place, each.tolist()) for place, each in known_targets(data)] == [
        ("training", [0, 1, 2, 3]),
        ("test", [0, 1]),
    ]
    drawn = load(DataConfig(name="synthetic", kwargs={"samples_per_device": 4000}), num_devices=9, seed=0)
    assert [(place, len(each)) for place, each in known_targets(drawn)] == [(f"device {d}'s", 4000) for d in range(3)]
