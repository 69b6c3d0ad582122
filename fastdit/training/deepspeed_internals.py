"""Reach into DeepSpeed where it has no public interface. No other module of fastdit does.

Every attribute here was read in DeepSpeed 0.19.8. pyproject.toml keeps later minor versions out, since they may rename
or drop any of them. This module imports nothing of fastdit, so that any other may import it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor, nn

# Parameters, each with its whole value as a flat tensor, which may share memory with the others.
Pairs = list[tuple[nn.Parameter, Tensor]]


def disable_shared_memory_op() -> None:
    """Leave CPU collectives to gloo. Call it before `deepspeed.init_distributed`.

    DeepSpeed would compile its own shared-memory collectives at their first use, which takes about a minute. 0.19.8
    asks `deepspeed.ops.__compatible_ops__` whether it can (comm/torch.py, `build_shm_op`).
    """
    import deepspeed  # it reads DS_ACCELERATOR when imported, so this module must not import it earlier

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def preserve_clipping(zero) -> Iterator[None]:
    """Keep the clipping of `zero`, the engine's optimizer, as it is while the block loads a checkpoint.

    0.19.8 takes `clip_grad` from the checkpoint (runtime/zero/stage_1_and_2.py, `_load_global_state`). Without
    `compute_grad_norm`, it refuses the checkpoint of a run in which it clipped.
    """
    attributes = vars(zero)
    before = {name: attributes[name] for name in ("clip_grad", "compute_grad_norm") if name in attributes}
    if "compute_grad_norm" in attributes:
        attributes["compute_grad_norm"] = True
    try:
        yield
    finally:
        attributes.update(before)


def link_optimizer_states(zero) -> None:
    """Make `safe_get_full_optimizer_state` work right after a resume. Needs one earlier update of the weights.

    0.19.8 links parameters to their optimizer states in its first step only: `_lazy_init_hp_params_optimizer_state` of
    runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py. ZeRO-0 in fp32 and ZeRO-3 have no such method.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def is_sharded(param: nn.Parameter) -> bool:
    """Return whether ZeRO-3 shards the parameter.

    0.19.8 gives such a parameter a `ds_id` (runtime/zero/partition_parameters.py).
    """
    return hasattr(param, "ds_id")


def gather_states(zero, name: str, needed: Sequence[nn.Parameter], like: Tensor) -> Iterator[Pairs]:
    """Yield the optimizer state `name` of parameters, whole, in the dtype and on the device of `like`. A collective.

    Each list holds one group of parameters of `zero`, the engine's optimizer, so that the whole state of all groups
    never exists at once. The groups hold other parameters besides `needed`. Before the first update nothing is yielded.

    0.19.8 has four optimizers, which are told apart by the names of their groups:

        fp16_groups                ZeRO-3                       runtime/zero/stage3.py
        round_robin_bit16_groups   ZeRO-1 and 2                 runtime/zero/stage_1_and_2.py
        bf16_groups                ZeRO-1, bf16, accumulation   runtime/bf16_optimizer.py
        none of them               ZeRO-0 in fp32: the optimizer that fastdit gave it
    """
    if hasattr(zero, "fp16_groups"):
        yield from _gather_stage_3(zero, name, needed, like)
    elif hasattr(zero, "round_robin_bit16_groups"):
        groups, offsets = zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets
        yield from _gather_flat(zero, zero.single_partition_of_fp32_groups, groups, offsets, name, like)
    elif hasattr(zero, "bf16_groups"):
        offsets = [accumulate((p.numel() for p in group[:-1]), initial=0) for group in zero.bf16_groups]
        yield from _gather_flat(zero, zero.fp32_groups_flat_partition, zero.bf16_groups, offsets, name, like)
    elif states := zero.state:
        yield [(p, states[p][name]) for p in needed if name in states.get(p, {})]


def _gather_flat(zero, partitions, groups, offsets, name: str, like: Tensor) -> Iterator[Pairs]:
    """Yield from groups of parameters that are laid end to end, at `offsets`, and cut into one partition a rank."""
    for partition, params, starts, ranks in zip(partitions, groups, offsets, zero.real_dp_process_group):
        if (shard := _shard(zero, partition, name, like)) is not None:
            flat = _gather(shard, ranks).flatten()
            yield [(p, flat[at : at + p.numel()]) for p, at in zip(params, starts, strict=True)]


def _gather_stage_3(zero, name: str, needed: Sequence[nn.Parameter], like: Tensor) -> Iterator[Pairs]:
    """Yield from groups in which each parameter is cut into one part a rank, padded to equal sizes."""
    needed = set(needed)
    for params, partition in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
        if needed.isdisjoint(params) or (shard := _shard(zero, partition, name, like)) is None:
            continue
        shards, at = _gather(shard, zero.dp_process_group), 0
        pairs = []
        for p in params:
            size = p.partition_numel()
            pairs.append((p, shards[:, at : at + size].flatten()[: p.ds_numel]))
            at += size
        yield pairs


def _shard(zero, partition: Tensor, name: str, like: Tensor) -> Tensor | None:
    """Return this rank's part of the state, cast and moved as `like`; None before the first update."""
    state = zero.optimizer.state.get(partition, {})
    return state[name].to(like.device, like.dtype) if name in state else None


def _gather(shard: Tensor, group) -> Tensor:
    """Return the shards of all ranks, (ranks, size of a shard), in the order of the ranks."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return shard[None]
    whole = shard.new_empty(ranks, shard.numel())
    dist.all_gather_into_tensor(whole.view(-1), shard.contiguous(), group=group)
    return whole
