"""Where a class can be read: a planted direction is found in the part it was planted in, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_vit
from helpers.rows import tensor_dataset
from torch import Tensor
from transformers import DefaultDataCollator

from unsc_hf.evaluation.diagnosis import Inputs, leading_layers, pooled_inputs, readability, split_input
from unsc_hf.models.hooks import capture_inputs
from unsc_hf.models.layers import find_layers


def _basis(groups: int, width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(groups, width, width, dtype=torch.float64)).Q


def test_parts_add_up_and_lie_where_they_should() -> None:
    x, basis, ranks = torch.randn(7, 3, 10), _basis(3, 10), (4, 10, 0)
    inside, free = split_input(x, basis, ranks)
    assert torch.allclose(inside + free, x, atol=1e-5)
    for g, rank in enumerate(ranks):
        span = basis[g, :, :rank]
        assert torch.allclose(inside[:, g].double() @ basis[g, :, rank:], torch.zeros(7, 10 - rank).double(), atol=1e-5)
        assert torch.allclose(free[:, g].double() @ span, torch.zeros(7, rank).double(), atol=1e-5)


@pytest.mark.parametrize("where", ["inside", "free"])
def test_a_planted_class_is_read_where_it_was_planted(where: str) -> None:
    basis, rank, width = _basis(1, 12), 6, 12
    directions = basis[0, :, :rank] if where == "inside" else basis[0, :, rank:]

    def draw(rows: int) -> Inputs:
        labels = torch.arange(rows) % 3
        signal = 4 * torch.eye(3, directions.shape[1], dtype=torch.float64)[labels] @ directions.T
        return Inputs({"layer": (signal + 0.5 * torch.randn(rows, width)).float()[:, None]}, labels)

    found = readability("layer", draw(300), draw(300), basis, (rank,), [2])
    numbers = {"whole": found.whole, "inside": found.inside, "free": found.free}
    assert all(value is not None for value in numbers.values())
    assert numbers["whole"] > 0.9
    assert numbers[where] > 0.9
    assert numbers["free" if where == "inside" else "inside"] < 0.6
    assert readability("layer", draw(60), draw(60), basis, (width,), [2]).free is None


def test_inputs_are_averaged_over_the_tokens_of_each_sample() -> None:
    model = make_vit()
    data = tensor_dataset(torch.randn(10, 3, 8, 8), [i % 3 for i in range(10)])
    layers = find_layers(model).layers
    batches = [{**DefaultDataCollator()(data.__getitems__(list(rows)))} for rows in (range(6), range(6, 10))]
    found = pooled_inputs(model, layers, batches)
    assert found.labels.tolist() == [i % 3 for i in range(10)]
    expected: dict[str, Tensor] = {}
    with torch.no_grad(), capture_inputs(layers, lambda layer, x: expected.update({layer.name: x})):
        model(pixel_values=data[:]["pixel_values"])
    for layer in layers:
        x = expected[layer.name]
        rows = layer.rows(x).reshape(layer.geometry.groups, 10, -1, layer.geometry.width)
        assert torch.allclose(found.layers[layer.name], rows.mean(2).transpose(0, 1), atol=1e-5), layer.name


def test_layers_that_share_an_input_are_read_once() -> None:
    layers = find_layers(make_vit()).layers
    keys = {layer.name: layer.name.replace("k_proj", "q_proj").replace("v_proj", "q_proj") for layer in layers}
    names = [layer.name for layer in leading_layers(layers, keys)]
    assert len(names) == len(set(keys.values()))
    assert not [name for name in names if name.endswith(("k_proj", "v_proj"))]
