"""Small convolutional networks of our own. All return logits; a softmax belongs to the loss.

``resfed_cnn`` is the network of ResFed's public code (Song et al., arXiv 2212.05602; 1,020,160 parameters = its "4.08 MB").
That code ends in log_softmax; we leave it to the loss (``cross_entropy`` on logits is the same function).
``small`` has the shape of McMahan et al.'s network (arXiv 1602.05629), with a 512-unit layer on 3x32x32.
"""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolutions, then a classifier on the flattened map: (batch, channels, height, width) to (batch, classes)."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        """Both parts are used as they are."""
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def map_size(image_size: int, *, pools: int) -> int:
    """Side of the map after ``pools`` halvings. Raises ``ValueError`` when nothing is left."""
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
        # He et al., arXiv 1502.01852: 97 % after three to four epochs, where torch's default start takes five to seven.
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
