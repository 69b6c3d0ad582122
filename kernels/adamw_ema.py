"""AdamW and any number of weight averages in one optimizer, so that ZeRO shards the averages like every other state.

DeepSpeed's ZeRO hands a client optimizer flat fp32 partitions; an average kept as *optimizer state* is therefore
partitioned, checkpointed and restored with the moments, at no extra code and no extra gather.
"""

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw


class AdamWEMA(torch.optim.Optimizer):
    """Decoupled AdamW (Loshchilov and Hutter 2019) followed by `ema <- decay * ema + (1 - decay) * weight`.

    A step whose gradients are not all finite on every rank leaves weights, moments and step count as they are; the
    decision stays on the device. `nonfinite` (0-dim float32) is 1 if any update since `forget_nonfinite` was such a
    one (ZeRO updates group by group, so one training step may be several updates).

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        lr, betas, eps, weight_decay: AdamW's.
        emas: decay of each average by name. A schedule overwrites `group["emas"][name]` before each step.

    State per parameter: `step` (float32 scalar), `exp_avg`, `exp_avg_sq` and one tensor per average, named as in
    `emas`, starting at the weights before the first step. All have the parameter's shape and dtype.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, emas=None):
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "emas": dict(emas or {}),
        }
        # torch's own load_state_dict keeps `step` a float32 tensor on the device only for fused optimizers.
        super().__init__(params, defaults | {"fused": True})
        for group in self.param_groups:
            group["emas"] = dict(group["emas"])  # groups must not share one mutable mapping
        self.forget_nonfinite()

    def forget_nonfinite(self) -> None:
        self.nonfinite = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Raises ValueError for a closure: none is supported."""
        if closure is not None:
            raise ValueError("AdamWEMA.step takes no closure")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group, params):
        states = [self._state_of(p, group["emas"]) for p in params]
        grads = [p.grad for p in params]
        skip = self._any_nonfinite(grads)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            found_inf=skip,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        # After a skipped step this moves the average towards finite, unchanged weights: harmless, and no branch.
        for name, decay in group["emas"].items():
            torch._foreach_lerp_([s[name] for s in states], params, 1.0 - decay)

    def _state_of(self, param, emas):
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
            for name in emas:
                state[name] = param.detach().clone()
        return state

    def _any_nonfinite(self, grads) -> torch.Tensor:
        """0-dim float32: 1 if any rank's gradients hold a NaN or infinity. All ranks get the same answer."""
        norms = torch.stack(torch._foreach_norm(grads))
        flag = (~norms.isfinite().all()).float()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.nonfinite = torch.maximum(self.nonfinite, flag)
        return flag
