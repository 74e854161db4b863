import numpy as np
from fedbonsai.learning.data.digits import load_digits
from fedbonsai.learning.data.types import Samples


def everything() -> tuple[Samples, Samples]:
    pool = load_digits()
    assert pool.test is not None
    return pool.train.take(np.arange(len(pool.train))), pool.test.take(np.arange(len(pool.test)))


def test_shapes_and_scale() -> None:
    train, test = everything()
    assert (train.x.shape, test.x.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (str(train.x.dtype), str(train.y.dtype)) == ("torch.float32", "torch.int64")
    assert (train.x.min().item(), train.x.max().item()) == (0.0, 1.0)


def test_every_class_is_in_the_test_set_in_proportion() -> None:
    train, test = everything()
    of_all = np.bincount(np.concatenate([train.y, test.y]))
    assert np.abs(np.bincount(test.y) - of_all / 5).max() <= 1


def test_it_is_what_scikit_learn_would_load() -> None:
    from sklearn.datasets import load_digits as reference

    train, test = everything()
    x, y = reference(return_X_y=True)

    def rows(pixels: np.ndarray, labels: np.ndarray) -> list[bytes]:
        return sorted(bytes([*row.astype(np.uint8), label]) for row, label in zip(pixels, labels, strict=True))

    ours = np.concatenate([train.x, test.x]).reshape(1797, 64) * 16
    assert rows(ours, np.concatenate([train.y, test.y]).astype(np.uint8)) == rows(x, y.astype(np.uint8))
