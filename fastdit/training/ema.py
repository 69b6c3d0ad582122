"""The sampled weights: the EMA kept in the optimizer's (ZeRO-sharded) state, gathered whole only when asked for."""

import torch
from deepspeed import zero
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn

EMA = "ema"


def ema_state(engine, network: nn.Module, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The whole EMA (fp32, on `device`) as a state dict of `network`, the part of the engine's module that is sampled.

    A collective: call it on every rank.

    Parameters are gathered one at a time, so a GPU never holds more than the largest beside its own shard (when
    `device` is the CPU). Before the first update, and of frozen weights, it is the weights themselves.
    """
    optimizer = engine.optimizer
    started = engine.global_steps > engine.skipped_steps
    if started and hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()  # not linked yet right after a resume
    averages = {
        name: (_average(optimizer, param) if started and param.requires_grad else _weight(param)).to(device, copy=True)
        for name, param in network.named_parameters()
    }
    buffers = {k: v.to(device, copy=True) for k, v in network.state_dict().items() if k not in averages}
    return averages | buffers


def _average(optimizer, param) -> torch.Tensor:
    full = safe_get_full_optimizer_state(param, EMA)
    return optimizer.state[param][EMA] if full is None else full  # None: ZeRO 0 in fp32, a plain AdamWEMA


def _weight(param) -> torch.Tensor:
    with zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
        return param.detach().float().clone()
