"""Which rows are counted, which inputs are shared, and which directions are above rounding."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers.language import draw_tokens, make_lm, token_rows
from torch import Tensor, nn

from unsc_hf import ActivationStatistics
from unsc_hf.data.dialogues import AnswerCollator
from unsc_hf.nullspace.api import NullSpace
from unsc_hf.nullspace.rules import rank_for_energy

ROUNDING = 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("budget", [None, 10])
def test_padding_is_never_counted(budget: int | None) -> None:
    """Whatever token pads, within a budget of rows as without one."""
    model, samples = make_lm(), [draw_tokens() for _ in range(24)]
    longest = max(len(prompt) + len(completion) for prompt, completion in samples)
    real = sum(len(prompt) + len(completion) for prompt, completion in samples)

    def statistics(token: int) -> ActivationStatistics:
        ready: list[dict[str, list[int]]] = []
        for row in token_rows(samples):
            missing = longest - len(row["input_ids"])
            fill = {"input_ids": token, "attention_mask": 0, "labels": -100}
            ready.append({name: [*row[name], *[value] * missing] for name, value in fill.items()})
        rows = Dataset.from_list(ready).with_format("torch")
        options = {"collate_fn": AnswerCollator(1), "rows_per_direction": budget, "progress": False}
        return ActivationStatistics.collect(model, rows, groups=["all"] * len(rows), **options)

    one, other = statistics(5), statistics(9)
    for key, moment in one.moments["all"].items():
        assert moment.rows == other.moments["all"][key].rows
        assert moment.rows == real
        torch.testing.assert_close(moment.matrix, other.moments["all"][key].matrix)


class InPlace(nn.Module):
    """Two layers that read one tensor, which is changed between them or not."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.first, self.second, self.changes = nn.Linear(12, 4), nn.Linear(12, 4), changes

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        out: Tensor = self.first(x)
        if self.changes:
            x.mul_(torch.linspace(-1, 1, 12))
        out = out + self.second(x)
        return out


@pytest.mark.parametrize("changes", [False, True])
def test_an_input_that_is_changed_in_place_is_another_input(changes: bool) -> None:
    model, rows = InPlace(changes), torch.randn(5, 12)
    space = NullSpace.fit(model, [{"x": rows}], energy=1.0)
    keys = space.statistics.module_keys
    assert (keys["first"] == keys["second"]) is not changes
    expected = rows * torch.linspace(-1, 1, 12) if changes else rows
    torch.testing.assert_close(
        space.statistics.pooled()[keys["second"]].matrix[0], (expected.T @ expected).double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("energy", [1.0, 1.0 - 1e-15])
@pytest.mark.parametrize(("size", "counts"), [(3.0, True), (1.5, True), (0.7, False), (0.1, False)])
def test_directions_count_from_the_rounding_of_float32_on(size: float, counts: bool, energy: float) -> None:
    """`size` times that rounding, relative to the largest direction; the values are squares."""
    values = torch.tensor([1.0, 1e-3, (size * ROUNDING) ** 2, 0.0], dtype=torch.float64)
    assert rank_for_energy(values, energy) == (3 if counts else 2)
    assert rank_for_energy(1e12 * values, energy) == (3 if counts else 2)
