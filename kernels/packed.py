"""Split a packed qkv into q, k and v, and pack their gradients with the bias gradient in one pass.

Forward there is nothing to compute: q, k and v are views. Backward, autograd would stack dq, dk and dv, and the qkv
layer would read the result once more for its bias's gradient. The kernel here writes the packed gradient and sums up
its columns on the way, in fp32 and in a fixed order. The scheme is ours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import choose
from ._operator import operator
from .column_sums import check_bias, column_sums


def split_qkv(
    qkv: Tensor, heads: int, bias: Tensor | None = None, *, implementation: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v (B, N, H, d) as views of qkv (B, N, 3 * H * d).

    qkv: floating; its last dimension is ordered as (3, heads, d).
    bias: (3 * H * d,), the bias of the layer that made qkv, if that layer took it detached. Its value is not read, but
        it gets its gradient here. qkv must have no other use. With None, autograd stacks the three gradients.
    implementation: see `fastdit.kernels._dispatch`. Triton takes fp32, bf16 and fp16.

    Raises ValueError for other shapes, and for an `implementation` that cannot run here.
    """
    if qkv.dim() != 3 or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv must be (B, N, 3 * H * d) with H = {heads}, got {tuple(qkv.shape)}")
    check_bias("bias", bias, qkv)
    takes = qkv.dtype in (torch.float32, torch.bfloat16, torch.float16) and qkv.numel() > 0
    chosen = choose(qkv.device, implementation=implementation, triton=takes)
    if bias is None:
        return qkv.unflatten(2, (3, heads, -1)).unbind(2)
    return _SplitQkv.apply(qkv, bias, heads, chosen == "triton")


class _SplitQkv(torch.autograd.Function):
    """Differentiate `split_qkv` and the bias that was added to qkv."""

    @staticmethod
    def forward(ctx, qkv, bias, heads, by_kernel):
        ctx.by_kernel = by_kernel
        ctx.save_for_backward(bias)
        parts = qkv.unflatten(2, (3, heads, -1))
        return tuple(parts.select(2, i) for i in range(3))

    @staticmethod
    def backward(ctx, dq, dk, dv):
        (bias,) = ctx.saved_tensors
        need_bias = ctx.needs_input_grad[1]
        if ctx.by_kernel:
            dqkv, sums = pack_gradients(dq, dk, dv, bias if need_bias else None)
        else:
            dqkv = torch.stack((dq, dk, dv), 2).flatten(2)
            sums = dqkv.flatten(0, 1).sum(0, dtype=torch.promote_types(dqkv.dtype, bias.dtype)) if need_bias else None
        return dqkv, sums if need_bias else None, None, None


_BLOCK, _TILE, _CHUNK = 128, 8, 64  # with 4 warps, a thread holds 8 neighboring values of each gradient


@operator("fastdit::pack_gradients")
def pack_gradients(dq: Tensor, dk: Tensor, dv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradient (B, N, 3 * H * d) of qkv, and its column sums in the dtype of `bias`; empty without it.

    dq, dk and dv are (B, N, H, d) with any strides.
    """
    dqkv, sums = _outputs(dq, dk, dv, bias)
    batch, tokens, heads, dim = dq.shape
    width = heads * dim
    block = min(triton.next_power_of_2(width), _BLOCK)
    chunk = max(_TILE, min(_CHUNK, triton.next_power_of_2(tokens)))
    chunks, blocks = triton.cdiv(tokens, chunk), triton.cdiv(width, block)
    partials = None if bias is None else dq.new_empty(batch * chunks, 3 * width, dtype=torch.float32)
    _pack_gradients_kernel[(batch * chunks * blocks,)](
        *map(_heads, (dq, dk, dv)), dqkv, partials, tokens, chunks, blocks,
        D=width, DIM=dim, BLOCK=block, TILE=_TILE, CHUNK=chunk,
    )  # fmt: skip
    if bias is not None:
        column_sums(partials, sums)
    return dqkv, sums


@pack_gradients.register_fake
def _outputs(dq, dk, dv, bias):
    """Allocate the results of `pack_gradients`."""
    batch, tokens, heads, dim = dq.shape
    dqkv = dq.new_empty(batch, tokens, 3 * heads * dim)
    return dqkv, dq.new_empty(0) if bias is None else torch.empty_like(bias)


def _heads(x: Tensor) -> tuple[Tensor, int, int, int | None]:
    """Return the tuple that the kernel takes for (B, N, H, d): the tensor, and its strides but the last, which is 1.

    The stride of a head is None where the heads of a token follow each other.
    """
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1), None if x.stride(2) == x.shape[3] or x.shape[2] == 1 else x.stride(2)


@triton.jit
def _load_columns(x, b, n, cols, mask, DIM: tl.constexpr):
    """Load columns of rows n of sample b, (TILE, BLOCK) in x's dtype. A column is a channel of a head."""
    if x[3] is None:
        place = cols
    else:
        place = cols // DIM * x[3] + cols % DIM
    return tl.load(x[0] + b * x[1] + n[:, None] * x[2] + place[None, :], mask=mask, other=0.0)


@triton.jit
def _pack_gradients_kernel(
    dq, dk, dv, dqkv, partials, tokens, chunks, blocks,
    D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Pack CHUNK rows of one sample by BLOCK columns of dq, dk and dv, which a program owns, TILE rows at a time.

    It reads the three gradients and writes the packed one, once each. With `partials`, the column sums of all three
    stay in registers through the loop, one for each place of a tile. The program adds up the tile's rows at the end,
    and stores the sums to its own places of `partials`, whose row is that of the chunk. Program ids count the blocks of
    columns first, then the chunks of a sample.
    """
    part = (tl.program_id(0) // blocks).to(tl.int64)
    b = part // chunks
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    live = cols < D
    q_sum = tl.zeros([TILE, BLOCK], tl.float32)
    k_sum = tl.zeros([TILE, BLOCK], tl.float32)
    v_sum = tl.zeros([TILE, BLOCK], tl.float32)
    for first in tl.range(0, CHUNK, TILE, num_stages=1):
        n = part % chunks * CHUNK + first + tl.arange(0, TILE)
        mask = (n < tokens)[:, None] & live[None, :]
        # All loads precede all stores: the compiler cannot rule out overlap.
        q = _load_columns(dq, b, n, cols, mask, DIM)
        k = _load_columns(dk, b, n, cols, mask, DIM)
        v = _load_columns(dv, b, n, cols, mask, DIM)
        at = dqkv + (b * tokens + n)[:, None] * (3 * D) + cols[None, :]
        tl.store(at, q, mask=mask)
        tl.store(at + D, k, mask=mask)
        tl.store(at + 2 * D, v, mask=mask)
        if partials is not None:
            q_sum += q.to(tl.float32)
            k_sum += k.to(tl.float32)
            v_sum += v.to(tl.float32)
    if partials is not None:
        at = partials + part * (3 * D) + cols
        tl.store(at, tl.sum(q_sum, 0), mask=live)
        tl.store(at + D, tl.sum(k_sum, 0), mask=live)
        tl.store(at + 2 * D, tl.sum(v_sum, 0), mask=live)
