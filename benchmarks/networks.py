"""Networks of the benchmarks: narrow ones for accuracies, and those of the papers that are not built in."""

import torch
from fedbonsai.learning.models.cnn import VGG11, VGG16, vgg11_bn, vgg16_bn
from torch import Tensor, nn


def narrow_vgg(num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """Four 3x3 convolutions of 16, 32, 64 and 128 channels, each with pooling, and one linear layer; 102,928 parameters."""
    layers: list[nn.Module] = []
    for width in (16, 32, 64, 128):
        layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        in_channels = width
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(in_channels * 2 * 2, num_classes))


def vgg11_linear(num_classes: int = 10) -> nn.Module:
    """VGG-11 with batch normalisation, for 32x32 images; the head is one linear layer."""
    return _linear(vgg11_bn(num_classes), VGG11[-1] * 2 * 2, num_classes)


def vgg16_linear(num_classes: int = 10) -> nn.Module:
    """VGG-16 with batch normalisation, for 32x32 images; the head is one linear layer."""
    return _linear(vgg16_bn(num_classes), VGG16[-2], num_classes)


def _linear(model: nn.Module, features: int, num_classes: int) -> nn.Module:
    """The network with another head. (Its first one has 4096 hidden values twice.)"""
    model.classifier = nn.Linear(features, num_classes)
    return model


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation, beside an identity or a 1x1 convolution."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, channels, h, w] to [n, width, h / stride, w / stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class NarrowResNet18(nn.Module):
    """ResNet-18 with a quarter of the channels; its first convolution halves the image."""

    def __init__(self, num_classes: int = 10, *, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        layers, channels = [], width
        for number in range(4):
            for stride in (1 if number == 0 else 2, 1):
                layers.append(Residual(channels, width << number, stride))
                channels = width << number
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, 3, h, w] to [n, classes]."""
        return self.fc(self.pool(self.layers(self.stem(x))).flatten(1))


def narrow_resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 with 16, 32, 64 and 128 channels."""
    return NarrowResNet18(num_classes)


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


def narrow_femnist_cnn(num_classes: int = 10) -> nn.Module:
    """The same network with 16 and 32 channels and 256 hidden values; 421,642 parameters at 10 classes."""
    return FemnistCnn(num_classes, channels=(16, 32), hidden=256)
