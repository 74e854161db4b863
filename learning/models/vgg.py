"""VGG for 32x32 images, with batch normalisation and the 4096-4096 head (Simonyan and Zisserman, arXiv 1409.1556).

Two papers use two different ones, and their figures hold for these alone: EcoFed (arXiv 2304.05495) VGG-11 with four pools,
a 2048-wide flatten and biased convolutions, 34,440,970 parameters; REFT VGG-16 with five pools, a 512-wide flatten and no
convolution bias, 33,642,442 parameters (128.4 MiB, 0.332 G multiply-accumulates). Torchvision's, made for 224x224,
are ``torchvision/vgg11_bn`` and ``torchvision/vgg16_bn``. ``hidden``: width of the head's two layers.
"""

from torch import nn

from .cnn import ConvNet, map_size

POOL = 0  # in a plan: halve the map; any other number is a convolution of that width
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512)
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)


def vgg11_bn(
    num_classes: int = 10, *, in_channels: int = 3, image_size: int = 32, dropout: float = 0.5, hidden: int = 4096
) -> nn.Module:
    """EcoFed's VGG-11: four pools, convolution bias, 4096-4096 head; 34,440,970 parameters on 3x32x32."""
    return _vgg(
        VGG11, num_classes, in_channels=in_channels, image_size=image_size, dropout=dropout, hidden=hidden, bias=True
    )


def vgg16_bn(
    num_classes: int = 10, *, in_channels: int = 3, image_size: int = 32, dropout: float = 0.5, hidden: int = 4096
) -> nn.Module:
    """REFT's VGG-16: five pools, no convolution bias, 4096-4096 head; 33,642,442 parameters on 3x32x32."""
    return _vgg(
        VGG16, num_classes, in_channels=in_channels, image_size=image_size, dropout=dropout, hidden=hidden, bias=False
    )


def _vgg(
    plan: tuple[int, ...],
    num_classes: int,
    *,
    in_channels: int,
    image_size: int,
    dropout: float,
    hidden: int,
    bias: bool,
) -> nn.Module:
    features: list[nn.Module] = []
    channels = in_channels
    for width in plan:
        if width == POOL:
            features.append(nn.MaxPool2d(2))
            continue
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=bias)
        # Torchvision's initialisation of VGG; with torch's default the deeper one hardly starts to learn.
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        features += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    side = map_size(image_size, pools=plan.count(POOL))
    classifier = nn.Sequential(
        nn.Linear(channels * side**2, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, num_classes),
    )
    return ConvNet(nn.Sequential(*features), classifier)
