"""Targets in a stream: labels take as few bytes as their classes need, and are decoded to what they were."""

import pytest
import torch
from fedbonsai.actors.messages.stream import Labels
from fedbonsai.learning.spec import Call

LABEL = torch.tensor(3)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(10, "|i1"), (128, "|i1"), (129, "<i2"), (1000, "<i2"), (32769, "<i8"), (None, "<i8")]
)
def test_labels_take_the_narrowest_type_that_holds_all_classes(classes, dtype):
    labels = Labels(LABEL, classes)
    assert (labels.shape, labels.dtype) == ((), dtype)
    encoded = labels.encode(torch.tensor([0, 5, (classes or 8) - 1]))
    decoded = labels.decode(encoded)
    assert decoded.dtype == torch.int64
    assert decoded.tolist() == [0, 5, (classes or 8) - 1]


def test_labels_that_a_loss_ignores_are_kept_in_any_shape():
    targets = torch.tensor([[-100, 1], [2, -1]])
    labels = Labels(targets[0], 3)
    assert labels.shape == (2,)
    assert torch.equal(labels.decode(labels.encode(targets)), targets)


def test_the_ignore_index_of_the_loss_fits_into_the_type():
    labels = Labels(LABEL, 3, Call("cross_entropy", {"ignore_index": 255}))
    assert labels.dtype == "<i2"
    assert labels.decode(labels.encode(torch.tensor([0, 255]))).tolist() == [0, 255]
    assert Labels(LABEL, 3, Call("cross_entropy", {"ignore_index": -100})).dtype == "|i1"


def test_other_targets_keep_their_type():
    targets = torch.tensor([[0.5, 1e-9]])
    labels = Labels(targets[0], None)
    assert labels.dtype == "<f4"
    assert torch.equal(labels.decode(labels.encode(targets)), targets)
    assert Labels(torch.tensor(2, dtype=torch.int32), 10).dtype == "<i4"


def test_labels_outside_the_type_are_refused():
    with pytest.raises(
        ValueError, match="labels from 1 to 300; for so few classes they are sent as numbers from -128 to 127"
    ):
        Labels(LABEL, 10).encode(torch.tensor([1, 300]))
    assert Labels(LABEL, 10).encode(torch.empty(0, dtype=torch.int64)).tolist() == []
