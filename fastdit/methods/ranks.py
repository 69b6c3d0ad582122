"""What methods say to all ranks, in place; with one rank nothing."""

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """x, now the sum."""
    if ranks() > 1:
        dist.all_reduce(x)
    return x


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Of one dtype; one collective."""
    if ranks() == 1:
        return
    flat = sum_over_ranks(torch.cat([t.flatten() for t in tensors])) / ranks()
    torch._foreach_copy_(
        tensors, [mean.view_as(t) for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]))]
    )
