"""Networks of benchmarks/zerofl.py: that of LEAF for FEMNIST, and a smaller one of the same kind."""

from torch import Tensor, nn


class FemnistCnn(nn.Module):
    """LEAF's network for 28x28 images: two 5x5 convolutions with pooling, and two linear layers.

    Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018, arXiv 1812.01097. In ZeroFL all its layers but the last
    one are sparse (``SPARSE``). With the default widths it has 6,603,710 parameters at 62 classes.
    """

    def __init__(self, num_classes: int = 62, *, channels: tuple[int, int] = (32, 64), hidden: int = 2048) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(1, first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2)
        self.fc1 = nn.Linear(second * 7 * 7, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, 1, 28, 28] to [n, classes]."""
        y = self.pool(self.relu(self.conv1(x)))
        y = self.pool(self.relu(self.conv2(y))).flatten(1)
        return self.fc2(self.relu(self.fc1(y)))


SPARSE = ("conv1", "conv2", "fc1")


def femnist_cnn(num_classes: int = 62) -> nn.Module:
    """LEAF's network for FEMNIST."""
    return FemnistCnn(num_classes)


def digits_cnn(num_classes: int = 10) -> nn.Module:
    """The same network with 16 and 32 channels and 256 hidden values; 421,642 parameters at 10 classes."""
    return FemnistCnn(num_classes, channels=(16, 32), hidden=256)
