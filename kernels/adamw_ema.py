"""AdamW and any number of weight averages in one optimizer, so that ZeRO shards the averages like every other state.

DeepSpeed's ZeRO hands a client optimizer flat fp32 partitions; an average kept as *optimizer state* is therefore
partitioned, checkpointed and restored with the moments, at no extra code and no extra gather.

fp32 tensors are updated by csrc/adamw_ema.h in one pass over memory, on CPUs and GPUs, where it was built; everything
else by PyTorch, several passes.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from ._dispatch import CHOICES
from ._native import describe_native, load_native

AVERAGES_PER_PASS = 4  # kMaxAverages of csrc/adamw_ema.h


class AdamWEMA(torch.optim.Optimizer):
    """Decoupled AdamW (Loshchilov and Hutter 2019) followed by `ema <- decay * ema + (1 - decay) * weight`.

    A step whose gradients are not all finite on every rank changes nothing: no weight, moment, average or step count.
    The decision stays on the device. `nonfinite` (0-dim float32) is 1 if any update since `forget_nonfinite` was such
    a one (ZeRO calls `step` group by group, so one training step may be several updates).

    Args:
        params: parameters or parameter groups, as for every torch optimizer; all on one device.
        lr, betas, eps, weight_decay: AdamW's.
        emas: decay of each average by name. A schedule overwrites `group["emas"][name]` before each step.
        max_norm: gradients count scaled down to this L2 norm, taken over all that one `step` sees; None: as they are.
            Under ZeRO it means what it says only with a single parameter group.
        sharded: with several ranks: their gradients are parts of one (ZeRO 1 to 3), not copies of it, and the norm is
            that of the whole.
        implementation: None (FASTDIT_KERNELS, else auto), auto, cpp (csrc/, on a GPU its CUDA code) or reference.

    State per parameter: `step` (float32 scalar), `exp_avg`, `exp_avg_sq` and one tensor per average, named as in
    `emas`, starting at the weights before its first step. All have the parameter's shape and dtype. The state of
    `torch.optim.AdamW` can be loaded, and it can load this one's.

    Raises ValueError for an unknown `implementation`, and in `step` for `cpp` where that cannot run.
    """

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        emas=None,
        *,
        max_norm: float | None = None,
        sharded: bool = False,
        implementation: str | None = None,
    ):
        if implementation not in (None, "auto", "cpp", "reference"):
            raise ValueError(f"implementation={implementation!r}: AdamWEMA has auto, cpp and reference")
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
        self.max_norm, self.sharded, self.implementation = max_norm, sharded, implementation
        self._squared_norm: Tensor | None = None
        self.forget_nonfinite()

    def forget_nonfinite(self) -> None:
        # On the CPU, whose scalars mix with any device without a sync: ZeRO-3's groups are empty between steps.
        self.nonfinite = torch.zeros(())

    @property
    def grad_norm(self) -> Tensor | None:
        """L2 norm of all gradients of the last `step`, before `max_norm`: 0-dim float64 on their device, not finite if
        they were not. None before the first."""
        return None if self._squared_norm is None else self._squared_norm.sqrt()

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; gradients stay as they are.

        Raises ValueError for a closure: none is supported.
        """
        if closure is not None:
            raise ValueError("AdamWEMA.step takes no closure")
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        grads = [p.grad for _, params in groups for p in params]
        if not grads:
            return
        skip, grad_scale = self._judge(grads)
        self.nonfinite = torch.maximum(self.nonfinite, skip)
        for group, params in groups:
            if params:
                self._step_group(group, params, skip, grad_scale)

    def _judge(self, grads: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """0-dim float32: 1 if any rank's gradients hold a NaN or infinity, the same on all; and the factor on them."""
        own = squared_norm(grads, implementation=self.implementation)
        total = _sum_over_ranks(own)
        self._squared_norm = total if self.sharded else own
        skip = (~total.isfinite()).float()
        if self.max_norm is None:
            return skip, None
        return skip, (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1).float()  # as torch's clip_grad_norm_

    def _step_group(self, group: dict, params: list[Tensor], skip: Tensor, grad_scale: Tensor | None) -> None:
        states = [self._state_of(p, group["emas"]) for p in params]
        adamw_ema_(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
            [(decay, [s[name] for s in states]) for name, decay in group["emas"].items()],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            skip=skip,
            grad_scale=grad_scale,
            implementation=self.implementation,
        )

    def _state_of(self, param: Tensor, emas) -> dict:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        for name in emas:
            if name not in state:
                state[name] = param.detach().clone()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Also takes the state of `torch.optim.AdamW`; an average it lacks starts at the weights of the next step."""
        emas = [group["emas"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, emas):
            group.setdefault("emas", own)
            group["fused"] = True
        for param, state in self.state.items():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[tuple[float, Sequence[Tensor]]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    skip: Tensor,
    grad_scale: Tensor | None = None,
    bf16_copies: Sequence[Tensor] = (),
    implementation: str | None = None,
) -> None:
    """One step of AdamW with averages, in place, on lists of tensors of equal shapes.

    steps: 0-dim float32, finished steps, counted up. averages: (decay, tensors) each. skip, grad_scale: 0-dim float32;
    skip not 0 changes nothing; gradients count times grad_scale. bf16_copies: bfloat16, get the new weights rounded to
    nearest even. Raises ValueError when `implementation` is cpp and that cannot run.
    """
    fp32 = [*params, *grads, *exp_avgs, *exp_avg_sqs, *steps, skip, *(t for _, group in averages for t in group)]
    fp32 += [] if grad_scale is None else [grad_scale]
    kernels = _kernels_for(fp32, implementation, bf16_copies)
    first, rest = averages[:AVERAGES_PER_PASS], averages[AVERAGES_PER_PASS:]
    if kernels:
        filled = [i for i, p in enumerate(params) if p.numel()]
        lists = [
            [tensors[i].data_ptr() for i in filled]
            for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps, *(group for _, group in first))
        ]
        with torch.cuda.device_of(skip):
            kernels.adamw_ema(
                *lists[:5],
                lists[5:],
                [bf16_copies[i].data_ptr() for i in filled] if bf16_copies else [],
                [params[i].numel() for i in filled],
                [decay for decay, _ in first],
                lr,
                *betas,
                eps,
                weight_decay,
                skip.data_ptr(),
                0 if grad_scale is None else grad_scale.data_ptr(),
                _context(skip),
            )
        torch.autograd.graph.increment_version(params)
    else:
        if grad_scale is not None:
            grads = torch._foreach_mul(grads, grad_scale)
        _adamw_reference(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, skip)
        for copy, param in zip(bf16_copies, params):
            copy.copy_(torch.where(skip.bool(), copy, param.to(copy.dtype)))
        rest = averages
    for decay, tensors in rest:
        average_reference(tensors, params, decay, skip)


def squared_norm(tensors: Sequence[Tensor], *, implementation: str | None = None) -> Tensor:
    """Sum of squares over all `tensors`, 0-dim float64 on their device: the same bits every time."""
    kernels = _kernels_for(tensors, implementation)
    if not kernels:
        return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
    filled = [t for t in tensors if t.numel()]
    with torch.cuda.device_of(tensors[0]):
        total = kernels.squared_norm([t.data_ptr() for t in filled], [t.numel() for t in filled], _context(tensors[0]))
    return torch.as_tensor(total, dtype=torch.float64)


def describe_optimizer(device: torch.device | str, implementation: str | None = None) -> str:
    """'optimizer: csrc (cpu)', or what else runs and why, for the start of a run."""
    device = torch.device(device)
    if _kernels_for([torch.empty(0, device=device)], implementation):
        return f"optimizer: csrc ({device.type})"
    return f"optimizer: torch ({device.type}); {describe_native(device)}"


def _kernels_for(tensors: Sequence[Tensor], implementation: str | None, bf16_copies: Sequence[Tensor] = ()):
    """The compiled kernels if they are wished for and can serve, else None. FASTDIT_KERNELS is as in `_dispatch`."""
    wish = implementation or os.environ.get("FASTDIT_KERNELS", "auto")
    if wish not in CHOICES:
        raise ValueError(f"FASTDIT_KERNELS={wish!r} is unknown; choose one of {', '.join(CHOICES)}")
    if wish not in ("auto", "cpp"):
        return None
    device = tensors[0].device
    kernels, problem = load_native(device.type)
    for dtype, listed in ((torch.float32, tensors), (torch.bfloat16, bf16_copies)):
        if any(t.dtype != dtype or t.device != device or not t.is_contiguous() for t in listed):
            problem = problem or f"it takes contiguous {dtype} tensors on one device"
    if problem and implementation == "cpp":
        raise ValueError(f"implementation='cpp' cannot run here: {problem}")
    return None if problem else kernels


def _context(tensor: Tensor) -> int:
    """What a kernel needs to know of its surroundings: threads of a CPU, stream of a GPU."""
    return torch.cuda.current_stream().cuda_stream if tensor.is_cuda else torch.get_num_threads()


def _adamw_reference(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, skip) -> None:
    adamw(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        fused=True,
        found_inf=skip,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def average_reference(averages, params, decay: float, skip: Tensor) -> None:
    skip = skip.to(torch.promote_types(averages[0].dtype, torch.float32))
    weight = (1.0 - decay) * (1.0 - skip)
    torch._foreach_lerp_(averages, params, [weight] * len(averages))


def _sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` (0-dim) over all ranks, on its device."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    total = value.cuda() if dist.get_backend() == "nccl" else value.clone()  # offloaded: NCCL has no CPU tensors
    dist.all_reduce(total)
    return total.to(value.device)
