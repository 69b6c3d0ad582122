"""Linear layers that recompute their input in the backward pass instead of saving it.

    modulated_linear    r = x + gate * y;  out = linear(LN(r) * (1 + scale) + shift)    saves x or r, and y
    gelu_linear         out = linear(gelu(u))                                           saves u
    fp8_linear          out = linear(x), with fp8 products                              saves x

The linear layer's input is a pointwise function (with two statistics a row) of tensors that are saved anyway, and
which the backward pass reads for their gradients. Recomputation therefore costs one more write of the input, which the
weight's gradient needs. A transformer block saves the residual stream, q, k and v, the outputs of attention and of the
branches, and the MLP's hidden layer before the GELU, and nothing else. The matrix products are PyTorch's. The scheme
is ours. The stream may be fp32 beside bf16 branches, vectors and weights: see `adaln.py`.

A bias's gradient is the column sums of the gradient of its layer's output. Both functions write that gradient for the
layer before them, y's or u's, so they can sum up its columns without another pass over memory. The layer before them
then takes `bias.detach()`, and the bias itself is passed on as `y_bias` or `input_bias`:

    y = F.linear(a, proj.weight, proj.bias.detach())
    r, u = modulated_linear(x, y, gate, scale, shift, fc1.weight, fc1.bias.detach(), y_bias=proj.bias)
    out = gelu_linear(u, fc2.weight, fc2.bias, input_bias=fc1.bias)

This is right only where y and u have no other use, because the gradients of other uses would not be in the sums.

With `fp8`, the products of the forward pass and of the input's gradient have fp8 operands, and the weight's gradient
does not: see `fp8.py`.

The reference implementations save the input. GELU has only the reference on CPUs: a C++ kernel was no faster.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import choose
from ._operator import operator
from .adaln import EPS, adaln, adaln_fp8, adaln_gradients, check, choose_adaln, gate_residual_modulate_reference
from .column_sums import bias_of, check_bias, column_sums
from .fp8 import (
    FP8,
    MAX_WIDTH,
    check_fp8,
    fp8_input_gradient,
    fp8_product,
    quantized,
    quantized_product,
    row_options,
)

_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def sums_biases(x: Tensor) -> bool:
    """Return whether Triton kernels serve a network whose layers get inputs like x.

    Their backward passes sum up bias gradients while they write the layers' gradients. The other implementations would
    read those gradients once more, as a linear layer itself does.
    """
    return choose(x.device, triton=x.dtype in _TRITON_TYPES and x.numel() > 0) == "triton"


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
    y_bias: Tensor | None = None,
    fp8: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (r, linear(LN(r) * (1 + scale) + shift)) with r = x + gate * y, or r = x where y and gate are None.

    Args:
        x, y, gate, scale, shift, eps, norm, rows, implementation: as in `gate_residual_modulate`.
        weight, bias: (O, D) and (O,). The modulated norm is cast to their dtype, or under autocast to autocast's.
        keep_x: save x instead of r for the backward pass, which forms r again at no cost. Either is free where another
            layer saves that tensor too, as the previous layer does if x is its r and it saves r.
        y_bias: (D,), the bias of the layer that made y, if that layer took it detached. Its value is not read, but it
            gets its gradient here. y must have no other use.
        fp8: use fp8 products, as `fp8.py` describes. The weight must be bf16, and D and O multiples of 16.

    Returns r (B, N or M, D) in x's dtype, and (B, N or M, O) in the weight's. Raises ValueError for other shapes,
    dtypes and devices, for a y_bias without y, and for an `implementation` that cannot run here.
    """
    check(x, y, gate, scale, shift, rows, norm)
    check_bias("y_bias", y_bias, x)
    if y is None and y_bias is not None:
        raise ValueError("y_bias is the bias of the layer that made y; give y too")
    weight, bias = _prepare(x, weight, bias, fp8)
    chosen = choose_adaln(x, y, gate, scale, shift, rows, implementation)
    if chosen == "reference":
        y = bias_of(y, y_bias)
        r, h = gate_residual_modulate_reference(x, y, gate, scale, shift, eps, norm=norm, rows=rows)
        return r, _linear(h.to(weight.dtype), weight, bias, fp8)
    options = eps, norm == "rms", keep_x, chosen, fp8
    return _ModulatedLinear.apply(x, y, gate, scale, shift, rows, weight, bias, y_bias, *options)


def gelu_linear(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    fp8: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Return linear(gelu(u)) with the tanh approximation of GELU (arXiv 1606.08415, section 2).

    u: (..., D) of any floating dtype.
    weight, bias: (O, D) and (O,) or None. gelu(u) is cast to their dtype, or under autocast to autocast's.
    input_bias: (D,), the bias of the layer that made u, if that layer took it detached. Its value is not read, but it
        gets its gradient here. u must have no other use.
    fp8: as in `modulated_linear`.
    implementation: see `fastdit.kernels._dispatch`. There is a Triton kernel for fp32, bf16 and fp16.

    Returns (..., O) in the weight's dtype. Raises ValueError for other shapes, and for an `implementation` that cannot
    run here.
    """
    weight, bias = _prepare(u, weight, bias, fp8)
    check_bias("input_bias", input_bias, u)
    takes = u.dtype in _TRITON_TYPES and u.numel() > 0
    if choose(u.device, implementation=implementation, triton=takes) == "reference":
        u = bias_of(u, input_bias)
        return _linear(F.gelu(u, approximate="tanh").to(weight.dtype), weight, bias, fp8)
    return _GeluLinear.apply(u, weight, bias, input_bias, fp8)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return linear(x) from fp8 products, as `fp8.py` describes.

    x: (..., D). It is cast to the weight's dtype, or under autocast to autocast's.
    weight, bias: (O, D) and (O,) or None, bf16. D and O are multiples of 16.

    Returns (..., O) in bf16. Raises ValueError for other shapes and dtypes.
    """
    weight, bias = _prepare(x, weight, bias, True)
    return _Fp8Linear.apply(x.to(weight.dtype), weight, bias)


class _ModulatedLinear(torch.autograd.Function):
    """Differentiate `modulated_linear`; the adaLN backward pass recomputes the input h for the weight's gradient."""

    @staticmethod
    def forward(ctx, x, y, gate, scale, shift, rows, weight, bias, y_bias, eps, rms, keep_x, implementation, fp8):
        new_r = y is not None or rows is not None
        if fp8 and implementation == "triton":
            r, *h, stats = adaln_fp8(x, y, gate, scale, shift, rows, eps, rms, new_r)
            out = quantized_product(*h, weight, bias)
        else:
            r, h, stats = adaln(x, y, gate, scale, shift, rows, eps, rms, new_r, implementation)
            out = _product(h.to(weight.dtype), weight, bias, fp8)
        from_x = keep_x or not new_r
        ctx.options, ctx.implementation, ctx.fp8 = (x.shape[1], rms, from_x), implementation, fp8
        ctx.save_for_backward(x if from_x else r, y, gate, scale, shift, rows, stats, y_bias, weight)
        ctx.set_materialize_grads(False)
        return r if new_r else x, out

    @staticmethod
    def backward(ctx, dr, dout):
        *saved, y_bias, weight = ctx.saved_tensors
        scale = saved[3]  # has the dtype of h
        need_weight, need_bias, need_y_bias = ctx.needs_input_grad[6:9]
        saved = *saved, y_bias if need_y_bias else None
        dh = None if dout is None else _input_gradient(dout, weight, ctx.fp8).to(scale.dtype)
        need_h = need_weight and dout is not None
        *gradients, h, dy_bias = adaln_gradients(dr, dh, *saved, *ctx.options, need_h, ctx.implementation)
        return *gradients, None, *_linear_gradients(dout, h, need_weight, need_bias), dy_bias, *[None] * 5


class _GeluLinear(torch.autograd.Function):
    """Differentiate `gelu_linear`; the GELU's backward pass recomputes gelu(u) for the weight's gradient."""

    @staticmethod
    def forward(ctx, u, weight, bias, input_bias, fp8):
        ctx.save_for_backward(u, weight, input_bias)
        ctx.fp8 = fp8
        if fp8 and u.shape[-1] <= MAX_WIDTH:
            return quantized_product(*gelu_fp8(u), weight, bias)
        return _product(gelu(u).to(weight.dtype), weight, bias, fp8)

    @staticmethod
    def backward(ctx, dout):
        u, weight, input_bias = ctx.saved_tensors
        need_weight, need_bias, need_input_bias = ctx.needs_input_grad[1:4]
        dg = _input_gradient(dout, weight, ctx.fp8).to(u.dtype)
        du, g, sums = gelu_backward(dg, u, input_bias if need_input_bias else None)
        return du, *_linear_gradients(dout, g, need_weight, need_bias), sums if need_input_bias else None, None


class _Fp8Linear(torch.autograd.Function):
    """Differentiate `fp8_linear`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias, True)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = _input_gradient(dout, weight, True) if need_x else None
        return dx, *_linear_gradients(dout, x, need_weight, need_bias)


def _linear(h, weight, bias, fp8):
    """Return linear(h) with autograd's graph."""
    return _Fp8Linear.apply(h, weight, bias) if fp8 else F.linear(h, weight, bias)


def _product(h, weight, bias, fp8):
    """Return linear(h) without a graph."""
    return fp8_product(h, weight, bias) if fp8 else F.linear(h, weight, bias)


def _input_gradient(dout, weight, fp8):
    """Return the gradient of a linear layer's input."""
    return fp8_input_gradient(dout, weight) if fp8 else dout @ weight


def _linear_gradients(dout, inputs, need_weight, need_bias):
    """Return the gradients of a linear layer's weight and bias, None where they are not needed."""
    if dout is None:
        return None, None
    dout = dout.flatten(0, -2)
    weight = _weight_gradient(dout, inputs.flatten(0, -2).to(dout.dtype)) if need_weight else None
    return weight, dout.sum(0) if need_bias else None


def _weight_gradient(dout: Tensor, inputs: Tensor) -> Tensor:
    """Return dout^T @ inputs (O, D) for rows dout (M, O) and inputs (M, D).

    On GPUs the product of a layer with fewer outputs than inputs is computed transposed. cuBLAS takes 1.07 ms for
    (1152, 65536) @ (65536, 4608) on an H200, and 0.88 ms for (4608, 65536) @ (65536, 1152).
    """
    if dout.is_cuda and dout.shape[1] < inputs.shape[1]:
        return (inputs.t() @ dout).t().contiguous()
    return dout.t() @ inputs


# The kernels use u * sigmoid(2 z), which equals u / 2 * (1 + tanh z), with z = sqrt(2 / pi) * (u + 0.044715 u^3).


@triton.jit
def _sigmoid(u):
    """Return sigmoid(2 z) of the comment above."""
    return 1 / (1 + tl.exp(-1.5957691216057308 * (u + 0.044715 * u * u * u)))


@triton.jit
def _gelu_kernel(u, g, size, BLOCK: tl.constexpr):
    """Store g = gelu(u). A program owns BLOCK elements, reads each once and writes each once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(u + at, mask=at < size).to(tl.float32)
    tl.store(g + at, value * _sigmoid(value), mask=at < size)


@triton.jit
def _gelu_fp8_kernel(u, g, g_scale, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Store TILE rows of g = gelu(u), which a program owns, in fp8, and their scales.

    It reads each row once and holds it in registers. g is rounded to bf16 first, as the backward pass recomputes it.
    """
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    cols = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (cols < WIDTH)[None, :]
    at = row[:, None] * WIDTH + cols[None, :]
    value = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
    value, scale = quantized((value * _sigmoid(value)).to(tl.bfloat16).to(tl.float32))
    tl.store(g + at, value, mask=mask)
    tl.store(g_scale + row, scale, mask=row < rows)


@triton.jit
def _gelu_backward_kernel(
    dg, u, du, g, partials, rows, blocks,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store du and g = gelu(u) of CHUNK rows by BLOCK columns, which a program owns, TILE rows at a time.

    It reads dg and u, and writes du and g, once each. With `partials`, the column sums of du stay in registers through
    the loop, one for each place of a tile. The program adds up the tile's rows at the end, and stores the sums to its
    own place of `partials`, whose row is that of the chunk. Program ids count the blocks of columns first.
    """
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = cols < D
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for first in tl.range(0, CHUNK, TILE, num_stages=STAGES):
        row = chunk * CHUNK + first + tl.arange(0, TILE)
        at = row[:, None] * D + cols[None, :]
        mask = (row < rows)[:, None] & live[None, :]
        # Masked places have the gradient 0, which adds nothing to the sums.
        value = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dg + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(value)
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * value * value)
        grad *= sigmoid * (1 + value * (1 - sigmoid) * slope)
        tl.store(g + at, value * sigmoid, mask=mask)
        tl.store(du + at, grad, mask=mask)
        if partials is not None:
            total += grad
    if partials is not None:
        tl.store(partials + chunk * D + cols, tl.sum(total, 0), mask=live)


_BLOCK = 1024  # with 4 warps, a thread holds 8 values, which are 16 bytes of bf16


@lru_cache
def gelu_backward_options(width: int, rows: int, sums: bool) -> dict[str, int]:
    """Return the backward kernel's launch options, with or without column sums.

    A tile has 512 columns, which divide the hidden widths of all model sizes. With sums, a program goes through 64
    rows: writing and reading the sums adds 1.6 % to the bytes of bf16 gradients. Without, it owns a single tile.
    """
    block = min(triton.next_power_of_2(width), 512)
    tile = _BLOCK // block
    chunk = max(tile, min(64, triton.next_power_of_2(rows))) if sums else tile
    return {"BLOCK": block, "TILE": tile, "CHUNK": chunk, "STAGES": 1, "num_warps": 4}


@operator("fastdit::gelu")
def gelu(u: Tensor) -> Tensor:
    """Return gelu(u), contiguous."""
    u = u.contiguous()
    g = torch.empty_like(u)
    _gelu_kernel[(triton.cdiv(u.numel(), _BLOCK),)](u, g, u.numel(), BLOCK=_BLOCK)
    return g


@operator("fastdit::gelu_fp8")
def gelu_fp8(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return gelu(u) in fp8, contiguous, and the scales (..., 1) of its rows."""
    u = u.contiguous()
    g, scale = _gelu_fp8_outputs(u)
    rows, options = scale.numel(), row_options(u.shape[-1])
    _gelu_fp8_kernel[(triton.cdiv(rows, options["TILE"]),)](u, g, scale, rows, WIDTH=u.shape[-1], **options)
    return g, scale


@gelu_fp8.register_fake
def _gelu_fp8_outputs(u):
    """Allocate the results of `gelu_fp8`."""
    g = torch.empty(u.shape, dtype=FP8, device=u.device)
    return g, u.new_empty((*u.shape[:-1], 1), dtype=torch.float32)


@operator("fastdit::gelu_backward")
def gelu_backward(dg: Tensor, u: Tensor, input_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (du, gelu(u), sums) from one pass: du and gelu(u) contiguous, and the column sums of du.

    The sums (D,) are the gradient of `input_bias` and have its dtype. Without it they are empty.
    """
    dg, u = dg.contiguous(), u.contiguous()
    du, g = torch.empty_like(u), torch.empty_like(u)
    width = u.shape[-1]
    rows = u.numel() // width
    options = gelu_backward_options(width, rows, input_bias is not None)
    chunks, blocks = triton.cdiv(rows, options["CHUNK"]), triton.cdiv(width, options["BLOCK"])
    partials = None if input_bias is None else u.new_empty(chunks, width, dtype=torch.float32)
    _gelu_backward_kernel[(chunks * blocks,)](dg, u, du, g, partials, rows, blocks, D=width, **options)
    sums = u.new_empty(0) if input_bias is None else torch.empty_like(input_bias)
    if partials is not None:
        column_sums(partials, sums)
    return du, g, sums


@gelu.register_fake
def _(u):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@gelu_backward.register_fake
def _(dg, u, input_bias):
    return gelu(u), gelu(u), u.new_empty(0) if input_bias is None else torch.empty_like(input_bias)


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None, fp8: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias in the product's dtype. Raises ValueError for shapes that fit neither x nor `fp8`."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must be (O, {x.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (O,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if fp8:
        check_fp8(weight)
    return weight, bias
