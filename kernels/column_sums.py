"""Column sums of a gradient, which are the gradient of a linear layer's bias.

A kernel that reads or writes the gradient anyway sums up the rows that each of its programs owns, in fp32 and before
the gradient is rounded. It stores one row of partial sums for each program. `column_sums` adds these rows up in a fixed
order. The scheme is ours.

`bias_of` does the same without a kernel: it is an identity in PyTorch, whose backward pass sums up the columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def bias_of(y: Tensor, bias: Tensor | None) -> Tensor:
    """Return y unchanged, and let its gradient reach `bias` as if the layer that made y had not detached it.

    y: (..., D). bias: (D,), already added to y by a layer that took `bias.detach()`, or None.
    """
    return y if bias is None else _BiasOf.apply(y, bias)


class _BiasOf(torch.autograd.Function):
    """Pass y on, and differentiate the bias that was added to it."""

    @staticmethod
    def forward(ctx, y, bias):
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        need_y, need_bias = ctx.needs_input_grad
        dtype = torch.promote_types(dy.dtype, ctx.dtype)
        return dy if need_y else None, dy.flatten(0, -2).sum(0, dtype=dtype) if need_bias else None


def check_bias(name: str, bias: Tensor | None, like: Tensor) -> None:
    """Raise ValueError unless `bias` is None, or a floating (D,) on the device of `like` (..., D)."""
    if bias is None:
        return
    if bias.shape != like.shape[-1:] or not bias.is_floating_point():
        raise ValueError(f"{name} must be floating ({like.shape[-1]},), got {bias.dtype} {tuple(bias.shape)}")
    if bias.device != like.device:
        raise ValueError(f"{name} is on {bias.device}, the layer's input on {like.device}")


def column_sums(partials: Tensor, sums: Tensor) -> None:
    """Launch the kernel that fills `sums` (D,), of any floating dtype, from the rows of `partials` (P, D) fp32."""
    rows, width = partials.shape
    _column_sums_kernel[(triton.cdiv(width, _BLOCK),)](partials, sums, rows, D=width, BLOCK=_BLOCK, TILE=_TILE)


_BLOCK, _TILE = 32, 64  # a row of a tile is 128 bytes; with 4 warps, a thread waits for four 16-byte loads at once


@triton.jit
def _column_sums_kernel(partials, sums, rows, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Add up the rows of partial sums: a program owns BLOCK columns, and loops over the rows, TILE at a time.

    It reads its columns of `partials` once. One sum for each place of a tile stays in registers through the loop. The
    program adds up the tile's rows at the end, and writes its columns of `sums` once.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = cols < D
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for first in range(0, rows, TILE):
        row = first + tl.arange(0, TILE)
        at = partials + row.to(tl.int64)[:, None] * D + cols[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & live[None, :], other=0.0)
    tl.store(sums + cols, tl.sum(total, 0), mask=live)
