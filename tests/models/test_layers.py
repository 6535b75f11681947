"""Rows are exactly what a layer multiplies by its weight; hooks never stay; nothing is skipped in silence."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.models import layer_of, make_vit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from unsc_hf.errors import UNSCError
from unsc_hf.models.hooks import capture_inputs, trace_layers
from unsc_hf.models.layers import find_layers, row_geometry


def _random_conv() -> tuple[nn.Conv2d, torch.Tensor]:
    groups = random.choice([1, 1, 2, 3, 6])
    kernel = (random.randint(1, 4), random.randint(1, 4))
    dilation = (random.randint(1, 2), random.randint(1, 2))
    mode = random.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    padding = random.choice(["same", "valid", (random.randint(0, 2), random.randint(0, 2))])
    stride = (1, 1) if padding == "same" else (random.randint(1, 3), random.randint(1, 3))
    conv = nn.Conv2d(6, 12, kernel, stride, padding, dilation, groups, bias=False, padding_mode=mode).double()
    return conv, torch.randn(random.randint(1, 3), 6, random.randint(9, 12), random.randint(9, 12)).double()


@pytest.mark.parametrize("trial", range(20))
def test_conv_rows_times_weight_is_the_output(trial: int) -> None:
    random.seed(int(torch.randint(2**31, ()).item()))
    conv, x = _random_conv()
    layer = layer_of(conv)
    rows = layer.rows(x)
    product = rows @ layer.as_matrix(conv.weight).mT  # (groups, batch * positions, out / groups)
    out = conv(x)
    by_group = out.reshape(len(x), conv.groups, -1, out.shape[2] * out.shape[3])
    expected = by_group.permute(1, 0, 3, 2).reshape(product.shape)
    torch.testing.assert_close(product, expected)
    torch.testing.assert_close(layer.from_matrix(layer.as_matrix(conv.weight)), conv.weight)


@pytest.mark.parametrize("module", [nn.Linear(7, 5, bias=False), Conv1D(5, 7)])
def test_linear_rows_times_weight_is_the_output(module: nn.Module) -> None:
    layer = layer_of(module)
    x = torch.randn(2, 3, 7)
    product = layer.rows(x) @ layer.as_matrix(layer.weight).mT
    bias = getattr(module, "bias", None)
    torch.testing.assert_close(product.reshape(2, 3, 5) + (0 if bias is None else bias), module(x))
    torch.testing.assert_close(layer.from_matrix(layer.as_matrix(layer.weight)), layer.weight)


class StandardisedConv(nn.Conv2d):
    """Convolves with another weight than it stores, as some backbones do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_layers_that_compute_something_else_are_left_alone() -> None:
    assert row_geometry(StandardisedConv(3, 4, 3)) is None
    assert row_geometry(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))) is None


def test_channels_last_weight_is_projected_too() -> None:
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    layer = layer_of(conv)
    torch.testing.assert_close(layer.from_matrix(layer.as_matrix(conv.weight)), conv.weight)


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layers = find_layers(model).layers
    with pytest.raises(RuntimeError, match="shapes"), capture_inputs(layers, lambda layer, x: None):
        model(torch.randn(2, 4))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_never_runs_is_an_error() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    with pytest.raises(UNSCError, match="'unused'"), capture_inputs(find_layers(model).layers, lambda layer, x: None):
        model["used"](torch.randn(2, 3))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_every_parameter_is_protected_or_frozen_with_a_reason() -> None:
    for model in (make_vit(), GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=11))):
        selection = find_layers(model)
        protected = {layer.weight_name for layer in selection.layers}
        names = {name for name, _ in model.named_parameters()}
        assert protected <= names
        assert not protected & set(selection.frozen)
        assert names <= protected | set(selection.frozen)


def test_tied_head_is_not_protected() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=11))
    selection = find_layers(model)
    assert "lm_head" not in {layer.name for layer in selection.layers}
    assert selection.frozen["lm_head.weight"] == "tied to transformer.wte.weight"
    assert {layer.name.rsplit(".", 1)[-1] for layer in selection.layers} == {"c_attn", "c_proj", "c_fc"}


def test_target_modules_that_match_nothing_name_the_closest() -> None:
    with pytest.raises(UNSCError, match=r"'query'.*q_proj"):
        find_layers(make_vit(), ["query"])
    chosen = find_layers(make_vit(), ["q_proj", "fc2"]).layers
    assert {layer.name.rsplit(".", 1)[-1] for layer in chosen} == {"q_proj", "fc2"}
    assert len(find_layers(make_vit(), r".*\.layers\.0\..*").layers) == 6


def test_a_model_without_protectable_layers_is_refused() -> None:
    with pytest.raises(UNSCError, match="no protectable layer"):
        find_layers(nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3)))


def test_query_key_and_value_share_one_input() -> None:
    model = make_vit()
    layers = find_layers(model).layers
    trace = trace_layers(layers, lambda: model(torch.randn(2, 3, 8, 8)), 2)
    first = "vit.layers.0.attention."
    leaders = {name: leader for name, leader in trace.leaders.items() if "layers.0" in name}
    assert leaders[f"{first}k_proj"] == leaders[f"{first}v_proj"] == f"{first}q_proj"
    assert len(set(leaders.values())) == 4
    assert trace.rows_per_sample["vit.layers.0.mlp.fc1"] == 5  # four patches and the class token
    assert trace.rows_per_sample["classifier"] == 1


def test_lora_model_protects_only_the_first_factor() -> None:
    model = get_peft_model(make_vit(), LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    selection = find_layers(model)
    assert all(".lora_A." in layer.weight_name for layer in selection.layers)
    assert {layer.name for layer in selection.layers} <= {layer.name for layer in find_layers(make_vit()).layers}
    assert len(selection.layers) == 4
    assert not any(".lora_B." in name for name in selection.frozen)
    seen: dict[str, tuple[int, ...]] = {}
    with capture_inputs(selection.layers, lambda layer, x: seen.update({layer.name: layer.rows(x).shape})):
        model(pixel_values=torch.randn(2, 3, 8, 8))
    assert set(seen.values()) == {(1, 10, 48)}
