"""Replicas of an EMA that is kept as ZeRO-sharded optimizer state: SD-DiT's teacher.

The state is fp32 and sharded. The replica is whole on every rank, has the dtype that it computes in, and takes one
all-gather after each update, as ZeRO gathers the weights themselves. A replica may hold the leading rows of a weight.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor


class EMAReplicas:
    """Keep `tensors` equal to the EMA `name` of `sources`, parameters of `engine` in the same order."""

    def __init__(self, engine, name: str, tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self.name, self.optimizer = name, engine.optimizer
        self.tensors = dict(zip(sources, tensors, strict=True))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the EMA to the replicas, a collective. Before the first update there is no EMA, and nothing changes."""
        zero = self.optimizer
        if hasattr(zero, "fp16_groups"):
            self._from_stage_3()
        elif hasattr(zero, "round_robin_bit16_groups"):
            groups, offsets = zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets
            self._from_flat(zero.single_partition_of_fp32_groups, groups, offsets)
        elif hasattr(zero, "bf16_groups"):  # DeepSpeed's own for stage 1 in bf16 with accumulation
            offsets = [accumulate((p.numel() for p in group[:-1]), initial=0) for group in zero.bf16_groups]
            self._from_flat(zero.fp32_groups_flat_partition, zero.bf16_groups, offsets)
        elif states := zero.state:  # no ZeRO
            self._copy([(p, states[p][self.name]) for p in self.tensors if self.name in states.get(p, {})])

    def _from_flat(self, partitions, groups, offsets) -> None:
        """Copy from groups of parameters laid end to end, of which this rank has a part, at `offsets`."""
        for partition, params, starts, ranks in zip(partitions, groups, offsets, self.optimizer.real_dp_process_group):
            if (shard := self._shard(partition)) is not None:
                flat = _gather(shard, ranks).flatten()
                self._copy([(p, flat[at : at + p.numel()]) for p, at in zip(params, starts, strict=True)])

    def _from_stage_3(self) -> None:
        zero = self.optimizer
        for params, partition in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
            if not any(p in self.tensors for p in params) or (shard := self._shard(partition)) is None:
                continue
            shards, at = _gather(shard, zero.dp_process_group), 0
            wholes = []
            for p in params:
                size = p.partition_numel()
                wholes.append((p, shards[:, at : at + size].flatten()[: p.ds_numel]))
                at += size
            self._copy(wholes)

    def _shard(self, partition: Tensor) -> Tensor | None:
        """Return this rank's part of the EMA in the replicas' dtype, on their device; None before the first update."""
        state = self.optimizer.optimizer.state.get(partition, {})
        like = next(iter(self.tensors.values()))
        return state[self.name].to(like.device, like.dtype) if self.name in state else None

    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        pairs = [(self.tensors[param], value) for param, value in pairs if param in self.tensors]
        if pairs:
            values = [value.flatten()[: replica.numel()].view_as(replica) for replica, value in pairs]
            torch._foreach_copy_([replica for replica, _ in pairs], values)


def _gather(shard: Tensor, group) -> Tensor:
    """Return all ranks' shards (ranks, size of a shard), in the order of ranks."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return shard[None]
    whole = shard.new_empty(ranks, shard.numel())
    dist.all_gather_into_tensor(whole.view(-1), shard.contiguous(), group=group)
    return whole
