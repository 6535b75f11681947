"""Forward passes that begin at the block that has changed: those before it give what they gave before.

Erasure changes one layer many times and reads the same rows after each change. Most of such a pass is spent in blocks that come before that
layer, whose outputs do not change, and, where a hidden state is read, in blocks behind it, whose outputs do not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.hooks import evaluation_mode

if TYPE_CHECKING:
    from .readings import Reading

_MOST_BYTES = 2 * 1024**3  # of kept outputs; batches that do not fit run whole


_SAME = 1e-4  # of the largest value read


class Replay:
    """Keeps the outputs of blocks while one module changes, and gives them instead of running the blocks.

    Blocks are the members of each `ModuleList` or `Sequential`, on the way to the module or apart from it (the encoder's, for a pooler). Of those
    that run before it only the last output of each list is kept: what came before is consumed by then. Whether this is so for a model is tried
    when the replay is made: what must not matter is replaced by NaN, and the reading has to come out the same. Where it does not, blocks
    run as ever. In the block that holds the module, the parts that run before it are kept as well, in half of the memory.
    """

    def __init__(self, model: nn.Module, module: nn.Module, reading: Reading, batch: Mapping[str, Any]) -> None:
        """
        Args:
            model: in which nothing but `module` changes from now on.
            module: a part of it.
            reading: what is read of the model.
            batch: a batch to try it on.
        """
        self._kept: dict[int, tuple[Mapping[str, Any], list[tuple[nn.Module, Any]]]] = {}
        self._bytes = 0
        order = _order(model, lambda: reading.rows(model, batch))
        for apart, with_parts in product((True, False), repeat=2):
            before, after, parts = _blocks(model, module, order, apart)
            self._parts = parts if with_parts else []
            # What follows the module's blocks matters for the head; for a hidden state as a rule not.
            for behind in (after, []) if reading.state is not None and after else ([],):
                self._blocks = [*before, *((block, False) for block in behind)]
                if (self._blocks or self._parts) and self._agrees(model, reading, batch):
                    return
        self._blocks, self._parts = [], []

    @contextmanager
    def __call__(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Inside, a forward pass of `batch` replays what is kept of it, or keeps it."""
        if id(batch) in self._kept:
            with ExitStack() as stack:
                for block, output in self._kept[id(batch)][1]:
                    stack.enter_context(_replaced(block, output))
                yield
            return
        wanted = self._blocks + [(part, True) for part in self._parts]
        if not wanted or self._bytes >= _MOST_BYTES:
            yield
            return
        seen: list[tuple[nn.Module, Any]] = []
        with ExitStack() as stack:
            for block, kept in wanted:
                stack.callback(block.register_forward_hook(partial(_keep, seen, kept)).remove)
            yield
        if len(seen) == len(wanted) == len({id(block) for block, _ in seen}):  # each ran once
            if self._bytes + _total(seen) > _MOST_BYTES / 2:  # the rest is for blocks, which spare more
                seen = [(block, output) for block, output in seen if block not in self._parts]
            self._kept[id(batch)] = (batch, seen)
            self._bytes += _total(seen)

    def _agrees(self, model: nn.Module, reading: Reading, batch: Mapping[str, Any]) -> bool:
        """Whether a replay reads what a whole pass does."""
        try:
            with evaluation_mode(model):
                found = []
                for _ in range(2):
                    with self(batch):
                        found.append(reading.rows(model, batch))
        except Exception:  # whatever a model does with a block's output: a whole pass is always right
            return self._forget()
        if not self._kept or not bool((found[1] - found[0]).abs().max() <= _SAME * found[0].abs().max()):
            return self._forget()
        return True

    def _forget(self) -> bool:
        self._kept.clear()
        self._bytes = 0
        return False


def _order(model: nn.Module, forward: Callable[[], Any]) -> dict[nn.Module, int]:
    """Modules in the order in which they end, of those that run once."""
    ran: list[nn.Module] = []
    with ExitStack() as stack, evaluation_mode(model):
        for one in model.modules():
            stack.callback(one.register_forward_hook(lambda module, *_: ran.append(module)).remove)
        forward()
    times = Counter(ran)
    return {one: i for i, one in enumerate(ran) if times[one] == 1}


def _blocks(
    model: nn.Module, module: nn.Module, order: Mapping[nn.Module, int], apart: bool
) -> tuple[list[tuple[nn.Module, bool]], list[nn.Module], list[nn.Module]]:
    """Blocks that run before `module`, each with whether its output is needed, and those behind it, over all lists; and the parts of
    the block that holds it that run before it.

    Args:
        order: see `_order`.
        apart: whether to look at lists too that do not hold the module.
    """
    before: list[tuple[nn.Module, bool]] = []
    after: list[nn.Module] = []
    parts: list[nn.Module] = []

    def look(owner: nn.Module, inside: bool) -> None:
        children = [] if owner is module else list(owner.children())
        holding = [child for child in children if any(one is module for one in child.modules())]
        if isinstance(owner, nn.ModuleList | nn.Sequential) and (holding or apart):
            found = [child for child in children if child in order and child not in holding]
            first = [child for child in found if order[child] < order[module]]
            before.extend((child, child is first[-1]) for child in first)
            after.extend(child for child in found if child not in first)
            children, inside = holding, True
        elif inside and holding:
            parts.extend(child for child in children if child in order and order[child] < order[module])
            children = holding
        for child in children:
            look(child, inside)

    if module in order:
        look(model, False)
    return before, after, parts


def _keep(seen: list[tuple[nn.Module, Any]], kept: bool, block: nn.Module, _args: Any, output: Any) -> None:
    """A hook: the output, or something of its shape that spoils whatever uses it."""
    seen.append((block, _each(output, Tensor.clone if kept else _spoilt)))


@contextmanager
def _replaced(block: nn.Module, output: Any) -> Iterator[None]:
    """Inside, the block gives `output`, or a copy where that may be written to."""
    own = vars(block).get("forward")
    block.forward = lambda *args, **kwargs: _each(output, lambda x: x if x.stride() == (0,) * x.dim() else x.clone())
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _spoilt(x: Tensor) -> Tensor:
    return x.new_full((), torch.nan).expand(x.shape) if x.is_floating_point() else x.clone()


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with every tensor of it changed."""
    if isinstance(output, Tensor):
        return change(output.detach())
    if type(output) is tuple:
        return tuple(_each(part, change) for part in output)
    if output is None:
        return None
    raise TypeError(type(output).__name__)


def _total(seen: Sequence[tuple[nn.Module, Any]]) -> int:
    """Bytes that outputs hold."""
    return sum(_size(output) for _, output in seen)


def _size(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.untyped_storage().nbytes()
    return sum(_size(part) for part in output or ())
