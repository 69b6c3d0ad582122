"""Triton kernels of `structure.py`, whose programs own tiles of pairs, and the operator with its backward pass.

The inner loops walk the reduction one feature at a time, or one sample at a time in the last kernel of the backward
pass. They load two vectors and form a tile of exact differences, all in registers. Features are padded with zeros to
whole tiles and are also stored transposed, so these loops load contiguously and without masks.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._operator import operator

TINY = 1e-30  # avoids 0 / 0 where all weights, or all distances, are zero

# Tiles for 4 warps. In sm_90 code neither inner loop uses shared memory. In a tile of pairs a thread owns one of 128
# columns, and reads 32 rows as 8 vectors for 64 operations. In a tile of features it owns 4 rows by a vector of 4.
_ROWS, _COLS, _FEATURES, _UNROLL = 32, 128, 64, 8
_PANEL = 1 << 24  # pairs whose gradient coefficients exist at once in backward, for each of f and g


def square_factor(distance: str) -> float:
    """Return the factor that turns a squared difference into the distance."""
    return 0.5 if distance == "cosine" else 1.0


def moments_of(totals: Tensor) -> Tensor:
    """Return the (5,) weighted means over pairs from the (6,) totals that `structure` returns."""
    return totals[:5] / totals[5].clamp_min(TINY)


def units(moments: Tensor, normalize: str) -> Tensor:
    """Return (2,): the divisors of the distances of f and of g."""
    if normalize == "none":
        return torch.ones_like(moments[:2])
    return moments[:2].clamp_min(TINY) if normalize == "mean" else moments[2:4].clamp_min(TINY).sqrt()


@triton.jit
def _distance_tile(xt, stride, width, rows, cols, factor, EUCLIDEAN: tl.constexpr, UNROLL: tl.constexpr):
    """Return the (rows, cols) distances of columns of xt (width, stride); both index vectors are inside its padding."""
    total = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for start in range(0, width, UNROLL):
        part = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
        for u in tl.static_range(UNROLL):
            line = xt + (start + u) * stride
            difference = tl.load(line + rows)[:, None] - tl.load(line + cols)[None, :]
            part += difference * difference
        total += part
    return tl.sqrt_rn(total) if EUCLIDEAN else total * factor


@triton.jit
def _upper_tile(ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return row and column indices of this program's tile, one of those that hold any pair row < col.

    Column block b meets the row blocks that start before its end: COLS / ROWS for each of column blocks 0..b.
    """
    ratio: tl.constexpr = COLS // ROWS
    square = tl.program_id(0) // ratio
    b = ((tl.sqrt_rn(8.0 * square.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    b = tl.where(b * (b + 1) // 2 > square, b - 1, b)  # the root may have been rounded across an integer
    b = tl.where((b + 1) * (b + 2) // 2 <= square, b + 1, b)
    a = (square - b * (b + 1) // 2) * ratio + tl.program_id(0) % ratio
    return a * ROWS + tl.arange(0, ROWS), b * COLS + tl.arange(0, COLS)


@triton.jit
def _total(tile):
    """Return the sum of a tile."""
    return tl.sum(tile)


@triton.jit
def _pair_weights(weight, rows, cols, valid):
    """Return w_i w_j, zero for pairs that are not `valid`."""
    return tl.where(valid, tl.load(weight + rows)[:, None] * tl.load(weight + cols)[None, :], 0.0)


@triton.jit
def _structure_moments_kernel(
    ft, gt, weight, partial, size, width, stride, factor,
    EUCLIDEAN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Store the tile's weighted sums of r, s, r^2, s^2 and r s, and the sum of its weights.

    A program owns one tile of pairs. It reads the features of its rows and columns once per tile; distances and weights
    stay in registers, and six numbers leave them.
    """
    rows, cols = _upper_tile(ROWS, COLS)
    valid = (rows[:, None] < cols[None, :]) & (cols[None, :] < size)
    # The tile's distances and weights, zero where there is no pair.
    r = tl.where(valid, _distance_tile(ft, stride, width, rows, cols, factor, EUCLIDEAN, UNROLL), 0.0)
    s = tl.where(valid, _distance_tile(gt, stride, width, rows, cols, factor, EUCLIDEAN, UNROLL), 0.0)
    w = _pair_weights(weight, rows, cols, valid)
    # Its sums, each in this tile's own place of `partial`.
    out, step = partial + tl.program_id(0), tl.num_programs(0)
    tl.store(out, _total(w * r))
    tl.store(out + step, _total(w * s))
    tl.store(out + 2 * step, _total(w * r * r))
    tl.store(out + 3 * step, _total(w * s * s))
    tl.store(out + 4 * step, _total(w * r * s))
    tl.store(out + 5 * step, _total(w))


@triton.jit
def _scales(units):
    """Return the factors on the distances of f and of g."""
    return 1.0 / tl.load(units), 1.0 / tl.load(units + 1)


@triton.jit
def _slope(e, delta, PENALTY: tl.constexpr):
    """Return the penalty's derivative."""
    if PENALTY == "l2":
        return 2.0 * e
    elif PENALTY == "l1":
        return tl.where(e > 0.0, 1.0, tl.where(e < 0.0, -1.0, 0.0))
    else:
        return tl.minimum(tl.maximum(e, -delta), delta)


@triton.jit
def _structure_sums_kernel(
    ft, gt, weight, units, partial, size, width, stride, factor, delta,
    EUCLIDEAN: tl.constexpr, PENALTY: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Store the tile's weighted sums of the penalty, and of its slope times P and times Q.

    A program owns one tile of pairs, whose distances it recomputes in registers; three numbers leave them.
    """
    rows, cols = _upper_tile(ROWS, COLS)
    f_scale, g_scale = _scales(units)
    valid = (rows[:, None] < cols[None, :]) & (cols[None, :] < size)
    # The tile's normalized distances and its weights, zero where there is no pair.
    p = tl.where(valid, _distance_tile(ft, stride, width, rows, cols, factor, EUCLIDEAN, UNROLL) * f_scale, 0.0)
    q = tl.where(valid, _distance_tile(gt, stride, width, rows, cols, factor, EUCLIDEAN, UNROLL) * g_scale, 0.0)
    w = _pair_weights(weight, rows, cols, valid)
    # The penalty of each pair and its slope.
    e = p - q
    if PENALTY == "l2":
        cost = e * e
    elif PENALTY == "l1":
        cost = tl.abs(e)
    else:
        cost = tl.where(tl.abs(e) <= delta, 0.5 * e * e, delta * (tl.abs(e) - 0.5 * delta))
    pull = w * _slope(e, delta, PENALTY)
    # The sums, each in this tile's own place of `partial`.
    out, step = partial + tl.program_id(0), tl.num_programs(0)
    tl.store(out, _total(w * cost))
    tl.store(out + step, _total(pull * p))
    tl.store(out + 2 * step, _total(pull * q))


@triton.jit
def _structure_coefficients_kernel(
    ft, gt, weight, units, totals, sums, upstream, f_out, g_out, size, width, stride, panel, first, factor, delta,
    EUCLIDEAN: tl.constexpr, NORMALIZE: tl.constexpr, PENALTY: tl.constexpr, TINY: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Store k_ij such that df_i = sum_j k_ij (f_i - f_j), at [j, i - first], and the same for g.

    With W the sum of the weights, dL / dP_ij = w_ij slope(P_ij - Q_ij) / W, and the unit u of f takes its part:
    dL / dr_ij = w_ij / (W u) (slope - sum_kl(w_kl slope_kl P_kl) / W d), d = P_ij for the rms and 1 for the mean.

    A program owns a tile of pairs (j, i). It recomputes both distances in registers, and writes two numbers a pair.
    """
    # The tile's distances, r of f and s of g.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # j
    local = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cols = first + local  # i
    f_scale, g_scale = _scales(units)
    r = _distance_tile(ft, stride, width, rows, cols, factor, EUCLIDEAN, UNROLL)
    s = _distance_tile(gt, stride, width, rows, cols, factor, EUCLIDEAN, UNROLL)
    valid = (rows[:, None] != cols[None, :]) & (rows[:, None] < size) & (cols[None, :] < size)
    # The slope of the loss in the normalized distances.
    all_weights = tl.maximum(tl.load(totals + 5), TINY)
    share = _pair_weights(weight, rows, cols, valid) * (tl.load(upstream) / all_weights).to(tl.float32)
    slope = _slope(r * f_scale - s * g_scale, delta, PENALTY)
    # The slope of the loss in the units, which depend on all distances.
    f_unit = 0.0
    g_unit = 0.0
    if NORMALIZE != "none":
        f_unit = (tl.load(sums + 1) / all_weights).to(tl.float32)
        g_unit = (tl.load(sums + 2) / all_weights).to(tl.float32)
    if NORMALIZE == "rms":
        f_unit = f_unit * r * f_scale
        g_unit = g_unit * s * g_scale
    # From distances to differences of features. Coincident points get zero.
    for_f = share * (slope - f_unit) * f_scale
    for_g = share * (g_unit - slope) * g_scale
    if EUCLIDEAN:
        for_f = for_f / tl.where(r > 0.0, r, 1.0)
        for_g = for_g / tl.where(s > 0.0, s, 1.0)
    else:
        for_f = for_f * (2.0 * factor)
        for_g = for_g * (2.0 * factor)
    at = rows[:, None] * panel + local[None, :]
    tl.store(f_out + at, tl.where(valid & (r > 0.0), for_f, 0.0))
    tl.store(g_out + at, tl.where(valid & (s > 0.0), for_g, 0.0))


@triton.jit
def _structure_pull_kernel(
    x, coefficients, out, stride, width, panel, first,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Store out_i = sum_j k_ij (x_i - x_j) for x (stride, width).

    A program owns a tile of rows i and features, which stays in registers with its sum. For each sample j it reads ROWS
    coefficients and FEATURES features, and it writes the tile once.
    """
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    at = (first + local)[:, None] * width + features[None, :]
    own = tl.load(x + at)
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(0, stride, UNROLL):
        part = tl.zeros((ROWS, FEATURES), tl.float32)
        for u in tl.static_range(UNROLL):
            k = tl.load(coefficients + (start + u) * panel + local)
            other = tl.load(x + (start + u) * width + features)
            part += k[:, None] * (own - other[None, :])
        total += part
    tl.store(out + at, total)


def _padded(x: Tensor) -> Tensor:
    """Pad x with zeros to whole blocks in every dimension: the kernels' inner loops then need no masks."""
    return F.pad(x, [pad for size in reversed(x.shape) for pad in (0, -size % _COLS)]).contiguous()


@operator("fastdit::structure")
def structure(
    f: Tensor, g: Tensor, weight: Tensor, distance: str, normalize: str, penalty: str, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, totals, sums) of features f, g (B, d) and weights (B,).

    totals (6,) fp64: sums over pairs i < j of w r, w s, w r^2, w s^2, w r s and w. sums (3,) fp64: of the weighted
    penalty, and of its weighted slope times P and times Q.
    """
    size, width = f.shape
    ft, gt = (_padded(x).t().contiguous() for x in (f, g))
    stride = ft.shape[1]
    blocks = stride // _COLS
    tiles = blocks * (blocks + 1) // 2 * (_COLS // _ROWS)
    shape = {"EUCLIDEAN": distance == "euclidean", "ROWS": _ROWS, "COLS": _COLS, "UNROLL": _UNROLL, "num_warps": 4}
    factor = square_factor(distance)

    # First pass: the weighted moments of the distances, summed over tiles in a fixed order.
    weight = _padded(weight)
    partial = f.new_empty(6, tiles)
    _structure_moments_kernel[(tiles,)](ft, gt, weight, partial, size, width, stride, factor, **shape)
    totals = partial.sum(1, dtype=torch.float64)

    # Second pass: the loss, and how it depends on the units.
    partial = f.new_empty(3, tiles)
    scale = units(moments_of(totals), normalize).float()
    _structure_sums_kernel[(tiles,)](
        ft, gt, weight, scale, partial, size, width, stride, factor, delta, PENALTY=penalty, **shape
    )  # fmt: skip
    sums = partial.sum(1, dtype=torch.float64)
    return (sums[0] / totals[5].clamp_min(TINY)).float(), totals, sums


@operator("fastdit::structure_backward")
def structure_backward(
    upstream: Tensor, f: Tensor, g: Tensor, weight: Tensor, totals: Tensor, sums: Tensor,
    distance: str, normalize: str, penalty: str, delta: float, need_f: bool, need_g: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (df, dg), each empty where it is not needed."""
    # Pad the inputs and allocate the gradients that are needed.
    size, width = f.shape
    whole = [_padded(x) for x in (f, g)]
    ft, gt = (x.t().contiguous() for x in whole)
    stride, padded_width = whole[0].shape
    weight, scale = _padded(weight), units(moments_of(totals), normalize).float()
    out = [torch.empty_like(x) if needed else None for x, needed in zip(whole, (need_f, need_g))]
    tile = {"ROWS": _ROWS, "COLS": _COLS, "UNROLL": _UNROLL, "num_warps": 4}
    choices = {"EUCLIDEAN": distance == "euclidean", "NORMALIZE": normalize, "PENALTY": penalty, "TINY": TINY}
    panel = min(stride, max(_COLS, _PANEL // stride // _COLS * _COLS))
    coefficients = f.new_empty(2, stride, panel)
    # Per panel of rows i: the coefficients of all pairs (i, j), then their products with the differences.
    for first in range(0, stride, panel):
        count = min(panel, stride - first)
        _structure_coefficients_kernel[(stride // _ROWS, count // _COLS)](
            ft, gt, weight, scale, totals, sums, upstream, *coefficients, size, width, stride, panel, first,
            square_factor(distance), delta, **choices, **tile,
        )  # fmt: skip
        for x, k, target in zip(whole, coefficients, out):
            if target is not None:
                _structure_pull_kernel[(count // _ROWS, padded_width // _FEATURES)](
                    x, k, target, stride, padded_width, panel, first,
                    ROWS=_ROWS, FEATURES=_FEATURES, UNROLL=_UNROLL, num_warps=4,
                )  # fmt: skip
    df, dg = (f.new_empty(0) if x is None else x[:size, :width].contiguous() for x in out)
    return df, dg


@structure.register_fake
def _(f, g, weight, distance, normalize, penalty, delta):
    return f.new_empty(()), f.new_empty(6, dtype=torch.float64), f.new_empty(3, dtype=torch.float64)


@structure_backward.register_fake
def _(upstream, f, g, weight, totals, sums, distance, normalize, penalty, delta, need_f, need_g):
    return tuple(x.new_empty(x.shape if needed else 0) for x, needed in ((f, need_f), (g, need_g)))


def _save(ctx, inputs, output):
    f, g, weight, *ctx.choices = inputs
    ctx.save_for_backward(f, g, weight, *output[1:])


def _backward(ctx, upstream, *_):
    needs = ctx.needs_input_grad[:2]
    gradients = structure_backward(upstream, *ctx.saved_tensors, *ctx.choices, *needs)
    return *(x if needed else None for x, needed in zip(gradients, needs)), *[None] * 5


structure.register_autograd(_backward, setup_context=_save)
