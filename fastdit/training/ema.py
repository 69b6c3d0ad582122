"""Gather the EMA weights, which ZeRO shards as optimizer state, into a state dict of the sampled network."""

import torch
from deepspeed import zero
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn

from fastdit.training.deepspeed_internals import is_sharded, link_optimizer_states

EMA = "ema"  # name of the EMA that is sampled, in the optimizer's state


def ema_state(engine, network: nn.Module, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Return the EMA weights as a state dict of `network`, the part of the engine's module that is sampled.

    It is a collective. The EMA weights are whole, fp32 and on `device`; buffers are copied as they are. Before the
    first update, and for frozen parameters, the EMA weights are the weights themselves.

    Parameters are gathered one at a time. With `device` on the CPU, a GPU never holds more than the largest parameter
    beside its own shard.
    """
    # Make the states readable: right after a resume, DeepSpeed has not linked them to the parameters yet.
    optimizer = engine.optimizer
    updated = engine.global_steps > engine.skipped_steps
    if updated:
        link_optimizer_states(optimizer)

    # Gather each parameter's EMA, and copy the buffers.
    ema_weights = {
        name: (_ema(optimizer, param) if updated and param.requires_grad else _weight(param)).to(device, copy=True)
        for name, param in network.named_parameters()
    }
    buffers = {k: v.to(device, copy=True) for k, v in network.state_dict().items() if k not in ema_weights}
    return ema_weights | buffers


def _ema(optimizer, param: nn.Parameter) -> torch.Tensor:
    """Return the EMA of one parameter, whole, in fp32."""
    full = safe_get_full_optimizer_state(param, EMA)
    return optimizer.state[param][EMA] if full is None else full  # None: ZeRO-0 in fp32 has a plain AdamWEMA


def _weight(param: nn.Parameter) -> torch.Tensor:
    """Return a copy of one parameter, whole, in fp32."""
    with zero.GatheredParameters([param], enabled=is_sharded(param)):
        return param.detach().float().clone()
