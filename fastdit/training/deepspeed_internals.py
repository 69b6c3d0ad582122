"""Reach into DeepSpeed where it has no public interface. No other module of fastdit does.

Every attribute here was read in DeepSpeed 0.19.8. pyproject.toml keeps later minor versions out, since they may rename
or drop any of them. This module imports nothing of fastdit, so that any other may import it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Parameters, each with its whole value as a flat tensor, which may share memory with the others.
Pairs = list[tuple[nn.Parameter, Tensor]]

# What `shorten_step_on_one_rank` replaces or reads. Where one is missing, DeepSpeed keeps its own step.
ENGINE_NAMES = (
    "_reduce_non_expert_gradients",
    "communication_data_type",
    "gradient_predivide_factor",
    "managed_gradient_accumulation",
    "wall_clock_breakdown",
    "zero_optimization_stage",
)
ZERO_NAMES = (
    "_get_compact_grad_partition_buffer",
    "_global_grad_norm",
    "_lazy_init_hp_params_optimizer_state",
    "_use_compact_grad_partition_buffer",
    "all_grad_tensors",
    "averaged_gradients",
    "bit16_groups_flat",
    "check_grad_overflow",
    "clip_grad",
    "compute_grad_norm",
    "cpu_offload",
    "flatten",
    "gradient_accumulation_steps",
    "has_moe_layers",
    "ipg_buckets",
    "loss_scale",
    "overflow",
    "overlapping_partition_gradients_reduce_epilogue",
    "params_in_partition",
    "partition_gradients",
    "partition_size",
    "process_gradients",
    "reduce_gradients",
    "round_robin_bit16_padding",
    "single_partition_of_fp32_groups",
    "step",
    "use_grad_accum_attribute",
    "zenflow",
)
# AdamWEMA.update: takes the gradient of each weight and, of some weights, the bf16 tensor that gets their new values.
Update = Callable[[dict[Tensor, Tensor], dict[Tensor, Tensor]], None]


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


def shorten_step_on_one_rank(engine, update: Update | None) -> None:
    """Keep an engine with one rank from reducing gradients and, with `update`, from converting gradients and weights.

    Weights, states and the gradient norm keep the same bits. With more ranks, and with settings that change a gradient
    on the way or that are read while it is reduced, DeepSpeed's own step remains.

    With one rank, 0.19.8 flattens all gradients, divides them by 1, all-reduces them and copies them back, two or three
    launches for each parameter. The functions below replace methods of the engine (runtime/engine.py) and of its
    optimizer for ZeRO-1 and 2 (runtime/zero/stage_1_and_2.py). ZeRO-1 in bf16 with fp32 accumulation has an optimizer
    of its own (runtime/bf16_optimizer.py), whose reduction rounds the gradients to bf16; it remains.
    """
    zero = engine.optimizer
    if dist.get_world_size() > 1 or not all(hasattr(engine, name) for name in ENGINE_NAMES):
        return
    if engine.gradient_predivide_factor() != 1 or not engine.managed_gradient_accumulation():
        return
    if hasattr(zero, "round_robin_bit16_groups"):
        if _reduces_without_effect(zero):
            _collect_gradients(zero)
            if update and not engine.wall_clock_breakdown() and _only_updates(zero):
                _update_directly(zero, update)
    elif engine.zero_optimization_stage() == 0 and {engine.communication_data_type} == {
        p.dtype for p in engine.module.parameters() if p.requires_grad
    }:
        # Its caller has set the gradients of parameters that had none to zero.
        engine._reduce_non_expert_gradients = _do_nothing


def _reduces_without_effect(zero) -> bool:
    """Return whether the reduction of `zero`, for ZeRO-1 or 2 on one rank, leaves every gradient as it is."""
    if not all(hasattr(zero, name) for name in ZERO_NAMES):
        return False
    groups = range(len(zero.params_in_partition))
    dtypes = {p.dtype for group in zero.params_in_partition for p in group}
    return (
        not (zero.cpu_offload or zero.zenflow or zero.has_moe_layers or zero.use_grad_accum_attribute)
        and set(zero.ipg_buckets) == dtypes  # it communicates in the gradients' own dtype
        and not any(map(any, zero.round_robin_bit16_padding))
        # ZeRO-2 without an fp32 buffer adds up micro-batches in tensors that autograd may own.
        and (
            not zero.partition_gradients
            or zero.gradient_accumulation_steps == 1
            or all(map(zero._use_compact_grad_partition_buffer, groups))
        )
    )


def _collect_gradients(zero) -> None:
    """Replace the reduction of `zero` by handing autograd's own gradients to `zero.step`.

    In 0.19.8 the hooks of the parameters call `process_gradients`, which copies gradients into buckets, and the engine
    calls `reduce_gradients` (ZeRO-1, at the last micro-batch) or `overlapping_partition_gradients_reduce_epilogue`
    (ZeRO-2, at each). `averaged_gradients[group]` then holds the group's gradients: a list of tensors, or an fp32
    buffer, to which ZeRO-2 adds the micro-batches.
    """
    # DeepSpeed's gradient norm would add in another order if the gradients lay elsewhere.
    buffered = zero.partition_gradients and (zero.gradient_accumulation_steps > 1 or zero.compute_grad_norm)
    paddings = [
        weights.new_zeros(weights.numel() - sum(p.numel() for p in params))
        for weights, params in zip(zero.bit16_groups_flat, zero.params_in_partition)
    ]

    @torch.no_grad()
    def collect(*args, **kwargs) -> None:
        for group, params in enumerate(zero.params_in_partition):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            gradients += [paddings[group]] if paddings[group].numel() else []
            for p in params:
                p.grad = None
            if buffered and zero._use_compact_grad_partition_buffer(group):
                zero._get_compact_grad_partition_buffer(group).flat_partition.add_(zero.flatten(gradients))
            else:
                zero.averaged_gradients[group] = gradients

    zero.process_gradients = _do_nothing
    zero.reduce_gradients = zero.overlapping_partition_gradients_reduce_epilogue = collect


def _only_updates(zero) -> bool:
    """Return whether `zero.step` does nothing but update the weights: no norm, no clipping, no check of gradients."""
    return (
        len(zero.single_partition_of_fp32_groups) == 1
        and zero.single_partition_of_fp32_groups[0].dtype == torch.float32
        and zero.bit16_groups_flat[0].dtype in (torch.float32, torch.bfloat16)
        and not (zero.compute_grad_norm or zero.check_grad_overflow or zero.clip_grad)
        and zero.loss_scale == 1
    )


def _update_directly(zero, update: Update) -> None:
    """Replace `zero.step` by one call of `update`, which reads bf16 gradients and writes bf16 weights.

    0.19.8 converts the gradients to fp32 before the update and copies the weights to bf16 after it. With one EMA it
    moves 56 bytes a weight: 4 to flatten the gradients, 6 to convert them, 4 for their norm, 36 for the update and 6 to
    copy the weights. This one moves 42: 4, 2 for the norm and 36. The gradients are flattened still, because the bits
    of their norm depend on the order in which it is added up.
    """
    partition, weights = zero.single_partition_of_fp32_groups[0], zero.bit16_groups_flat[0]

    @torch.no_grad()
    def step(closure=None) -> None:
        zero.overflow, zero._global_grad_norm = False, None
        gradients = zero.averaged_gradients[0]
        flat = getattr(gradients, "flat_partition", None)
        flat = zero.flatten(gradients) if flat is None else flat
        zero.averaged_gradients[0] = zero.all_grad_tensors[0] = gradients = None  # frees autograd's tensors
        if weights.dtype == torch.bfloat16:
            update({partition: flat}, {partition: weights})
        else:
            update({partition: flat}, {})
            weights.copy_(partition)
        zero._lazy_init_hp_params_optimizer_state()

    zero.step = step


def _do_nothing(*args, **kwargs) -> None:
    """Stand in for a method whose effect one rank does not need."""


def precision_written(folder: Path) -> str | None:
    """Return "bf16" or "fp32", in which the checkpoint in `folder` was written; None under ZeRO-0, which loads either.

    0.19.8 puts bf16_ before the names of ZeRO's files (runtime/engine.py, `_get_zero_ckpt_prefix`).
    """
    names = [path.name for path in folder.glob("*zero_pp_rank_*_optim_states.pt")]
    return None if not names else "bf16" if names[0].startswith("bf16_") else "fp32"


def is_sharded(param: nn.Parameter) -> bool:
    """Return whether ZeRO-3 shards the parameter.

    0.19.8 gives such a parameter a `ds_id` (runtime/zero/partition_parameters.py).
    """
    return hasattr(param, "ds_id")


def local_part(param: nn.Parameter) -> Tensor:
    """Return this rank's shard of a parameter that ZeRO-3 shards, and the whole value of any other parameter."""
    return (param.ds_tensor if is_sharded(param) else param).detach()


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
