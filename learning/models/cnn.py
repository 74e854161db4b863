"""Built-in convolutional networks. All return logits; the softmax belongs to the loss.

``resfed_cnn`` is the network of ResFed's public code (Song et al., arXiv 2212.05602; 1,020,160 parameters = its "4.08 MB").
That code ends in log_softmax, which is left to the loss here (``cross_entropy`` on logits is the same function).
``small`` has the shape of McMahan et al.'s network (arXiv 1602.05629), with a 512-unit layer on 3x32x32.

VGG for 32x32 images has batch normalisation and the 4096-4096 head (Simonyan and Zisserman, arXiv 1409.1556). Two papers use
two variants, and their figures hold for these alone: EcoFed (arXiv 2304.05495) VGG-11 with four pools, a 2048-wide flatten and
biased convolutions, 34,440,970 parameters; REFT VGG-16 with five pools, a 512-wide flatten and no convolution bias, 33,642,442
parameters (128.4 MiB, 0.332 G multiply-accumulates). Torchvision's, made for 224x224, are ``torchvision/vgg11_bn`` and
``torchvision/vgg16_bn``. ``hidden``: width of the head's two layers.
"""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolutions, then a classifier on the flattened map: (batch, channels, height, width) to (batch, classes)."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        """``features`` returns a map, ``classifier`` takes it flattened."""
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def map_size(image_size: int, *, pools: int) -> int:
    """Side of the map after ``pools`` halvings. Raises ``ValueError`` if it is 0."""
    side = int(image_size) >> pools
    if side < 1:
        raise ValueError(f"model.kwargs: image_size is {image_size}; this model halves the image {pools} times")
    return side


def digits_cnn(num_classes: int = 10, *, in_channels: int = 1, image_size: int = 8) -> nn.Module:
    """Two 3x3 convolutions and two linear layers, for 8x8 digits; 38,282 parameters."""
    side = map_size(image_size, pools=1)
    features = nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    )
    model = ConvNet(features, nn.Sequential(nn.Linear(32 * side**2, 64), nn.ReLU(), nn.Linear(64, num_classes)))
    for layer in model.modules():
        # He et al., arXiv 1502.01852: 97 % after three to four epochs; torch's default initialisation takes five to seven.
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.get_parameter("bias"))
    return model


def small(num_classes: int = 10, *, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Two 5x5 convolutions (32, 64) with pooling, 512 units; 2,156,490 parameters on 3x32x32."""
    side = map_size(image_size, pools=2)
    features = nn.Sequential(
        nn.Conv2d(in_channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    return ConvNet(features, nn.Sequential(nn.Linear(64 * side**2, 512), nn.ReLU(), nn.Linear(512, num_classes)))


def resfed_cnn(num_classes: int = 10, *, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """ResFed's network: five 3x3 convolutions, one linear layer; 1,020,160 parameters on 3x32x32."""
    side = map_size(image_size, pools=3)
    features: list[nn.Module] = [nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU()]
    channels = 32
    for width, pooled in ((64, True), (128, False), (256, True), (256, True)):
        features += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        features += [nn.MaxPool2d(2)] if pooled else []
        channels = width
    return ConvNet(nn.Sequential(*features), nn.Sequential(nn.Linear(channels * side**2, num_classes, bias=False)))


POOL = 0  # in a list of layers: halve the map; any other number is a convolution of that width
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
    layers: tuple[int, ...],
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
    for width in layers:
        if width == POOL:
            features.append(nn.MaxPool2d(2))
            continue
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=bias)
        # Torchvision's initialisation of VGG; with torch's default the deeper variant hardly learns at first.
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        features += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    side = map_size(image_size, pools=layers.count(POOL))
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
