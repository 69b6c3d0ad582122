"""Products of linear layers in fp8 (e4m3), with one dynamic scale for each row of an operand.

    forward           y = x W^T + b      fp8 operands: x by rows, W by rows
    input's gradient  dx = dy W          fp8 operands: dy by rows, W by columns (the rows of W^T)
    weight's gradient dW = dy^T x        bf16, as everything else

The recipe is torchao's `rowwise_with_gw_hp` (pytorch/ao, torchao/float8/config.py), with its e4m3 gradients. A scale
for each row leaves them little use for e5m2's larger exponents, and e4m3 rounds half as coarsely. Two details differ.
The weight of the input's gradient has a scale for each column here, and one for the whole tensor there. Products of the
backward pass do not use fast accumulation. Sums are fp32 and results are bf16.

A scale is the least power of two with which the row's largest magnitude is at most 448, e4m3's largest number. Dividing
by it is exact, so that a weight has the same fp8 mantissas in both passes. A row below 2^-100 becomes zeros of scale 1.
A row with an infinity or a NaN gets that as its scale. Its products are then not finite, and the step is skipped.

Hopper's fp8 products read both operands along the summed dimension. `quantize_transposed` therefore also transposes the
weight. Their inner and outer widths must be multiples of 16. The number of rows is free, because the only product that
sums over rows is the weight's gradient.

On CPUs the products are fp32 products of the same fp8 numbers. They serve tests and are slow.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import choose, interpreting
from ._operator import operator

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # e4m3's largest number
MULTIPLE = 16  # of which the widths of a product's operands must be multiples
MAX_WIDTH = 16384  # a program holds whole rows in registers
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDS = tl.constexpr(interpreting())  # Triton's interpreter halves numbers whose rounding carries into the exponent


def quantize_rows(x: Tensor, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """Return (q, scale) with x = q * scale up to rounding: q (M, K) in e4m3 and scale (M, 1) in fp32.

    x: (M, K), floating. There is a Triton kernel for fp32, bf16 and fp16 and K up to 16384.
    implementation: see `fastdit.kernels._dispatch`.

    Raises ValueError for other shapes and dtypes, and for an `implementation` that cannot run here.
    """
    _check_matrix("x", x)
    takes = x.dtype in _TYPES and x.numel() > 0 and x.shape[1] <= MAX_WIDTH
    if choose(x.device, implementation=implementation, triton=takes) == "reference":
        return quantize_rows_reference(x)
    return quantize(x)


def quantize_transposed(weight: Tensor, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """Return (q, scale) of the transposed weight, contiguous: q (K, N) in e4m3 and scale (K, 1) in fp32.

    weight: (N, K), floating. There are Triton kernels for fp32, bf16 and fp16.
    implementation: see `fastdit.kernels._dispatch`.

    Raises ValueError for other shapes and dtypes, and for an `implementation` that cannot run here.
    """
    _check_matrix("weight", weight)
    takes = weight.dtype in _TYPES and weight.numel() > 0
    if choose(weight.device, implementation=implementation, triton=takes) == "reference":
        return quantize_rows_reference(weight.t())
    return transpose_quantize(weight)


def fp8_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return linear(x) in bf16 from fp8 operands, without a graph for autograd.

    x: (..., K). weight, bias: (O, K) and (O,) or None, bf16.
    """
    q, scale = quantize_rows(x.flatten(0, -2))
    return quantized_product(q.view(x.shape), scale, weight, bias)


def quantized_product(q: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `fp8_product` of x = q * scale, of q (..., K) in fp8 and a scale for each of its rows."""
    out = scaled_product(q.flatten(0, -2), scale.view(-1, 1), *quantize_rows(weight), bias, fast=True)
    return out.unflatten(0, q.shape[:-1])


def fp8_input_gradient(dout: Tensor, weight: Tensor) -> Tensor:
    """Return dout @ weight in bf16 from fp8 operands: dout is (..., O) and weight (O, K), both bf16."""
    q, scale = quantize_rows(dout.flatten(0, -2))
    return scaled_product(q, scale, *quantize_transposed(weight), None, fast=False).unflatten(0, dout.shape[:-1])


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
    """Return (a * a_scale) @ (b * b_scale)^T + bias in bf16, of a (M, K) and b (N, K) in fp8.

    fast: let Hopper's tensor cores keep partial sums in fewer bits than fp32 has.
    """
    if a.is_cuda:
        return scaled_mm(a, a_scale, b, b_scale, bias, fast)
    out = (a.float() @ b.float().t()) * a_scale * b_scale.t()
    return (out if bias is None else out + bias.float()).bfloat16()


def scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
    """Compute `scaled_product` by PyTorch's fp8 product, which takes CPU tensors since torch 2.12 or 2.13."""
    scales = {"scale_a": a_scale, "scale_b": b_scale.t()}
    return torch._scaled_mm(a, b.t(), **scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast)


def check_fp8(weight: Tensor) -> None:
    """Raise ValueError unless a linear layer with this weight can compute in fp8."""
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"weight must be bf16 for fp8 products, got {weight.dtype}")
    if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        raise ValueError(f"weight must have multiples of {MULTIPLE} for fp8 products, got {tuple(weight.shape)}")


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `quantize_rows` in PyTorch."""
    x = x.float()
    largest = x.abs().amax(1, keepdim=True)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, and 448 = 0.875 * 2^9
    scale = torch.ldexp(torch.ones_like(largest), exponent - 9 + (mantissa > 0.875))
    scale = torch.where(largest < 2.0**-100, 1.0, scale)
    # Values next to an infinity are finite, whatever the scale is that marks their row.
    q = (x / scale).nan_to_num(0.0, 0.0, 0.0).clamp(-LARGEST, LARGEST).to(FP8)
    return q.contiguous(), torch.where(largest.isfinite(), scale, largest)


# Magnitudes are compared as integers: without its sign, a float's bits grow with its value, infinity is above all
# numbers, and NaN is above infinity.


@triton.jit
def _scale_of(bits):
    """Return a row's scale and the factor that divides by it in fp32, given the bits of the row's largest magnitude."""
    exponent = (bits + 0x1FFFFF) >> 23  # a carry raises the exponent where the mantissa is above 1.75 = 448 / 2^8
    scale = tl.where(bits < (27 << 23), 127 << 23, (exponent - 8) << 23)  # 27 stands for 2^-100, and 127 for 1
    inverse = tl.where(bits < (27 << 23), 0, (262 - exponent) << 23)
    scale = tl.where(bits < (255 << 23), scale, bits)
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def magnitudes(values):
    """Return the bits of the magnitudes of fp32 values."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _to_fp8(values):
    """Return fp32 values of at most 448 in e4m3, rounded to the nearest; a GPU has an instruction for it."""
    if _ROUNDS:
        # The sum with 1.5 * 2^(e + 20) keeps bits from 2^(e - 3) on, which are e4m3's; e is -6 for smaller numbers.
        exponent = tl.maximum(magnitudes(values) >> 23, 127 - 6)
        anchor = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
        values = (values + anchor) - anchor
    return values.to(tl.float8e4nv)


@triton.jit
def quantized(values):
    """Return rows of fp32 values (TILE, BLOCK) in e4m3, and their scales (TILE,). Masked values must be zero."""
    scale, inverse = _scale_of(tl.max(magnitudes(values), 1))
    return _to_fp8(values * inverse[:, None]), scale


@triton.jit
def _quantize_rows_kernel(x, q, scale, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Store TILE rows, which a program owns, in fp8, and their scales. Rows are read once and stay in registers."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    cols = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (cols < WIDTH)[None, :]
    at = row[:, None] * WIDTH + cols[None, :]
    small, factor = quantized(tl.load(x + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(q + at, small, mask=mask)
    tl.store(scale + row, factor, mask=row < rows)


@triton.jit
def _column_maxima_kernel(
    weight, maxima, rows, width, blocks, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Store the largest magnitude in COLS columns and CHUNK rows, which a program owns, as bits.

    It reads them ROWS at a time, once, and holds COLS maxima in registers.
    """
    chunk = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    largest = tl.zeros([COLS], tl.int32)
    for first in range(0, CHUNK, ROWS):
        row = (chunk * CHUNK + first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (cols < width)[None, :]
        values = tl.load(weight + row[:, None] * width + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(magnitudes(values), 0))
    tl.store(maxima + chunk * width + cols, largest, mask=cols < width)


@triton.jit
def _quantize_transposed_kernel(
    weight, maxima, q, scale, rows, width, chunks, blocks,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Store a tile of ROWS x COLS, which a program owns, in fp8 and transposed; the first tiles store the scales.

    It reads the tile and its columns' maxima of all chunks once, and writes the tile once.
    """
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    mask = (row < rows)[:, None] & (cols < width)[None, :]
    values = tl.load(weight + row[:, None] * width + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    known = (chunk < chunks)[:, None] & (cols < width)[None, :]
    largest = tl.load(maxima + chunk[:, None] * width + cols[None, :], mask=known, other=0)
    factor, inverse = _scale_of(tl.max(largest, 0))
    small = tl.trans(_to_fp8(values * inverse[None, :]))
    at = cols.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(q + at, small, mask=(cols < width)[:, None] & (row < rows)[None, :])
    if tl.program_id(0) < blocks:
        tl.store(scale + cols, factor, mask=cols < width)


@lru_cache
def row_options(width: int) -> dict[str, int]:
    """Return launch options of kernels whose programs hold whole rows: 8 neighboring values of each row a thread.

    Rows wider than 4096 have 16 values a thread or more, because a block has at most 16 warps here.
    """
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "TILE": max(1, min(4, 8192 // block)), "num_warps": min(max(block // 256, 1), 16)}


_TRANSPOSED = {"ROWS": 128, "COLS": 64}
_CHUNK = 256  # rows of a column's partial maximum


@operator("fastdit::quantize_rows")
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and scale of `quantize_rows`."""
    x = x.contiguous()
    q, scale = _rows_like(x)
    options = row_options(x.shape[1])
    _quantize_rows_kernel[(triton.cdiv(len(x), options["TILE"]),)](x, q, scale, len(x), WIDTH=x.shape[1], **options)
    return q, scale


@quantize.register_fake
def _rows_like(x):
    """Allocate the results of `quantize`."""
    return torch.empty(x.shape, dtype=FP8, device=x.device), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@operator("fastdit::quantize_transposed")
def transpose_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and scale of `quantize_transposed`."""
    weight = weight.contiguous()
    q, scale = _columns_like(weight)
    rows, width = weight.shape
    chunks, blocks = triton.cdiv(rows, _CHUNK), triton.cdiv(width, _TRANSPOSED["COLS"])
    tiles = triton.cdiv(rows, _TRANSPOSED["ROWS"])
    maxima = weight.new_empty(chunks, width, dtype=torch.int32)
    _column_maxima_kernel[(chunks * blocks,)](weight, maxima, rows, width, blocks, CHUNK=_CHUNK, ROWS=32, COLS=64)
    _quantize_transposed_kernel[(tiles * blocks,)](
        weight, maxima, q, scale, rows, width, chunks, blocks, CHUNKS=triton.next_power_of_2(chunks), **_TRANSPOSED
    )
    return q, scale


@transpose_quantize.register_fake
def _columns_like(weight):
    """Allocate the results of `transpose_quantize`."""
    rows, width = weight.shape
    q = torch.empty((width, rows), dtype=FP8, device=weight.device)
    return q, weight.new_empty(width, 1, dtype=torch.float32)


def _check_matrix(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is a floating matrix."""
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating matrix, got {tensor.dtype} {tuple(tensor.shape)}")
