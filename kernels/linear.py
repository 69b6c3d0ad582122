"""Linear layers that keep, for the backward pass, what their cheap input is made of instead of the input.

    modulated_linear    r = x + gate * y;  out = linear(LN(r) * (1 + scale) + shift)    keeps x or r, and y
    gelu_linear         out = linear(gelu(u))                                           keeps u

The input is a pointwise matter (and two numbers a row) of tensors that are kept anyway. The backward pass has to read
them for the gradients; writing the input out once more, for the weight's gradient, is all that it costs. So of a
transformer block the residual stream, q, k and v, the attention's and the branches' outputs and the MLP's hidden
layer before the GELU are kept, and nothing else. The products are PyTorch's.

Reference implementations keep the input. The GELU has no other on CPUs: one in C++ was no faster than PyTorch's.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import choose
from ._operator import operator
from .adaln import EPS, adaln, adaln_gradients, check, choose_adaln, gate_residual_modulate_reference


def modulated_linear(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = EPS,
    *,
    norm: str = "layer",
    rows: Tensor | None = None,
    keep_x: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(r, linear(LN(r) * (1 + scale) + shift)) with r = x + gate * y, or r = x where y and gate are None.

    Args:
        x, y, gate, scale, shift, eps, norm, rows, implementation: as in `gate_residual_modulate`.
        weight, bias: (O, D) and (O,); the norm's result is cast to their dtype, or under autocast to autocast's.
        keep_x: keep x for the backward pass, which then forms r again at no cost, instead of r. Either is free where
            something else keeps that tensor too, as the layer before does if x is its r and it keeps that.

    Returns r (B, N or M, D) in x's dtype, and (B, N or M, O) in the weight's. Raises ValueError for what breaks this
    contract.
    """
    check(x, y, gate, scale, shift, rows, norm)
    weight, bias = _prepare(x, weight, bias)
    chosen = choose_adaln(x, y, gate, scale, shift, rows, implementation)
    if chosen == "reference":
        r, h = gate_residual_modulate_reference(x, y, gate, scale, shift, eps, norm=norm, rows=rows)
        return r, F.linear(h.to(weight.dtype), weight, bias)
    return _ModulatedLinear.apply(x, y, gate, scale, shift, rows, weight, bias, eps, norm == "rms", keep_x, chosen)


def gelu_linear(u: Tensor, weight: Tensor, bias: Tensor | None = None, *, implementation: str | None = None) -> Tensor:
    """linear(gelu(u)), the GELU with tanh.

    u (..., D); weight (O, D) and bias (O,), whose dtype (under autocast: autocast's) gelu(u) is cast to. Returns
    (..., O). Raises ValueError for other shapes.
    """
    weight, bias = _prepare(u, weight, bias)
    takes = u.dtype in (torch.float32, torch.bfloat16, torch.float16) and u.numel() > 0
    if choose(u.device, implementation=implementation, triton=takes) == "reference":
        return F.linear(F.gelu(u, approximate="tanh").to(weight.dtype), weight, bias)
    return _GeluLinear.apply(u, weight, bias)


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, scale, shift, rows, weight, bias, eps, rms, keep_x, implementation):
        new_r = y is not None or rows is not None
        r, h, stats = adaln(x, y, gate, scale, shift, rows, eps, rms, new_r, implementation)
        from_x = keep_x or not new_r
        ctx.options, ctx.implementation = (x.shape[1], rms, from_x), implementation
        ctx.save_for_backward(x if from_x else r, y, gate, scale, shift, rows, stats, weight)
        ctx.set_materialize_grads(False)
        return r if new_r else x, F.linear(h.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, dr, dout):
        *saved, weight = ctx.saved_tensors
        need_weight, need_bias = ctx.needs_input_grad[6:8]
        dh = None if dout is None else (dout @ weight).to(saved[0].dtype)
        again = need_weight and dout is not None
        *gradients, h = adaln_gradients(dr, dh, *saved, *ctx.options, again, ctx.implementation)
        return *gradients, None, *_linear_gradients(dout, h, need_weight, need_bias), None, None, None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, bias):
        ctx.save_for_backward(u, weight)
        return F.linear(gelu(u).to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, dout):
        u, weight = ctx.saved_tensors
        _, need_weight, need_bias = ctx.needs_input_grad
        du, g = gelu_backward((dout @ weight).to(u.dtype), u)
        return du, *_linear_gradients(dout, g, need_weight, need_bias)


def _linear_gradients(dout, inputs, need_weight, need_bias):
    if dout is None:
        return None, None
    dout = dout.flatten(0, -2)
    weight = dout.t() @ inputs.flatten(0, -2).to(dout.dtype) if need_weight else None
    return weight, dout.sum(0) if need_bias else None


# u * sigmoid(2 z) = u / 2 * (1 + tanh z), z = sqrt(2 / pi) * (u + 0.044715 u^3)


@triton.jit
def _sigmoid(u):
    return 1 / (1 + tl.exp(-1.5957691216057308 * (u + 0.044715 * u * u * u)))


@triton.jit
def _gelu_kernel(u, g, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(u + at, mask=at < size).to(tl.float32)
    tl.store(g + at, value * _sigmoid(value), mask=at < size)


@triton.jit
def _gelu_backward_kernel(dg, u, du, g, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(u + at, mask=at < size).to(tl.float32)
    grad = tl.load(dg + at, mask=at < size).to(tl.float32)
    sigmoid = _sigmoid(value)
    slope = 1.5957691216057308 * (1 + 3 * 0.044715 * value * value)
    tl.store(g + at, value * sigmoid, mask=at < size)
    tl.store(du + at, grad * sigmoid * (1 + value * (1 - sigmoid) * slope), mask=at < size)


_BLOCK = 1024  # 4 warps: 8 values, 16 bytes of bf16, a thread


@operator("fastdit::gelu")
def gelu(u: Tensor) -> Tensor:
    """gelu(u), contiguous."""
    u = u.contiguous()
    g = torch.empty_like(u)
    _gelu_kernel[(triton.cdiv(u.numel(), _BLOCK),)](u, g, u.numel(), BLOCK=_BLOCK)
    return g


@operator("fastdit::gelu_backward")
def gelu_backward(dg: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(du, gelu(u)), in one pass."""
    dg, u = dg.contiguous(), u.contiguous()
    du, g = torch.empty_like(u), torch.empty_like(u)
    _gelu_backward_kernel[(triton.cdiv(u.numel(), _BLOCK),)](dg, u, du, g, u.numel(), BLOCK=_BLOCK)
    return du, g


@gelu.register_fake
def _(u):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@gelu_backward.register_fake
def _(dg, u):
    return gelu(u), gelu(u)


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype that the product shall have."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be (O, {x.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (O,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return weight, bias
