"""Compute the weighted denoising loss and the x0 prediction from the network's output, in one pass over memory.

One formula serves every noise process whose target and prediction are linear in (x0, eps, output), with coefficients
for each sample:

    loss_b  = weight_b * mean (out - target_b)^2,   target = target_x0 * x0 + target_eps * eps
    x0_hat  = clean_x0 * x0 + clean_eps * eps + clean_out * out

x_t itself is not read: with x_t = alpha x0 + sigma eps, a prediction a x_t + b out has clean_x0 = a alpha and
clean_eps = a sigma. The arithmetic is fp32 for outputs of any precision. The operation is ours; EDM's coefficients
follow from table 1 of Karras et al. 2022 (arXiv 2206.00364), those of flow matching from arXiv 2209.03003.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import choose
from ._operator import operator

_BLOCK = 2048  # elements of a sample that one program owns


class DenoiseCoefficients(NamedTuple):
    """Hold the coefficients of the module's docstring, each (B,) and floating.

    For EDM at the network's raw output F, with s = sigma_data and r = 1 / sqrt(sigma^2 + s^2), they are, in order:
        sigma r / s,  -s r,  s^2 r^2,  s^2 r^2 sigma,  sigma s r,  1
    For flow matching with velocity prediction: -1,  1,  1 - t,  t,  -t,  1
    """

    target_x0: Tensor
    target_eps: Tensor
    clean_x0: Tensor
    clean_eps: Tensor
    clean_out: Tensor
    weight: Tensor


def affine_denoise_loss(
    out: Tensor, x0: Tensor, eps: Tensor, coefficients: DenoiseCoefficients, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return (loss, x0_hat) of the module's docstring, with a gradient for `out` only.

    out, x0, eps: (B, ...) of one shape and any floating dtypes and strides.
    coefficients: six floating (B,).
    implementation: see `fastdit.kernels._dispatch`. There is a Triton kernel for fp32 arithmetic.

    loss is (B,) and x0_hat has out's shape. Both are fp32, or fp64 if a coefficient is.
    Raises ValueError for other shapes, where x0, eps or a coefficient requires a gradient, and for an
    `implementation` that cannot run here.
    """
    _check(out, x0, eps, coefficients)
    work = torch.float64 if any(x.dtype == torch.float64 for x in coefficients) else torch.float32
    table = torch.stack([x.to(work) for x in coefficients])
    if choose(out.device, implementation=implementation, triton=work == torch.float32) == "reference":
        return affine_denoise_loss_reference(out, x0, eps, table)
    return _denoise(out, x0, eps, table)


def affine_denoise_loss_reference(out: Tensor, x0: Tensor, eps: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `affine_denoise_loss` in PyTorch.

    `table` (6, B) holds the coefficients, in the dtype of the arithmetic.
    """
    target_x0, target_eps, clean_x0, clean_eps, clean_out, _ = table.view(*table.shape, *[1] * (out.dim() - 1))
    out, x0, eps = (x.to(table.dtype) for x in (out, x0, eps))
    error = out - (target_x0 * x0 + target_eps * eps)
    loss = table[5] * error.square().flatten(1).mean(1)
    return loss, clean_x0 * x0 + clean_eps * eps + clean_out * out


@operator("fastdit::denoise")
def _denoise(out: Tensor, x0: Tensor, eps: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss, x0_hat); the blocks' shares of a sample's loss are added up in a fixed order."""
    batch, size = len(out), out.numel() // len(out)
    out, x0, eps = (x.contiguous() for x in (out, x0, eps))
    clean = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    parts = triton.cdiv(size, _BLOCK)
    partial = table.new_empty(batch, parts)
    _denoise_forward_kernel[(parts, batch)](
        out, x0, eps, table, clean, partial, size, 1 / size, BLOCK=_BLOCK, num_warps=4
    )
    return partial.sum(1), clean


@operator("fastdit::denoise_backward")
def _denoise_backward(
    d_loss: Tensor | None, d_clean: Tensor | None, out: Tensor, x0: Tensor, eps: Tensor, table: Tensor
) -> Tensor:
    """Return the gradient of out; d_loss or d_clean is None where that result is not used."""
    batch, size = len(out), out.numel() // len(out)
    out, x0, eps = (x.contiguous() for x in (out, x0, eps))
    d_out = torch.empty_like(out)
    _denoise_backward_kernel[(triton.cdiv(size, _BLOCK), batch)](
        out if d_loss is None else d_loss.contiguous(), out if d_clean is None else d_clean.contiguous(),
        out, x0, eps, table, d_out, size, 2 / size,
        LOSS=d_loss is not None, CLEAN=d_clean is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return d_out


@triton.jit
def _denoise_forward_kernel(out, x0, eps, table, clean, partial, size, per_size, BLOCK: tl.constexpr):
    """Process a block of one sample: a program owns it, reads out, x0 and eps once and writes x0_hat once.

    The sample's six coefficients and the block's squared error stay in registers. A program stores one number of
    `partial`, its share of the loss, so no two programs write to one place.
    """
    sample, batch = tl.program_id(1), tl.num_programs(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    base = sample.to(tl.int64) * size
    o = tl.load(out + base + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x0 + base + at, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(eps + base + at, mask=inside, other=0.0).to(tl.float32)
    table += sample
    error = o - (tl.load(table) * x + tl.load(table + batch) * e)
    estimate = tl.load(table + 2 * batch) * x + tl.load(table + 3 * batch) * e + tl.load(table + 4 * batch) * o
    tl.store(clean + base + at, estimate, mask=inside)
    loss = tl.load(table + 5 * batch) * per_size * tl.sum(error * error)
    tl.store(partial + sample * tl.num_programs(0) + tl.program_id(0), loss)


@triton.jit
def _denoise_backward_kernel(
    d_loss, d_clean, out, x0, eps, table, d_out, size, two_per_size,
    LOSS: tl.constexpr, CLEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block of one sample's d_out: a program owns it and forms the error again in registers.

    With LOSS it reads out, x0 and eps, with CLEAN it reads d_clean; it writes d_out once.
    """
    sample, batch = tl.program_id(1), tl.num_programs(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    base = sample.to(tl.int64) * size
    table += sample
    gradient = tl.zeros((BLOCK,), tl.float32)
    if LOSS:
        o = tl.load(out + base + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x0 + base + at, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(eps + base + at, mask=inside, other=0.0).to(tl.float32)
        error = o - (tl.load(table) * x + tl.load(table + batch) * e)
        gradient += tl.load(d_loss + sample) * tl.load(table + 5 * batch) * two_per_size * error
    if CLEAN:
        gradient += tl.load(table + 4 * batch) * tl.load(d_clean + base + at, mask=inside, other=0.0)
    tl.store(d_out + base + at, gradient.to(d_out.dtype.element_ty), mask=inside)


@_denoise.register_fake
def _(out, x0, eps, table):
    return table.new_empty(len(out)), torch.empty(out.shape, dtype=torch.float32, device=out.device)


@_denoise_backward.register_fake
def _(d_loss, d_clean, out, x0, eps, table):
    return torch.empty(out.shape, dtype=out.dtype, device=out.device)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_loss, d_clean):
    return _denoise_backward(d_loss, d_clean, *ctx.saved_tensors), None, None, None


_denoise.register_autograd(_backward, setup_context=_save)


def _check(out: Tensor, x0: Tensor, eps: Tensor, coefficients: DenoiseCoefficients) -> None:
    """Raise ValueError unless the arguments are those that `affine_denoise_loss` documents."""
    if out.dim() < 2 or not out.numel() or x0.shape != out.shape or eps.shape != out.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (out, x0, eps))
        raise ValueError(f"out, x0, eps must be (B, ...) of one shape, not empty, got {shapes}")
    if len(coefficients) != 6 or any(x.shape != out.shape[:1] or not x.is_floating_point() for x in coefficients):
        raise ValueError(f"coefficients must be six floating ({len(out)},)")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (x0, eps, *coefficients)):
        raise ValueError("only out gets a gradient; detach x0, eps and the coefficients")
