"""Targets on their way: labels in as few bytes as their classes need, and back."""

import pytest
import torch
from fedbonsai.actors.messages.labels import Labels
from fedbonsai.learning.spec import Call

LABEL = torch.tensor(3)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(10, "|i1"), (128, "|i1"), (129, "<i2"), (1000, "<i2"), (32769, "<i8"), (None, "<i8")]
)
def test_as_narrow_as_the_number_of_classes_allows(classes, dtype):
    labels = Labels(LABEL, classes)
    assert (labels.shape, labels.dtype) == ((), dtype)
    there = labels.narrowed(torch.tensor([0, 5, (classes or 8) - 1]))
    back = labels.widened(there)
    assert back.dtype == torch.int64
    assert back.tolist() == [0, 5, (classes or 8) - 1]


def test_labels_that_a_loss_leaves_out_are_kept_in_any_shape():
    targets = torch.tensor([[-100, 1], [2, -1]])
    labels = Labels(targets[0], 3)
    assert labels.shape == (2,)
    assert torch.equal(labels.widened(labels.narrowed(targets)), targets)


def test_a_label_that_the_loss_is_told_to_leave_out_fits():
    labels = Labels(LABEL, 3, Call("cross_entropy", {"ignore_index": 255}))
    assert labels.dtype == "<i2"
    assert labels.widened(labels.narrowed(torch.tensor([0, 255]))).tolist() == [0, 255]
    assert Labels(LABEL, 3, Call("cross_entropy", {"ignore_index": -100})).dtype == "|i1"


def test_other_targets_travel_as_they_are():
    targets = torch.tensor([[0.5, 1e-9]])
    labels = Labels(targets[0], None)
    assert labels.dtype == "<f4"
    assert torch.equal(labels.widened(labels.narrowed(targets)), targets)
    assert Labels(torch.tensor(2, dtype=torch.int32), 10).dtype == "<i4"


def test_labels_that_would_not_come_back_are_refused():
    with pytest.raises(
        ValueError, match="labels from 1 to 300; for so few classes they travel as numbers from -128 to 127"
    ):
        Labels(LABEL, 10).narrowed(torch.tensor([1, 300]))
    assert Labels(LABEL, 10).narrowed(torch.empty(0, dtype=torch.int64)).tolist() == []
