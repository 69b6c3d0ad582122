"""Triton kernels of the adaLN operations; `adaln.py` has the public functions and defines what they compute.

A forward program owns a few rows of one sample. A backward program owns a chunk of a sample's rows and keeps the
chunk's sums for gate, scale and shift in registers; a second kernel adds up the chunks in order, without atomics. The
bias of the layer that made y takes a fourth sum, which a third kernel adds up over the samples.

Kernels take matrices as tuples (tensor, stride of a sample, stride of a token) with inner stride 1. A vector per sample
has None as its token stride. An absent matrix is three Nones, because Triton 3.6 cannot compare a tuple with None.
Program ids count the tokens of a sample first, then the samples.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sums import column_sums
from .fp8 import quantized

MAX_WIDTH = 8192  # a program holds whole rows in registers
PREFETCHED = 90 * 1024  # bytes of shared memory; a block has 99 KiB on GPUs of compute capability 8.6 and 8.9


@triton.jit
def _load(matrix, b, n, ok, live, cols):
    """Load rows n of sample b as fp32 (TILE, BLOCK), zero where masked, or a vector per sample as (1, BLOCK)."""
    start = matrix[0] + b * matrix[1]
    if matrix[2] is None:
        return tl.load(start + cols, mask=live, other=0.0).to(tl.float32)[None, :]
    else:
        at = start + n.to(tl.int64)[:, None] * matrix[2] + cols[None, :]
        return tl.load(at, mask=ok[:, None] & live[None, :], other=0.0).to(tl.float32)


@triton.jit
def _add(x, y, gate, dtype: tl.constexpr):
    """Return x + gate * y, rounded as the stream is stored, so that both passes see the same bits."""
    return tl.fma(tl.broadcast_to(gate, y.shape), y, x).to(dtype).to(tl.float32)


@triton.jit
def _adaln_forward_kernel(
    x, y, gate, scale, shift, rows, r, h, h_scale, stats, tokens, all_tokens, tiles, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Compute r, h and stats of TILE rows of one sample, which a program owns.

    It reads x and y once, the sample's vectors once, and writes r, h and two statistics a row once. The rows stay in
    registers from the load to the last store. With h_scale, h is fp8: it is rounded to bf16 first, as the backward pass
    recomputes it, and each row gets a scale.
    """
    # This program's rows, and the rows of x that they are.
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    cols = tl.arange(0, BLOCK)
    ok, live = n < tokens, cols < D
    out = b * tokens + n
    at, mask = out[:, None] * D + cols[None, :], ok[:, None] & live[None, :]
    source = n
    if rows is not None:
        source = tl.load(rows + out, mask=ok, other=0)
        ok &= (source >= 0) & (source < all_tokens)  # a wrong index must not reach other memory

    # All loads precede all stores: the compiler cannot rule out overlap, and would make a load wait for a store.
    value = _load(x, b, source, ok, live, cols)
    if y[0] is not None:
        update, open = _load(y, b, source, ok, live, cols), _load(gate, b, source, ok, live, cols)
        value = _add(value, update, open, x[0].dtype.element_ty)
    if scale[0] is not None:
        factor, offset = 1 + _load(scale, b, source, ok, live, cols), _load(shift, b, source, ok, live, cols)
    # Store the new stream, then its norm, modulated.
    if r is not None:
        tl.store(r + at, value, mask=mask)
    if scale[0] is not None:
        mean = tl.zeros([TILE], tl.float32)
        if not RMS:
            mean = tl.sum(value, 1) / D
            value = tl.where(live[None, :], value - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
        tl.store(stats + 2 * out[:, None] + tl.arange(0, 2)[None, :], tl.join(mean, rstd), mask=ok[:, None])
        value = value * rstd[:, None] * factor + offset
        if h_scale is not None:
            value, row_scale = quantized(value.to(tl.bfloat16).to(tl.float32))  # zero where masked
            tl.store(h_scale + out, row_scale, mask=ok)
        tl.store(h + at, value, mask=mask)


@triton.jit
def _adaln_backward_kernel(
    dr, dh, residual, y, gate, scale, shift, rows, stats, dx, dy, dgate, dscale, dshift, h, partials,
    tokens, all_tokens, chunks, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, RMS: tl.constexpr, FROM_X: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of CHUNK rows of one sample, which a program owns, TILE rows at a time.

    It reads dr, dh, the saved stream and y once, and writes dx, dy and, for the next GEMM's weight gradient, h once.
    The sample's vectors and the chunk's sums for dgate, dscale and dshift stay in registers through the loop; the
    program stores the sums to its own (SUMS, D) of `partials`. Vectors per token get their gradients row by row
    instead. With SUMS = 4, the sum of dy is the fourth.
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    cols = tl.arange(0, BLOCK)
    live = cols < D
    gate_sum = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    dy_sum = tl.zeros([BLOCK], tl.float32)
    # Load the vectors that all rows of the sample share.
    if y[0] is not None and gate[2] is None:
        open = _load(gate, b, cols, live, live, cols)
    if dh[0] is not None and scale[2] is None:
        factor = 1 + _load(scale, b, cols, live, live, cols)
    if h is not None and shift[2] is None and SUMS == 3:
        offset = _load(shift, b, cols, live, live, cols)
    for first in tl.range(chunk * CHUNK, chunk * CHUNK + CHUNK, TILE, num_stages=STAGES):
        n = first + tl.arange(0, TILE)
        ok = n < tokens
        row = b * tokens + n
        source = n
        if rows is not None:
            source = tl.load(rows + row, mask=ok, other=0)
            ok &= (source >= 0) & (source < all_tokens)
        mask = ok[:, None] & live[None, :]
        at = (b * all_tokens + source)[:, None] * D + cols[None, :]

        # All loads precede all stores, as in the forward kernel.
        grad = tl.zeros([TILE, BLOCK], tl.float32)
        if dr[0] is not None:
            grad = _load(dr, b, n, ok, live, cols)
        if y[0] is not None:
            update = _load(y, b, source, ok, live, cols)
            if gate[2] is not None:
                open = _load(gate, b, source, ok, live, cols)
        if dh[0] is not None:
            value = _load(residual, b, source if FROM_X else n, ok, live, cols)
            mean = tl.load(stats + 2 * row, mask=ok, other=0.0)
            rstd = tl.load(stats + 2 * row + 1, mask=ok, other=0.0)
            dnormed = _load(dh, b, n, ok, live, cols)
            if scale[2] is not None:
                factor = 1 + _load(scale, b, source, ok, live, cols)
            # The fourth sum takes the registers of the shift, which is then read again (from the cache) for each tile.
            if h is not None and (shift[2] is not None or SUMS == 4):
                offset = _load(shift, b, source, ok, live, cols)

            if FROM_X and y[0] is not None:
                value = _add(value, update, open, residual[0].dtype.element_ty)
            # Recompute the normalized rows; they are not zero where masked, but dnormed is.
            normed = (value - mean[:, None]) * rstd[:, None]
            if h is not None:
                tl.store(h + row[:, None] * D + cols[None, :], normed * factor + offset, mask=mask)
            if scale[2] is None:
                scale_sum += tl.sum(dnormed * normed, 0)
            else:
                tl.store(dscale + at, dnormed * normed, mask=mask)
            if shift[2] is None:
                shift_sum += tl.sum(dnormed, 0)
            else:
                tl.store(dshift + at, dnormed, mask=mask)
            # Differentiate the norm.
            dnormed *= factor
            if RMS:
                along = tl.sum(dnormed * normed, 1) / D
                dnormed -= normed * along[:, None]
            else:
                along, mean = tl.split(tl.sum(tl.join(dnormed * normed, dnormed), 1) / D)
                dnormed -= normed * along[:, None] + mean[:, None]
            grad += dnormed * rstd[:, None]
        # Differentiate the gated sum.
        if dx is not None:
            tl.store(dx + at, grad, mask=mask)
        if y[0] is not None:
            tl.store(dy + at, grad * open, mask=mask)
            if SUMS == 4:
                dy_sum += tl.sum(grad * open, 0)
            if gate[2] is None:
                gate_sum += tl.sum(grad * update, 0)
            else:
                tl.store(dgate + at, grad * update, mask=mask)
    at = partials + (b * chunks + chunk) * SUMS * D + cols
    tl.store(at, gate_sum, mask=live)
    tl.store(at + D, scale_sum, mask=live)
    tl.store(at + 2 * D, shift_sum, mask=live)
    if SUMS == 4:
        tl.store(at + 3 * D, dy_sum, mask=live)


@triton.jit
def _adaln_sum_kernel(
    partials, dgate, dscale, dshift, dy_sums, chunks, blocks,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Add up the chunks' partial sums of one sample: a program owns BLOCK columns and loops over the chunks in order.

    It reads its columns of `partials` once, holds up to four sums in registers, and writes dgate, dscale, dshift and
    the sample's sum of dy once.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = cols < D
    gate_sum = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    dy_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, ROWS):  # ROWS chunks at once share one wait for memory
        chunk = first + tl.arange(0, ROWS)
        at = partials + ((b * chunks + chunk) * SUMS * D)[:, None] + cols[None, :]
        mask = (chunk < chunks)[:, None] & live[None, :]
        if dgate is not None:
            gate_sum += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        if dscale is not None:
            scale_sum += tl.sum(tl.load(at + D, mask=mask, other=0.0), 0)
        if dshift is not None:
            shift_sum += tl.sum(tl.load(at + 2 * D, mask=mask, other=0.0), 0)
        if SUMS == 4:
            dy_sum += tl.sum(tl.load(at + 3 * D, mask=mask, other=0.0), 0)
    if dgate is not None:
        tl.store(dgate + b * D + cols, gate_sum, mask=live)
    if dscale is not None:
        tl.store(dscale + b * D + cols, scale_sum, mask=live)
    if dshift is not None:
        tl.store(dshift + b * D + cols, shift_sum, mask=live)
    if SUMS == 4:
        tl.store(dy_sums + b * D + cols, dy_sum, mask=live)


# Launch options. `benchmarks/rates.py --sweep` times others. They change no result except for the order of sums.


@lru_cache
def forward_options(width: int, fp8: bool = False) -> dict[str, int]:
    """Return the forward kernel's launch options, with or without fp8 output.

    A thread holds 16 values of a row. On an H200 a tile of 2 rows reaches 87, 93 and 90 % of a copy's rate at the
    widths of S, B and XL. With 8 values a thread and 4 rows the kernel is slower at the width of XL (79 %). With fp8
    output, which is not measured yet, a thread holds 8 values.
    """
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "TILE": 2 if block <= 4096 else 1, "num_warps": _warps(block, values=8 if fp8 else 16)}


@lru_cache
def backward_options(width: int, tokens: int, itemsizes: int = 8) -> dict[str, int]:
    """Return the backward kernel's launch options: a program sums over 1/8 of a sample's tokens, from 8 to 64.

    A thread holds 8 values of a row, which are 16 bytes of bf16. With 128 registers a thread, 16 warps fit on a
    multiprocessor, and 3 stages prefetch two rows into shared memory, unless they need more than every GPU has. On an
    H200 this makes the kernel 1.1 to 1.2 times as fast as tiles of 2 rows without prefetch, and is the fastest of 18
    choices for S, B and XL.

    itemsizes: bytes that a program loads for each place of a row, of all matrices.
    """
    block, chunk = triton.next_power_of_2(width), min(max(triton.next_power_of_2(tokens) // 8, 8), 64)
    stages = 3 if 2 * block * itemsizes <= PREFETCHED else 1
    options = {"BLOCK": block, "TILE": 1, "num_warps": _warps(block, values=8)}
    return options | {"CHUNK": chunk, "STAGES": stages, "maxnreg": 128}


def _warps(block: int, values: int) -> int:
    """Return the number of warps whose threads hold `values` neighboring values each, at most 16.

    A column of a tile thus lies within one thread, and warps exchange only the statistics of rows.
    """
    return min(max(block // (32 * values), 1), 16)


def _matrix(tensor: Tensor | None) -> tuple[Tensor | None, int | None, int | None]:
    """Return the tuple that the kernels take for a matrix, a vector per sample, or None."""
    if tensor is None:
        return None, None, None
    return tensor, tensor.stride(0), tensor.stride(1) if tensor.dim() == 3 else None


def forward(x, y, gate, scale, shift, rows, eps, rms, r, h, stats, options=None, h_scale=None) -> None:
    """Launch the forward kernel, which fills r, h and stats; each may be None. With h_scale, h is fp8."""
    batch, tokens, width = (r if h is None else h).shape
    options = options or forward_options(width, fp8=h_scale is not None)
    tiles = -(-tokens // options["TILE"])
    matrices = map(_matrix, (x, y, gate, scale, shift))
    _adaln_forward_kernel[(batch * tiles,)](
        *matrices, rows, r, h, h_scale, stats, tokens, x.shape[1], tiles, eps, D=width, RMS=rms, **options
    )


def backward(
    dr, dh, residual, y, gate, scale, shift, rows, stats, rms, from_x, dx, dy, dgate, dscale, dshift, h, dy_bias,
    options=None,
) -> None:  # fmt: skip
    """Launch the backward kernel and the kernels that add up its partial sums. Absent results are None."""
    upstream = dr if dh is None else dh
    batch, tokens, width = upstream.shape
    all_tokens = tokens if dx is None else dx.shape[1]
    count = 3 if dy_bias is None else 4
    # With four sums, the kernel loads a sample's shift anew for each row.
    by_row = [dr, dh, residual, y, *(v for v in (gate, scale, shift) if v is not None and v.dim() == 3)]
    loaded = [x for x in (*by_row, shift if count == 4 else None) if x is not None]
    options = options or backward_options(width, tokens, sum(x.element_size() for x in loaded))
    chunks = -(-tokens // options["CHUNK"])
    partials = upstream.new_empty(batch, chunks, count, width, dtype=torch.float32)
    matrices = map(_matrix, (dr, dh, residual, y, gate, scale, shift))
    _adaln_backward_kernel[(batch * chunks,)](
        *matrices, rows, stats, dx, dy, dgate, dscale, dshift, h, partials, tokens, all_tokens, chunks,
        D=width, RMS=rms, FROM_X=from_x, SUMS=count, **options,
    )  # fmt: skip
    # Only vectors per sample have sums over tokens.
    sums = [grad if grad is not None and grad.dim() == 2 else None for grad in (dgate, dscale, dshift)]
    dy_sums = None if dy_bias is None else upstream.new_empty(batch, width, dtype=torch.float32)
    blocks = -(-width // 128)
    _adaln_sum_kernel[(batch * blocks,)](
        partials, *sums, dy_sums, chunks, blocks, D=width, BLOCK=128, ROWS=16, SUMS=count, num_warps=1
    )
    if dy_bias is not None:
        column_sums(dy_sums, dy_bias)
