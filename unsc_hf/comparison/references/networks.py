"""The convolutional networks on which UNSC was published (arXiv 2404.13588), for images of 28 or 32 pixels.

They load by `AutoModelForImageClassification` once this module is imported, so not without this package: they are for
comparison with the paper, not for publishing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput

from ...errors import UNSCError, closest

Layers = list[nn.Module]


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 0, bias: bool = False) -> Layers:
    """A convolution, batch normalisation and ReLU."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU()]


def alexnet(channels: int, side: int) -> tuple[Layers, int]:
    """The small AlexNet of gradient projection memory (Saha et al., arXiv 2103.09762)."""
    layers: Layers = []
    for outputs, kernel, dropout in ((64, 4, 0.2), (128, 3, 0.2), (256, 2, 0.5)):
        layers += [*_conv(channels, outputs, kernel), nn.Dropout(dropout), nn.MaxPool2d(2)]
        channels, side = outputs, (side - kernel + 1) // 2
    layers.append(nn.Flatten())
    for inputs in (channels * side**2, 2048):
        layers += [nn.Linear(inputs, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(), nn.Dropout(0.5)]
    return layers, 2048


def vgg11(channels: int, side: int) -> tuple[Layers, int]:
    """VGG-11 with batch normalisation (Simonyan and Zisserman, arXiv 1409.1556, table 1, column A)."""
    layers: Layers = []
    for widths in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for outputs in widths:
            layers += _conv(channels, outputs, padding=1, bias=True)
            channels = outputs
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for inputs in (channels, 4096):
        layers += [nn.Linear(inputs, 4096), nn.ReLU(), nn.Dropout(0.5)]
    return layers, 4096


def allcnn(channels: int, side: int) -> tuple[Layers, int]:
    """All-CNN-C (Springenberg et al., arXiv 1412.6806, table 2) as UNSC's released code has it.

    That is with batch normalisation, a linear head, and 192 channels from the third layer on, not from the fourth.
    """
    layers: Layers = []
    for outputs, stride in ((96, 1), (96, 1), (192, 2), (192, 1), (192, 1), (192, 2), (192, 1)):
        layers += _conv(channels, outputs, stride=stride, padding=1)
        channels = outputs
    layers += [*_conv(channels, 192, kernel=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return layers, 192


class _Block(nn.Module):
    """Two convolutions beside a shortcut (He et al., arXiv 1512.03385, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_conv(inputs, outputs, stride=stride, padding=1), *_conv(outputs, outputs, padding=1)[:2]
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*([] if same else _conv(inputs, outputs, kernel=1, stride=stride)[:2]))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return out


def resnet18(channels: int, side: int) -> tuple[Layers, int]:
    """ResNet-18 (He et al., arXiv 1512.03385, table 1), with a first layer for small images: 3 x 3, no pooling."""
    layers, inputs = _conv(channels, 64, padding=1), 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(inputs, outputs, stride), _Block(outputs, outputs, 1)]
        inputs = outputs
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()], 512


# Each gives the layers that make features of images with so many channels and pixels a side, and the features' width.
NETWORKS: dict[str, Callable[[int, int], tuple[Layers, int]]] = {
    "alexnet": alexnet, "vgg11": vgg11, "allcnn": allcnn, "resnet18": resnet18,
}  # fmt: skip


class SmallNetworkConfig(PreTrainedConfig):
    """Config of a `SmallNetwork`: a name of `NETWORKS`, and the images' channels and side in pixels."""

    model_type = "unsc-small-network"

    def __init__(self, network: str = "alexnet", num_channels: int = 3, image_size: int = 32, **kwargs: Any) -> None:
        self.network, self.num_channels, self.image_size = network, num_channels, image_size
        super().__init__(**kwargs)


class SmallNetwork(PreTrainedModel):
    """One of the networks as an image classifier.

    Raises:
        UNSCError: the config names no network that there is.
    """

    config_class = SmallNetworkConfig
    base_model_prefix = "features"
    main_input_name = "pixel_values"

    def __init__(self, config: SmallNetworkConfig) -> None:
        super().__init__(config)
        if config.network not in NETWORKS:
            raise UNSCError(
                f"network: there is no {config.network!r}; choose from {closest(config.network, NETWORKS)}."
            )
        layers, width = NETWORKS[config.network](config.num_channels, config.image_size)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, config.num_labels, bias=config.network != "alexnet")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """He's initialisation, under which all of these networks train; biases and normalisation begin as usual."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits of images of shape (batch, channels, side, side), and the cross-entropy where `labels` are given."""
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(SmallNetworkConfig.model_type, SmallNetworkConfig)
AutoModelForImageClassification.register(SmallNetworkConfig, SmallNetwork)
