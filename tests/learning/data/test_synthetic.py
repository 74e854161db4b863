import tracemalloc

import torch
from fedbonsai.learning.data.config import DataConfig
from fedbonsai.learning.data.load import load
from fedbonsai.learning.data.types import FederatedData


def synthetic(num_devices: int = 4, seed: int = 1, **kwargs: object) -> FederatedData:
    return load(DataConfig(name="synthetic", kwargs=kwargs), num_devices=num_devices, seed=seed)


def test_shapes_follow_the_keywords() -> None:
    data = synthetic(shape=[5, 3], classes=4, samples_per_device=7, test_samples=9)
    samples = data.train(2)
    assert (samples.x.shape, samples.x.dtype) == ((7, 5, 3), torch.float32)
    assert (samples.y.shape, samples.y.dtype) == ((7,), torch.int64)
    assert samples.y.max() < 4
    assert (data.num_samples(2), data.num_classes) == (7, 4)
    server = data.server_test()
    assert server is not None
    assert len(server) == 9


def test_a_devices_samples_do_not_depend_on_the_number_of_devices() -> None:
    few, many = synthetic(num_devices=3), synthetic(num_devices=300)
    assert torch.equal(few.train(2).x, many.train(2).x)
    assert torch.equal(few.train(2).y, many.train(2).y)
    assert not torch.equal(few.train(2).x, few.train(1).x)
    assert not torch.equal(few.train(2).x, synthetic(num_devices=3, seed=2).train(2).x)
    assert few.digest()["split"] != many.digest()["split"]


def test_ten_thousand_devices_cost_nothing_until_used() -> None:
    tracemalloc.start()
    data = synthetic(num_devices=10_000, shape=[3, 32, 32])
    total = sum(data.num_samples(device) for device in range(10_000))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 320_000
    assert peak_bytes < 1_000_000  # the samples of one device take 393,216 bytes
    assert data.train(9_999).x.shape == (32, 3, 32, 32)


def test_labels_can_be_learnt_across_devices() -> None:
    data = synthetic(num_devices=20, classes=5, shape=[20], signal=1.0)
    x = torch.cat([data.train(d).x for d in range(20)])
    y = torch.cat([data.train(d).y for d in range(20)])
    means = torch.stack([x[y == label].mean(0) for label in range(5)])
    server = data.server_test()
    assert server is not None

    def accuracy(test_x: torch.Tensor, test_y: torch.Tensor) -> float:
        return float((torch.cdist(test_x, means).argmin(1) == test_y).float().mean())

    assert accuracy(server.x, server.y) > 0.9
    unlearnable = synthetic(num_devices=20, classes=5, shape=[20], signal=0.0).server_test()
    assert unlearnable is not None
    assert accuracy(unlearnable.x, unlearnable.y) < 0.4


def test_regression_has_float_targets_and_no_classes() -> None:
    data = synthetic(classes=None, shape=[6], signal=10.0, samples_per_device=200)
    assert data.num_classes is None
    first, second = data.train(0), data.train(1)
    assert (first.y.shape, first.y.dtype) == ((200, 1), torch.float32)
    weights = torch.linalg.lstsq(first.x, first.y).solution
    assert float((second.x @ weights - second.y).var()) < 1.5 < 10 < float(second.y.var())


def test_no_test_samples_no_server_data() -> None:
    assert synthetic(test_samples=0).server_test() is None
