"""Reach into DeepSpeed where it has no public interface. No other module of fastdit does.

Every attribute here was read in DeepSpeed 0.19.8. pyproject.toml keeps later minor versions out, since they may rename
or drop any of them. This module imports nothing of fastdit, so that any other may import it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

MUON = "deepspeed.runtime.zero.muon.muon_optimizer"

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
def skip_muon() -> Iterator[None]:
    """Let `deepspeed.initialize` in the block not import the Muon optimizer, which imports torch's compiler.

    0.19.8 imports it to compare types (runtime/zero/utils.py and stage3.py), and gets a class that nothing is of. The
    compiler would take 4 s of a CPU's time.
    """
    absent = MUON not in sys.modules
    if absent:
        sys.modules[MUON] = ModuleType(MUON)
        sys.modules[MUON].MuonWithAuxAdam = type("MuonWithAuxAdam", (), {})
    try:
        yield
    finally:
        if absent:
            del sys.modules[MUON]


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


def zero_settings() -> list[str]:
    """Return the names that a file's `zero_optimization` may hold (runtime/zero/config.py in 0.19.8)."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    return [*fields, *(field.alias for field in fields.values() if field.alias)]


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
    elif flat := _flat_groups(zero):
        for partition, params, starts, ranks in flat:
            if (shard := _shard(zero, partition, name, like)) is not None:
                whole = _gather(shard, ranks).flatten()
                yield [(p, whole[at : at + p.numel()]) for p, at in zip(params, starts, strict=True)]
    elif states := zero.state:
        yield [(p, states[p][name]) for p in needed if name in states.get(p, {})]


def _flat_groups(zero) -> list[tuple[Tensor, Sequence[nn.Parameter], Sequence[int], dist.ProcessGroup]]:
    """Return the groups of ZeRO-1 and 2, whose parameters are laid end to end and cut into one partition a rank.

    Each is (this rank's fp32 partition, parameters, their offsets, process group). There are none under ZeRO-0 and 3.
    """
    if hasattr(zero, "round_robin_bit16_groups"):
        partitions, groups = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
        offsets = zero.round_robin_bit16_offsets
    elif hasattr(zero, "bf16_groups"):
        partitions, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
        offsets = [list(accumulate((p.numel() for p in group[:-1]), initial=0)) for group in groups]
    else:
        return []
    return list(zip(partitions, groups, offsets, zero.real_dp_process_group))


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


class Part(NamedTuple):
    """Hold this rank's part of a parameter: a run of its elements, flattened.

    Args:
        param: the parameter, which may be frozen.
        start: the number of elements before the run.
        weights: the run, 1-D; in fp32, which the optimizer updates, unless the parameter is frozen.
        state: its optimizer state by name: tensors like `weights`, and `step` (). Empty before the first update.
        copies: the number of ranks that hold the same part.
    """

    param: nn.Parameter
    start: int
    weights: Tensor
    state: dict[str, Tensor]
    copies: int


def local_parts(engine, state_of: Callable[[Tensor], dict[str, Tensor]]) -> Iterator[Part]:
    """Yield this rank's parts of all parameters of the engine's module. Their tensors share memory with the run's.

    All ranks together hold every element, the trained ones in fp32. Padding is left out.

    state_of: returns the state of a parameter of the optimizer that fastdit gave DeepSpeed: of a partition under ZeRO.
    """
    zero, world = engine.optimizer, dist.get_world_size()
    trained = [p for p in engine.module.parameters() if p.requires_grad]

    # Yield what the optimizer updates.
    for partition, places in _places(zero, trained):
        state, weights = state_of(partition), partition.detach().view(-1)
        for param, start, at, length in places:
            own = {k: v if k == "step" else v.view(-1)[at : at + length] for k, v in state.items()}
            yield Part(param, start, weights[at : at + length], own, world if partition is param else 1)

    # Yield the frozen parameters.
    for param in engine.module.parameters():
        if not param.requires_grad:
            start, length = _shard_of(param, dist.get_rank()) if is_sharded(param) else (0, param.numel())
            yield Part(param, start, local_part(param).view(-1)[:length], {}, 1 if is_sharded(param) else world)


def _places(zero, trained) -> Iterator[tuple[Tensor, list[tuple[nn.Parameter, int, int, int]]]]:
    """Yield each tensor that the optimizer updates, with the places of the parameters in it.

    A place is (parameter, first element of the parameter, first element of the tensor, number of elements).
    """
    if hasattr(zero, "fp16_groups"):
        rank = dist.get_rank(zero.dp_process_group)
        for params, partition in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
            offsets = accumulate((p.partition_numel() for p in params), initial=0)
            shards = [_shard_of(p, rank) for p in params]
            yield partition, [(p, start, at, length) for p, (start, length), at in zip(params, shards, offsets)]
    elif flat := _flat_groups(zero):
        for partition, params, offsets, ranks in flat:
            first = dist.get_rank(ranks) * partition.numel()
            runs = [
                (p, max(at, first), min(at + p.numel(), first + partition.numel()), at)
                for p, at in zip(params, offsets, strict=True)
            ]
            yield partition, [(p, lo - at, lo - first, hi - lo) for p, lo, hi, at in runs if lo < hi]
    else:
        for p in trained:
            yield p, [(p, 0, 0, p.numel())]


def _shard_of(param: nn.Parameter, rank: int) -> tuple[int, int]:
    """Return the first element and the number of elements that `rank` holds of a parameter that ZeRO-3 shards."""
    size = param.partition_numel()
    start = min(rank * size, param.ds_numel)
    return start, min(size, param.ds_numel - start)


@torch.no_grad()
def rewrite_weights(engine, whole: Callable[[nn.Parameter], Tensor]) -> None:
    """Give the network the weights that were written into its `local_parts`. A collective.

    whole: returns a trained parameter's fp32 weights in its shape. ZeRO-3 does not call it.

    Under ZeRO-3, 0.19.8 does so in `_rigid_load_state_dict` of runtime/zero/stage3.py.
    """
    zero = engine.optimizer
    if not hasattr(zero, "fp16_groups"):
        for param in engine.module.parameters():
            if param.requires_grad:
                param.copy_(whole(param))
        return
    zero.checkpoint_event_prologue()  # shards the parameters that are whole
    for group, weights in enumerate(zero.fp32_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[group].copy_(weights)
        zero._unflatten_partitioned_parameters(group)
    zero.checkpoint_event_epilogue()  # makes small parameters whole again


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter, also if ZeRO-3 shards it."""
    return tuple(param.ds_shape if is_sharded(param) else param.shape)


def set_counters(engine, steps: int, skipped: int) -> None:
    """Set the engine's numbers of steps and of steps that it skipped, as its `load_checkpoint` does."""
    engine.global_steps, engine.skipped_steps = steps, skipped
    engine.global_samples = steps * engine.train_batch_size()
