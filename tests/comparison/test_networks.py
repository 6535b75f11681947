"""The published paper's networks: their layers, and unlearning in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import exact_logits, randomise
from helpers.rows import tensor_dataset
from helpers.training import assert_promise, drift
from torch import nn
from transformers import AutoModelForImageClassification

from unsc_hf import UNSCError
from unsc_hf.comparison.references.networks import NETWORKS, SmallNetwork, SmallNetworkConfig

# Widths of the inputs of all layers, of images with one channel and 28 pixels a side, or with three and 32.
WIDTHS = {
    "alexnet": [16, 576, 512, 1024, 2048, 2048],
    "vgg11": [27, 576, 1152, 2304, 2304, 4608, 4608, 4608, 512, 4096, 4096],
    "allcnn": [27, 864, 864, 1728, 1728, 1728, 1728, 192, 192],
    "resnet18": [27, *[576] * 5, 1152, 64, *[1152] * 3, 2304, 128, *[2304] * 3, 4608, 256, *[4608] * 2, 512],
}
# Sides in pixels of what the convolutions give, in their order.
SIDES = {
    "alexnet": [25, 10, 4],
    "vgg11": [32, 16, 8, 8, 4, 4, 2, 2],
    "allcnn": [32, 32, 16, 16, 16, 8, 8, 8],
    "resnet18": [*[32] * 5, *[16] * 5, *[8] * 5, *[4] * 5],
}
SLOW = pytest.mark.slow  # layers of 4,608 inputs are decomposed in float64


def make(name: str) -> SmallNetwork:
    channels, side = (1, 28) if name == "alexnet" else (3, 32)
    config = SmallNetworkConfig(name, num_channels=channels, image_size=side, num_labels=10)
    return randomise(SmallNetwork(config)).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_those_of_the_papers(name: str) -> None:
    model, sides = make(name), []
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [layer.weight[0].numel() for layer in layers] == WIDTHS[name]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output: sides.append(output.shape[-1]))
    model(torch.randn(2, model.config.num_channels, model.config.image_size, model.config.image_size))
    assert sides == SIDES[name]
    if name == "resnet18":
        assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962  # as others count it


@pytest.mark.parametrize(
    "name", ["alexnet", *(pytest.param(name, marks=SLOW) for name in NETWORKS if name != "alexnet")]
)
@pytest.mark.timeout(900)
def test_retained_outputs_stay_and_the_model_loads(name: str, tmp_path: Path) -> None:
    """Two kept images, repeated, leave room in all but the first layers."""
    model = make(name)
    shape = (model.config.num_channels, model.config.image_size, model.config.image_size)
    labels = list("abcdefghij")
    retain = tensor_dataset(torch.randn(2, *shape).repeat(4, 1, 1, 1), [0, 1] * 4, labels)
    forget = tensor_dataset(torch.randn(8, *shape), [2] * 8, labels)
    measured = drift(model, (forget, retain), tmp_path, double=True, max_steps=3, learning_rate=3e-4)
    assert_promise(measured)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(exact_logits(loaded.eval(), forget), exact_logits(model.eval(), forget))


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(UNSCError, match="network: there is no 'alexnett'; choose from 'alexnet'"):
        SmallNetwork(SmallNetworkConfig("alexnett"))
