"""Run collectives over all ranks. On one rank they do nothing."""

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Replace x by its sum over ranks, and return it."""
    return _all_reduce(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """Replace x by its elementwise maximum over ranks, and return it."""
    return _all_reduce(x, dist.ReduceOp.MAX)


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace tensors of one dtype by their averages over ranks, with one all-reduce."""
    if ranks() == 1:
        return
    _fill(tensors, sum_over_ranks(_flat(tensors)) / ranks())


def copy_from_first_rank(tensors: list[Tensor]) -> None:
    """Replace tensors of one dtype by those of rank 0, with one broadcast."""
    if ranks() == 1:
        return
    values = _flat(tensors)
    dist.broadcast(values, 0)
    _fill(tensors, values)


def gather_over_ranks(x: Tensor) -> Tensor:
    """Return the rows (ranks * B, d) of all ranks' x (B, d), in rank order; x itself on one rank."""
    if ranks() == 1:
        return x
    rows = x.new_empty(ranks() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(rows, x.contiguous())
    return rows


def _all_reduce(x: Tensor, op: dist.ReduceOp) -> Tensor:
    """Reduce x in place, and return it."""
    if ranks() > 1:
        dist.all_reduce(x, op=op)
    return x


def _flat(tensors: list[Tensor]) -> Tensor:
    """Return all values in one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def _fill(tensors: list[Tensor], values: Tensor) -> None:
    """Replace the tensors by the parts of a vector of `_flat`."""
    parts = values.split([t.numel() for t in tensors])
    with torch.no_grad():
        torch._foreach_copy_(tensors, [part.view_as(t) for t, part in zip(tensors, parts)])
