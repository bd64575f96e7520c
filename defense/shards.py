"""Ranking with several processes: each takes a share of the probe set, torch.distributed puts the results together."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def sum_over_shards(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            on_device = tensor.to(_device())
            dist.all_reduce(on_device)
            tensor.copy_(on_device)


def gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """The rows [n, ...] of all processes, in the order of their ``indices`` [n] in the whole set."""
    if rank_and_world()[1] == 1:
        return rows
    parts: list[tuple[Tensor, Tensor]] = [(rows, indices)] * rank_and_world()[1]
    dist.all_gather_object(parts, (rows, indices))
    return torch.cat([part[0] for part in parts])[torch.cat([part[1] for part in parts]).argsort()]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
