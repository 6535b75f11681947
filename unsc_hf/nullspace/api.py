"""The null space of some rows in a model, in one call, and what keeps any training loop inside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import UNSCError
from ..models.hooks import evaluation_mode
from ..models.layers import ADAPTER, LayerSelection, find_layers
from ..utils.distributed import set_trained
from .collect import read_batches
from .moments import SecondMoment
from .projection import Leak, NullSpaceProjection
from .rules import check_energy, full_layers
from .statistics import ActivationStatistics, model_fingerprint
from .subspace import LayerReport

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # Buffers of batch normalisation.


class NullSpace:
    """Keeps a model's outputs on some rows while the model is trained on others.

    Every weight may move only in directions that the fitted rows' activations do not use, so each layer's output on
    these rows stays what it was, up to rounding and the share of energy that was left out (1 - `energy`).

    Example::

        space = NullSpace.fit(model, rows_to_keep, energy=0.99)
        space.freeze_others()  # biases, norms, embeddings, and layers without a free direction
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with space.attach(optimizer):
            train(model, optimizer)  # any loop
        print(space.leak(held_out_rows).total)

    Source: "Machine Unlearning via Null Space Calibration" (IJCAI 2024, arXiv 2404.13588), section 4.1. Displacements
    are projected beside gradients because adaptive optimisers and weight decay leave the null space.

    Attributes:
        model: the model, which is not changed by fitting (of adapters see `fit`).
        statistics: second moments of the rows, float64 and uncentred. Save them with `statistics.save_pretrained`.
        subspace: what is kept of each layer input, and what is free.
        projection: projectors and starting weights of the layers that can be trained.
        frozen: reason by name for every parameter that cannot be protected.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: ActivationStatistics,
        *,
        exclude: Iterable[Any] = (),
        energy: float = 0.99,
        target_modules: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make a null space of statistics of this model, such as `ActivationStatistics.from_pretrained(folder, model)`.

        `exclude` are classes, by id or name, whose rows need not be kept. The other arguments and errors are those of
        `fit`.
        """
        self.model, self.statistics = model, statistics
        place = next(model.parameters()).device if device is None else device
        self.subspace = statistics.subspace(exclude, energy=energy, device=place)
        selection = find_layers(model, target_modules)
        silent = {layer.name for layer in selection.layers} - self.subspace.module_keys.keys()
        selection = selection.without(dict.fromkeys(silent, "never ran on the fitted rows"))
        selection = selection.without(full_layers(self.subspace, selection.layers, energy=energy))
        self.frozen = selection.frozen
        self.projection = self._project(selection, statistics.excluded(exclude))
        buffers = model.named_buffers()
        self._running = {name: b.clone() for name, b in buffers if name.rpartition(".")[2] in _RUNNING}

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        *,
        energy: float = 0.99,
        target_modules: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> NullSpace:
        """Read the rows to keep once, in eval mode, and find the null space of every layer's input.

        Args:
            model: any module with `nn.Linear`, `Conv1D` or `nn.Conv2d` layers, before training. In a PEFT model the
                LoRA factors A are moved into the null space; B is zero then, so outputs do not change.
            batches: dicts of the model's arguments, such as a `DataLoader` gives; read once. Rows of padding, which an
                `attention_mask` of shape (batch, tokens) tells, are left out. Under `torch.distributed` each process
                gives its own batches, and their sums are added up.
            energy: share of the rows' energy (squared singular values) that is kept, in (0, 1]. More leaves fewer
                directions to train; 1.0 keeps all that is above rounding.
            target_modules: layers to train; see `models.layers.find_layers`. None means all.
            device: where the moments are decomposed; None means the model's.
            progress: show a progress bar.

        Raises:
            UNSCError: no batches, a batch that is no dict, no layer that runs or has a free direction, NaN or infinite
                activations, or adapters that cannot be protected.
        """
        check_energy(energy)
        with evaluation_mode(model):
            moments, keys = read_batches(model, batches, find_layers(model, target_modules).layers, progress)
        statistics = ActivationStatistics({"fitted": moments}, keys, model_fingerprint(model), {"fitted": "fitted"})
        return cls(model, statistics, energy=energy, target_modules=target_modules, device=device)

    def _project(self, selection: LayerSelection, others: Mapping[str, SecondMoment] | None) -> NullSpaceProjection:
        if not any(".lora_A." in layer.path for layer in selection.layers):
            return NullSpaceProjection(selection.layers, self.subspace)
        from ..models.adapters import check_lora_config
        from .lora import LoraProjection

        configs: Any = self.model.peft_config
        if list(configs) != [ADAPTER]:
            raise UNSCError(f"model: has the adapters {list(configs)}; only one, named {ADAPTER!r}, can be protected.")
        check_lora_config(configs[ADAPTER])
        if any(".lora_B." in name and bool(weight.any()) for name, weight in self.model.named_parameters()):
            raise UNSCError("model: its adapter is trained already; merge it (merge_and_unload), and add a new one.")
        return LoraProjection(self.model, selection.layers, self.subspace, others)

    @property
    def capacity(self) -> list[LayerReport]:
        """Width, rank and number of free directions of each layer; `str(space.subspace)` is the same as a table."""
        return self.subspace.report()

    def freeze_others(self) -> dict[str, str]:
        """Freeze every parameter that is trained now and cannot be protected.

        Returns:
            The reason for each parameter that this call has frozen, by name.
        """
        trained, protected = self._trained(), self.projection.trained_names()
        set_trained(self.model, {name for name, p in trained.items() if p.requires_grad and name in protected})
        others = sorted(trained.keys() - protected)
        for name in others:
            trained[name].grad = None
        return {name: self._reason(name) for name in others}

    def _trained(self) -> dict[str, nn.Parameter]:
        """Parameters that an optimiser would change: it applies a gradient that is there even if none is asked for."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad or p.grad is not None}

    def _reason(self, name: str) -> str:
        return self.frozen.get(name, "not there when the null space was made")

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Protect every step of an optimiser: gradients are projected before it, displacements after it.

        Running statistics of batch normalisation are put back after each step, too. When training has ended,
        `project_displacements(torch.float64)` removes what rounding has left.

        Args:
            optimizer: any torch optimiser, or one that accelerate has wrapped.

        Returns:
            A handle: `remove()`, or the end of a `with` block, takes the protection off.

        Raises:
            UNSCError: here or at a later step, when the optimiser trains a parameter that cannot be protected (call
                `freeze_others` first), none that can, or weights in less than float32.
        """
        inner: Any = getattr(optimizer, "optimizer", optimizer)
        self._check(inner)

        def before(*_: Any) -> None:
            self._check(inner)  # a parameter may have been unfrozen, or added, since
            self.project_gradients()

        def after(*_: Any) -> None:
            self.project_displacements()

        attachment = Attachment()
        for handle in (inner.register_step_pre_hook(before), inner.register_step_post_hook(after)):
            attachment.callback(handle.remove)
        return attachment

    def _check(self, optimizer: Optimizer) -> None:
        modules = dict(self.model.named_modules())
        for layer in self.projection.layers:
            if modules.get(layer.path) is not layer.module:
                raise UNSCError(
                    f"model: layer {layer.name!r} was replaced since the null space was made; fit it again."
                )
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = {name: parameter for name, parameter in self._trained().items() if id(parameter) in held}
        protected = self.projection.trained_names()
        others = [name for name in trained if name not in protected]
        if others:
            raise UNSCError(
                f"optimizer: trains {len(others)} parameters that cannot be protected, the first is {others[0]!r} "
                f"({self._reason(others[0])}); call freeze_others() first."
            )
        if not trained:
            raise UNSCError("optimizer: trains no weight of this model's null space; make it of model.parameters().")
        for name, parameter in trained.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise UNSCError(
                    f"optimizer: {name!r} is {parameter.dtype}, too coarse for small changes to stay in the null "
                    "space; load the model in float32 (autocast is fine)."
                )

    def project_gradients(self) -> None:
        """Project every gradient, in place; for loops that `attach` does not reach. Call it before the step."""
        self.projection.project_gradients()

    @torch.no_grad()
    def project_displacements(self, dtype: torch.dtype | None = None) -> None:
        """Project every weight's change since the start, in place, and put running statistics back.

        Call it after the step. `dtype` is the precision of the product; None means the weights' own.
        """
        self.projection.project_displacements(dtype)
        for name, buffer in self.model.named_buffers():
            if name in self._running:
                buffer.copy_(self._running[name])

    def leak(self, batches: Iterable[Mapping[str, Any]]) -> Leak:
        """Relative change of the trained layers' outputs on some rows, such as held-out ones: see `projection.Leak`.

        Each layer is measured on the inputs that it had before training.

        Raises:
            UNSCError: as `fit`, for the batches.
        """
        layers, now = self.projection.layers, self.projection.snapshot()
        self.projection.restore()
        try:
            with evaluation_mode(self.model):
                moments, keys = read_batches(self.model, batches, layers)
        finally:
            self.projection.restore(now)
        silent = [layer.name for layer in layers if layer.name not in keys]
        if silent:
            raise UNSCError(f"batches: layer {silent[0]!r} never ran on them; give rows like those that were fitted.")
        return self.projection.leak(moments, keys)


class Attachment(ExitStack):
    """The hooks of one optimiser; `remove` takes them off, and so does the end of a `with` block."""

    def remove(self) -> None:
        """Take the protection off."""
        self.close()
