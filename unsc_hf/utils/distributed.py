"""Row-sharded weights (FSDP2), and sums and results over processes.

A projector multiplies each row of a weight separately. So every process projects its own rows, without communication.
In a single process these functions return their input or do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

Result = TypeVar("Result")


def process() -> tuple[int, int]:
    """Rank of this process and the number of processes; (0, 1) when there is one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a row-sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its rows. For a sharded one every process must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_like(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which every process holds a `part`, sharded like `like`."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, sharded like `like`, without communication."""
    if not isinstance(like, DTensor):
        return tensor
    everywhere = [Replicate()] * like.device_mesh.ndim
    replicated = DTensor.from_local(tensor, like.device_mesh, everywhere, run_check=False)
    return replicated.redistribute(placements=like.placements).to_local()


def own_rows(matrix: Tensor) -> Tensor:
    """This process's share of the rows of a matrix (groups, rows, width) that every process has."""
    rank, world = process()
    return matrix[:, rank::world]


def summed(values: Iterable[float], device: torch.device) -> list[float]:
    """Each value summed over all processes, in one exchange."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    if process()[1] > 1:
        dist.all_reduce(total)
    return [float(value) for value in total]


def add_up(value: Tensor) -> Tensor:
    """A tensor summed over all processes, on its own device."""
    if process()[1] > 1:
        dist.all_reduce(value)
    return value


def gathered(item: Any, device: torch.device) -> list[Any]:
    """The `item` of every process, in the order of their ranks; all must call this together."""
    _, world = process()
    if world == 1:
        return [item]
    items: list[Any] = [None] * world
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the exchange uses the current device
    dist.all_gather_object(items, item)
    return items


def dealt(
    names: Sequence[str], work: Callable[[str], Result], device: torch.device | str | None, together: bool = True
) -> dict[str, Result]:
    """Results of `work` by name.

    With `together` the processes share the names and exchange their results on `device` (default CPU).
    """
    rank, world = process() if together else (0, 1)
    mine = {name: work(name) for name in names[rank::world]}
    if world == 1:
        return mine
    place, results = torch.device("cpu" if device is None else device), dict[str, Result]()
    for i, name in enumerate(names):
        result: list[Any] = [mine.get(name)]
        dist.broadcast_object_list(result, src=i % world, device=place)
        results[name] = result[0]
    return results


def units_to_shard(model: Any) -> list[str]:
    """Classes of the modules that are gathered one at a time: those that the model declares unsplittable.

    The module around the input embedding is left out. Accelerate shards that embedding itself and cannot shard it twice
    (a ViT declares its `ViTEmbeddings` too).
    """
    embedding = model.get_input_embeddings()
    around = {type(module).__name__ for module in model.modules() if any(m is embedding for m in module.modules())}
    return [name for name in model._no_split_modules or () if name not in around]


def reshard(model: nn.Module) -> None:
    """Shard weights that FSDP2 keeps gathered after a forward pass; what is written into gathered ones is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_trained(model: nn.Module, names: Collection[str]) -> None:
    """Train exactly the parameters of these names.

    FSDP2 has a second parameter for the gathered weight, which decides whether a gradient is computed. Both are set.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for sharded in shards:
        sharded.unshard()
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                parameter.requires_grad_(name in names)
        sharded.reshard()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
