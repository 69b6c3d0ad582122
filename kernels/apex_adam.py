"""AdamWEMA with AdamW's arithmetic done by NVIDIA apex's FusedAdam, for those who have apex and want it.

It moves more memory than csrc/: the averages are a second pass. Written against apex/optimizers/fused_adam.py of
NVIDIA/apex 6424da3 (July 2026), whose capturable mode is of January 2023.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .adamw_ema import AdamWEMA, average_reference


class ApexAdamEMA(AdamWEMA):
    """AdamWEMA, updated by `apex.optimizers.FusedAdam`. Arguments, groups, state and promises are AdamWEMA's, and each
    reads the other's state; `implementation` is that of the gradients' norm.

    Nothing waits for the device, bad gradients included: a capturable FusedAdam takes the flag to skip and the
    gradients' scale as tensors from what it is given as `grad_scaler`, and its kernels return at once under the flag.

    What differs: parameters are float32, on a GPU, and of less than 2^31 elements each (its kernels count in 32 bits);
    all that one `step` updates in a group take the step count of the first; `max_norm` scales gradients in place.

    Raises ValueError also where FusedAdam cannot be had, and in `step` for parameters of another dtype or size.
    """

    def __init__(self, params, *args, **kwargs):
        super().__init__(params, *args, **kwargs)
        self._fused = _make_fused_adam()

    def _step_group(self, group: dict, params: list[Tensor], skip: Tensor, grad_scale: Tensor | None) -> None:
        if any(p.dtype != torch.float32 or p.numel() >= 2**31 for p in params):
            raise ValueError("FusedAdam updates float32 parameters of less than 2^31 elements each; take AdamWEMA")
        states = [self._state_of(p, group["emas"]) for p in params]
        steps = [state["step"] for state in states]
        filled = [p for p in params if p.numel()]  # FusedAdam launches nothing if the last is empty
        if not filled:
            return
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
        fused._dummy_overflow_buf.zero_()  # with the flag of its last call still up, it would not count this step
        fused.step(grad_scaler=_Verdict(skip, grad_scale))
        torch._foreach_add_(steps, [1 - skip] * len(steps))
        for name, decay in group["emas"].items():
            average_reference([state[name] for state in states], params, decay, skip)


@dataclass(frozen=True)
class _Verdict:
    """The part of a `torch.amp.GradScaler` that FusedAdam asks: skip or not, and the factor that gradients carry."""

    skip: Tensor
    grad_scale: Tensor | None

    def _check_inf_per_device(self, optimizer) -> dict[torch.device, Tensor]:
        return {self.skip.device: self.skip}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self.skip) if self.grad_scale is None else self.grad_scale.double().reciprocal()


def _make_fused_adam():
    """Without parameters: it is told them in each step."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            f"apex.optimizers.FusedAdam cannot be imported ({error}): NVIDIA's apex is built from source "
            "(github.com/NVIDIA/apex); the package named apex on the index is another one"
        ) from None
    try:
        return FusedAdam([{"params": []}], adam_w_mode=True, capturable=True)
    except (RuntimeError, AssertionError, TypeError) as error:  # no CUDA extensions; no GPU; older than its capturable
        raise ValueError(f"apex.optimizers.FusedAdam cannot be used here: {error}") from None
