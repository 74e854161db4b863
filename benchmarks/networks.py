"""Networks of the benchmarks that compare methods on CIFAR-10."""

from torch import nn


def narrow_vgg(num_classes: int = 10, *, in_channels: int = 3) -> nn.Module:
    """Four 3x3 convolutions of 16, 32, 64 and 128 channels, each with pooling, and one linear layer; 102,928 parameters."""
    layers: list[nn.Module] = []
    for width in (16, 32, 64, 128):
        layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        in_channels = width
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(in_channels * 2 * 2, num_classes))
