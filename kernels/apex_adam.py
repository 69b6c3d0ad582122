"""Run AdamWEMA's update of weights and moments in NVIDIA apex's FusedAdam, where apex is installed.

It moves more memory than csrc/, because the EMAs take a second pass. It was written against
apex/optimizers/fused_adam.py of NVIDIA/apex 6424da3 (July 2026), whose capturable mode dates from January 2023.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .adamw_ema import AdamWEMA, ema_reference


class ApexAdamEMA(AdamWEMA):
    """Update an AdamWEMA by `apex.optimizers.FusedAdam` (arXiv 1711.05101, algorithm 2).

    Arguments, parameter groups, state and the handling of nonfinite gradients are AdamWEMA's, and either class loads
    the other's state. `implementation` chooses how the gradient norm is computed.

    Nothing waits for the device, nonfinite gradients included. A capturable FusedAdam reads the skip flag and the
    gradients' scale as tensors from its `grad_scaler` argument, and its kernels return at once under the flag.

    There are three differences. Parameters are float32, on a GPU, and have less than 2^31 elements each, because
    FusedAdam's kernels count in 32 bits. All parameters that one `step` updates in a group take the step count of the
    first. `max_norm` scales gradients in place.

    Raises ValueError as AdamWEMA does, where FusedAdam cannot be used, and in `step` for parameters of another dtype or
    size.
    """

    def __init__(self, params, *args, **kwargs):
        super().__init__(params, *args, **kwargs)
        self._fused = _make_fused_adam()

    def _step_group(
        self,
        group: dict,
        params: list[Tensor],
        grads: list[Tensor],
        bf16_copies: list[Tensor],
        skip: Tensor,
        grad_scale: Tensor | None,
    ) -> None:
        """Update the parameters of one group, whose gradients must be their `grad`, without bf16 copies."""
        if bf16_copies or any(p.grad is not grad for p, grad in zip(params, grads)):
            raise ValueError("FusedAdam takes gradients from the parameters and writes no copies; use AdamWEMA")
        if any(p.dtype != torch.float32 or p.numel() >= 2**31 for p in params):
            raise ValueError("FusedAdam updates float32 parameters of less than 2^31 elements each; use AdamWEMA")
        # Collect the states of the parameters that have elements.
        states = [self.state_of(p, group["emas"]) for p in params]
        steps = [state["step"] for state in states]
        filled = [p for p in params if p.numel()]  # FusedAdam launches no kernel if the last is empty
        if not filled:
            return
        # Point FusedAdam at them, and run it.
        fused = self._fused
        fused.state = self.state
        fused.param_groups = [
            {
                "params": filled,
                "lr": torch.full((), group["lr"], dtype=torch.float32, device=skip.device),
                "step": self.state[filled[0]]["step"].int().view(1),
                "bias_correction": True,
                **{name: group[name] for name in ("betas", "eps", "weight_decay")},
            }
        ]
        fused.param_groups_master = [{"params": [None] * len(filled)}]
        fused._dummy_overflow_buf.zero_()  # a flag left from its last call would stop its step count
        fused.step(grad_scaler=_SkipAndScale(skip, grad_scale))
        # Count the step and update the EMAs.
        torch._foreach_add_(steps, [1 - skip] * len(steps))
        for name, decay in group["emas"].items():
            ema_reference([state[name] for state in states], params, decay, skip)


@dataclass(frozen=True)
class _SkipAndScale:
    """Imitate the part of `torch.amp.GradScaler` that FusedAdam reads: the skip flag and the gradients' scale."""

    skip: Tensor
    grad_scale: Tensor | None

    def _check_inf_per_device(self, optimizer) -> dict[torch.device, Tensor]:
        return {self.skip.device: self.skip}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self.skip) if self.grad_scale is None else self.grad_scale.double().reciprocal()


def _make_fused_adam():
    """Return a FusedAdam without parameters, which each step sets. Raises ValueError where there is none."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            f"apex.optimizers.FusedAdam cannot be imported ({error}): NVIDIA's apex is built from source "
            "(github.com/NVIDIA/apex); the package named apex on the index is another one"
        ) from None
    try:
        return FusedAdam([{"params": []}], adam_w_mode=True, capturable=True)
    except (RuntimeError, AssertionError, TypeError) as error:  # no CUDA extension, no GPU, or too old for capturable
        raise ValueError(f"apex.optimizers.FusedAdam cannot be used here: {error}") from None
