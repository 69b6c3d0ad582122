"""AdamW and any number of EMAs of the weights in one optimizer, so that ZeRO shards the EMAs like every other state.

DeepSpeed's ZeRO gives a client optimizer flat fp32 partitions. EMA weights that are *optimizer state* are therefore
partitioned, checkpointed and restored with the moments, without extra code and without an extra gather.

csrc/adamw_ema.h updates fp32 tensors by fp32 or bf16 gradients in one pass over memory, on CPUs and GPUs, where it was
built. PyTorch updates everything else in several passes.
"""

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from ._dispatch import CHOICES
from ._native import describe_native, load_native

EMAS_PER_PASS = 4  # kMaxAverages of csrc/adamw_ema.h


class AdamWEMA(torch.optim.Optimizer):
    """Update weights by AdamW (arXiv 1711.05101, algorithm 2), and then EMAs of the weights.

    An EMA follows `ema <- decay * ema + (1 - decay) * weight`.

    A step with a NaN or infinite gradient on any rank, or a loss that `require_finite` was given, changes nothing: no
    weight, moment, EMA or step count. The decision stays on the device. `nonfinite` (0-dim float32) is 1 if any update
    since `forget_nonfinite` was skipped.
    ZeRO calls `step` group by group, so one training step may be several updates.

    Args:
        params: parameters or parameter groups, as for every torch optimizer, all on one device.
        lr, betas, eps, weight_decay: those of AdamW.
        emas: the decay of each EMA by name. A schedule overwrites `group["emas"][name]` before each step.
        max_norm: clip gradients to this L2 norm, taken over all gradients that one `step` sees. None does not clip.
            Under ZeRO the norm is the whole model's only with a single parameter group.
        sharded: whether ranks hold parts of one gradient (ZeRO 1 to 3) instead of copies of it. The norm is then summed
            over ranks.
        implementation: None (FASTDIT_KERNELS, else auto), auto, cpp (csrc/, on a GPU its CUDA code) or reference.

    The state of a parameter is `step` (float32 scalar), `exp_avg`, `exp_avg_sq` and one tensor for each EMA, named as
    in `emas`, which starts at the weights before its first step. All have the parameter's shape and dtype. States of
    `torch.optim.AdamW` and of this class can be loaded into each other.

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

    def add_param_group(self, param_group: dict) -> None:
        """Do as torch does, without its decorator, which imports torch's compiler (see `_operator.py`)."""
        method = torch.optim.Optimizer.add_param_group
        getattr(method, "__wrapped__", method)(self, param_group)

    def forget_nonfinite(self) -> None:
        """Reset `nonfinite` to zero, and forget the losses of `require_finite`."""
        # A CPU scalar mixes with tensors on any device without a sync. ZeRO-3's groups are empty between steps, so the
        # parameters' device is not known here.
        self.nonfinite = torch.zeros(())
        self._losses: Tensor | None = None

    @torch.no_grad()
    def require_finite(self, loss: Tensor) -> None:
        """Skip the updates until `forget_nonfinite` if `loss`, a 0-dim tensor, is NaN or infinite on any rank.

        A loss can be infinite although its gradients are finite, such as the square of a large error. Nothing waits for
        the device.
        """
        zero_or_nan = loss * 0
        self._losses = zero_or_nan if self._losses is None else self._losses + zero_or_nan

    @property
    def grad_norm(self) -> Tensor | None:
        """Return the L2 norm of all gradients of the last `step`, before clipping, or None before the first step.

        It is a 0-dim float64 tensor on the gradients' device, and not finite if they or a required loss were not.
        """
        return None if self._squared_norm is None else self._squared_norm.sqrt()

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. Gradients are not changed.

        Raises ValueError for a closure, which is not supported.
        """
        if closure is not None:
            raise ValueError("AdamWEMA.step takes no closure")
        self.update({p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None})

    @torch.no_grad()
    def update(self, grads: dict[Tensor, Tensor], bf16_copies: dict[Tensor, Tensor] | None = None) -> None:
        """Update every parameter in `grads` by its gradient there, which may be bf16, instead of by its `grad`.

        bf16_copies: for each of these parameters the bf16 tensor that gets its new weights, or None. A skipped update
            leaves them as they are.
        """
        if not grads:
            return
        skip, grad_scale = self._check_gradients(list(grads.values()))
        self.nonfinite = torch.maximum(self.nonfinite, skip)
        for group in self.param_groups:
            if params := [p for p in group["params"] if p in grads]:
                copies = [bf16_copies[p] for p in params] if bf16_copies else []
                self._step_group(group, params, [grads[p] for p in params], copies, skip, grad_scale)

    def _check_gradients(self, grads: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return (skip, grad_scale), each 0-dim float32 on the gradients' device.

        skip is 1 on all ranks if any rank's gradients hold a NaN or infinity, or if a required loss is not finite.
        grad_scale is the clipping factor, or None without `max_norm`.
        """
        of_rank = squared_norm(grads, implementation=self.implementation)
        if self._losses is not None:  # a NaN then reaches all ranks with the sum below
            of_rank = of_rank + self._losses.to(of_rank.device)  # elsewhere only if the optimizer is offloaded
        total = _sum_over_ranks(of_rank)
        self._squared_norm = total if self.sharded else of_rank
        skip = (~total.isfinite()).float()
        if self.max_norm is None:
            return skip, None
        return skip, (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1).float()  # as torch's clip_grad_norm_

    def _step_group(
        self,
        group: dict,
        params: list[Tensor],
        grads: list[Tensor],
        bf16_copies: list[Tensor],
        skip: Tensor,
        grad_scale: Tensor | None,
    ) -> None:
        """Update the parameters of one group."""
        states = [self.state_of(p, group["emas"]) for p in params]
        adamw_ema_(
            params,
            grads,
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
            bf16_copies=bf16_copies,
            implementation=self.implementation,
        )

    def state_of(self, param: Tensor, emas: Iterable[str]) -> dict[str, Tensor]:
        """Return the parameter's state with the named EMAs, after creating what it lacks."""
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
        """Load a state of this class or of `torch.optim.AdamW`; an EMA it lacks starts at the next step's weights."""
        emas = [group["emas"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, decays in zip(self.param_groups, emas):
            group.setdefault("emas", decays)
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
    """Update lists of tensors in place by one step of AdamW (arXiv 1711.05101, algorithm 2), and EMAs of the weights.

    params, grads, exp_avgs, exp_avg_sqs: lists of tensors with equal shapes, all on one device. Gradients of fp32
        weights may be bf16, all of them; their values are exact in fp32, so the result is that of fp32 gradients.
    steps: 0-dim float32, the number of finished steps of each parameter, incremented here.
    averages: (decay, EMA tensors) for each EMA.
    skip: 0-dim float32; any value but 0 leaves everything unchanged.
    grad_scale: 0-dim float32, the factor on all gradients, or None.
    bf16_copies: empty, or one bfloat16 tensor for each parameter, which gets the new weights rounded to nearest even.
        They let a step write the weights of a bf16 forward pass without another pass over memory.
    implementation: see `AdamWEMA`. csrc/ serves contiguous fp32 tensors, and bf16 gradients of them.

    Raises ValueError if `implementation` is cpp and that cannot run.
    """
    # Choose the implementation: csrc/ updates a limited number of EMAs in the same pass.
    fp32 = [*params, *exp_avgs, *exp_avg_sqs, *steps, skip, *(t for _, group in averages for t in group)]
    fp32 += [] if grad_scale is None else [grad_scale]
    bf16_grads = _are_bf16(grads)
    bf16 = [*bf16_copies, *(grads if bf16_grads else [])]
    kernels = _kernels_for(fp32 if bf16_grads else [*fp32, *grads], implementation, bf16)
    first, rest = averages[:EMAS_PER_PASS], averages[EMAS_PER_PASS:]
    # Update weights and moments.
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
                bf16_grads,
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
        grads = [grad.to(param.dtype) for grad, param in zip(grads, params)]
        if grad_scale is not None:
            grads = torch._foreach_mul(grads, grad_scale)
        _adamw_reference(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, skip)
        for copy, param in zip(bf16_copies, params):
            copy.copy_(torch.where(skip.bool(), copy, param.to(copy.dtype)))
        rest = averages
    # Update the other EMAs, one more pass for each.
    for decay, tensors in rest:
        ema_reference(tensors, params, decay, skip)


def squared_norm(tensors: Sequence[Tensor], *, implementation: str | None = None) -> Tensor:
    """Return the sum of squares over all `tensors`, 0-dim float64 on their device, with the same bits in every run.

    The tensors are fp32, or all bf16 with the same result as their values in fp32. Raises ValueError if
    `implementation` is cpp and that cannot run.
    """
    bf16 = _are_bf16(tensors)
    kernels = _kernels_for([] if bf16 else tensors, implementation, tensors if bf16 else [])
    if not kernels:
        tensors = [t.float() for t in tensors] if bf16 else tensors
        return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
    filled = [t for t in tensors if t.numel()]
    with torch.cuda.device_of(tensors[0]):
        total = kernels.squared_norm(
            [t.data_ptr() for t in filled], bf16, [t.numel() for t in filled], _context(tensors[0])
        )
    return torch.as_tensor(total, dtype=torch.float64)


def describe_optimizer(device: torch.device | str, implementation: str | None = None) -> str:
    """Return 'optimizer: csrc (cpu)', or the fallback and its reason, for the start of a run."""
    device = torch.device(device)
    if _kernels_for([torch.empty(0, device=device)], implementation):
        return f"optimizer: csrc ({device.type})"
    return f"optimizer: torch ({device.type}); {describe_native(device)}"


def _are_bf16(tensors: Sequence[Tensor]) -> bool:
    """Return whether there are tensors and all are bf16."""
    return bool(tensors) and all(t.dtype == torch.bfloat16 for t in tensors)


def _kernels_for(fp32: Sequence[Tensor], implementation: str | None, bf16: Sequence[Tensor] = ()):
    """Return the compiled kernels if they are asked for and can run on these tensors of two dtypes, else None.

    FASTDIT_KERNELS is as in `_dispatch`.

    Raises ValueError for an unknown choice, and if `implementation` is cpp and that cannot run.
    """
    wish = implementation or os.environ.get("FASTDIT_KERNELS", "auto")
    if wish not in CHOICES:
        raise ValueError(f"FASTDIT_KERNELS={wish!r} is unknown; choose one of {', '.join(CHOICES)}")
    if wish not in ("auto", "cpp"):
        return None
    device = [*fp32, *bf16][0].device
    kernels, problem = load_native(device.type)
    for dtype, listed in ((torch.float32, fp32), (torch.bfloat16, bf16)):
        if any(t.dtype != dtype or t.device != device or not t.is_contiguous() for t in listed):
            problem = problem or f"it takes contiguous {dtype} tensors on one device"
    if problem and implementation == "cpp":
        raise ValueError(f"implementation='cpp' cannot run here: {problem}")
    return None if problem else kernels


def _context(tensor: Tensor) -> int:
    """Return the last argument of a compiled kernel: the threads on a CPU, the stream on a GPU."""
    return torch.cuda.current_stream().cuda_stream if tensor.is_cuda else torch.get_num_threads()


def _adamw_reference(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, skip) -> None:
    """Run torch's fused AdamW, which changes nothing where `skip` is 1."""
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


def ema_reference(averages, params, decay: float, skip: Tensor) -> None:
    """Update EMA tensors towards `params` in PyTorch, unless `skip` is 1."""
    skip = skip.to(torch.promote_types(averages[0].dtype, torch.float32))
    weight = (1.0 - decay) * (1.0 - skip)
    torch._foreach_lerp_(averages, params, [weight] * len(averages))


def _sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of `value` (0-dim) over all ranks, on its device."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    # An offloaded optimizer has CPU tensors, which NCCL cannot take.
    total = value.cuda() if dist.get_backend() == "nccl" else value.clone()
    dist.all_reduce(total)
    return total.to(value.device)
