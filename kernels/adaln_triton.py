"""Triton kernels of the adaLN operations; `adaln.py` has the public functions and defines what they compute.

A forward program owns a few rows of one sample. A backward program owns a chunk of a sample's rows and keeps the
chunk's sums for gate, scale and shift in registers; a second kernel adds up the chunks in order, without atomics.

Kernels take matrices as tuples (tensor, stride of a sample, stride of a token) with inner stride 1. A vector per sample
has None as its token stride. An absent matrix is three Nones, because Triton 3.6 cannot compare a tuple with None.
Program ids count the tokens of a sample first, then the samples.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import quantized

MAX_WIDTH = 8192  # a program holds whole rows in registers


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
    STAGES: tl.constexpr, RMS: tl.constexpr, FROM_X: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of CHUNK rows of one sample, which a program owns, TILE rows at a time.

    It reads dr, dh, the saved stream and y once, and writes dx, dy and, for the next GEMM's weight gradient, h once.
    The sample's vectors and the chunk's sums for dgate, dscale and dshift stay in registers through the loop; the
    program stores the sums to its own (3, D) of `partials`. Vectors per token get their gradients row by row instead.
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    cols = tl.arange(0, BLOCK)
    live = cols < D
    gate_sum = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    # Load the vectors that all rows of the sample share.
    if y[0] is not None and gate[2] is None:
        open = _load(gate, b, cols, live, live, cols)
    if dh[0] is not None and scale[2] is None:
        factor = 1 + _load(scale, b, cols, live, live, cols)
    if h is not None and shift[2] is None:
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
            if h is not None and shift[2] is not None:
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
            if gate[2] is None:
                gate_sum += tl.sum(grad * update, 0)
            else:
                tl.store(dgate + at, grad * update, mask=mask)
    at = partials + (b * chunks + chunk) * 3 * D + cols
    tl.store(at, gate_sum, mask=live)
    tl.store(at + D, scale_sum, mask=live)
    tl.store(at + 2 * D, shift_sum, mask=live)


@triton.jit
def _adaln_sum_kernel(
    partials, dgate, dscale, dshift, chunks, blocks, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Add up the chunks' partial sums of one sample: a program owns BLOCK columns and loops over the chunks in order.

    It reads its columns of `partials` once, holds three sums in registers, and writes dgate, dscale and dshift once.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = cols < D
    gate_sum = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, ROWS):  # ROWS chunks at once share one wait for memory
        chunk = first + tl.arange(0, ROWS)
        at = partials + ((b * chunks + chunk) * 3 * D)[:, None] + cols[None, :]
        mask = (chunk < chunks)[:, None] & live[None, :]
        if dgate is not None:
            gate_sum += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        if dscale is not None:
            scale_sum += tl.sum(tl.load(at + D, mask=mask, other=0.0), 0)
        if dshift is not None:
            shift_sum += tl.sum(tl.load(at + 2 * D, mask=mask, other=0.0), 0)
    if dgate is not None:
        tl.store(dgate + b * D + cols, gate_sum, mask=live)
    if dscale is not None:
        tl.store(dscale + b * D + cols, scale_sum, mask=live)
    if dshift is not None:
        tl.store(dshift + b * D + cols, shift_sum, mask=live)


# Launch options. benchmarks/tune_adaln.py times others. They change no result except for the order of sums.


@lru_cache
def forward_options(width: int, fp8: bool = False) -> dict[str, int]:
    """Return the forward kernel's launch options. With fp8, 2 rows take 64 registers a thread, and 4 rows take 97."""
    return _blocks(width, rows=2 if fp8 else 4)


@lru_cache
def backward_options(width: int, tokens: int) -> dict[str, int]:
    """Return the backward kernel's launch options: a program sums over 1/16 of a sample's tokens, from 8 to 64.

    With 128 registers a thread, 16 warps fit on a multiprocessor. STAGES above 1 prefetch rows into shared memory.
    """
    chunk = min(max(triton.next_power_of_2(tokens) // 16, 8), 64)
    return _blocks(width, rows=2) | {"CHUNK": chunk, "STAGES": 1, "maxnreg": 128}


def _blocks(width: int, rows: int) -> dict[str, int]:
    """Return block sizes for tiles of `rows` rows, fewer where rows are wider than 2048.

    A thread of the 1 to 16 warps holds 8 neighboring values of each row, which are 16 bytes of bf16. A column of a tile
    thus lies within one thread, and warps exchange only the statistics of rows.
    """
    block = triton.next_power_of_2(width)
    tile = max(1, min(rows, rows * 2048 // block))
    return {"BLOCK": block, "TILE": tile, "num_warps": min(max(block // 256, 1), 16)}


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
    dr, dh, residual, y, gate, scale, shift, rows, stats, rms, from_x, dx, dy, dgate, dscale, dshift, h, options=None
) -> None:
    """Launch the backward kernel and the kernel that adds up its partial sums. Absent results are None."""
    upstream = dr if dh is None else dh
    batch, tokens, width = upstream.shape
    all_tokens = tokens if dx is None else dx.shape[1]
    options = options or backward_options(width, tokens)
    chunks = -(-tokens // options["CHUNK"])
    partials = upstream.new_empty(batch, chunks, 3, width, dtype=torch.float32)
    matrices = map(_matrix, (dr, dh, residual, y, gate, scale, shift))
    _adaln_backward_kernel[(batch * chunks,)](
        *matrices, rows, stats, dx, dy, dgate, dscale, dshift, h, partials, tokens, all_tokens, chunks,
        D=width, RMS=rms, FROM_X=from_x, **options,
    )  # fmt: skip
    # Only vectors per sample have sums over tokens.
    sums = [grad if grad is not None and grad.dim() == 2 else None for grad in (dgate, dscale, dshift)]
    blocks = -(-width // 128)
    _adaln_sum_kernel[(batch * blocks,)](partials, *sums, chunks, blocks, D=width, BLOCK=128, ROWS=16, num_warps=1)
