"""Networks of benchmarks/profl.py and profl_cifar.py: VGG with one linear layer as its head, and a narrow ResNet-18."""

import torch
from fedbonsai.learning.models.cnn import VGG11, VGG16, vgg11_bn, vgg16_bn
from torch import Tensor, nn


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
