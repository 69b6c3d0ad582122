"""Prepare queries and keys for attention in one pass: RMS norm over each head, then 2-D rotary position embedding.

    q = q / sqrt(mean q^2 + eps) * weight                                      (QK-norm, arXiv 2302.05442)
    (q_j, q_{j + d/2}) = rotation by angle_j(token) of (q_j, q_{j + d/2})      (RoPE, arXiv 2104.09864, section 3.2.2)

The grid's axes share the d/2 pairs of a head: the first half turns with the row, the second with the column, pair i of
either half by coordinate * theta^(-i / (d/4)). The two numbers of a pair are d/2 apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import choose
from ._operator import operator

EPS = 1e-6
_TOKENS = 16  # tokens that one backward program owns, whose weight gradients it adds up


def rope_table(grid: tuple[int, int], head_dim: int, *, theta: float = 10000.0, device=None) -> Tensor:
    """Return the rotation table of a grid: for each token the cosines of its d/2 angles, then their sines.

    The table is (rows * cols, head_dim) fp32, computed in fp64, with tokens row by row. Raises ValueError unless
    head_dim is a multiple of 4.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
    rows, cols = (torch.arange(size, dtype=torch.float64, device=device) for size in grid)
    frequencies = theta ** -(torch.arange(head_dim // 4, dtype=torch.float64, device=device) / (head_dim // 4))
    by_row = (rows[:, None, None] * frequencies).expand(-1, len(cols), -1)
    by_col = (cols[:, None] * frequencies).expand(len(rows), -1, -1)
    angles = torch.cat([by_row, by_col], dim=2).flatten(0, 1)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def norm_rotate(
    q: Tensor,
    k: Tensor,
    *,
    norm: bool | tuple[Tensor, Tensor] = False,
    rope: Tensor | None = None,
    ids: Tensor | None = None,
    eps: float = EPS,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return q and k, normalized and rotated as in the module's docstring.

    q, k: (B, N, H, d) of one shape and floating dtype, d even. Views of a fused qkv are read in place.
    norm: False; True for a norm without weights; or the weights of q and of k, each floating (d,).
    rope: None, or a table (positions, d) of `rope_table`. Token n takes row n, or row ids[b, n] where ids are given.
    ids: (B, N) int64, the positions of a masked encoder's visible tokens. Their values are not checked.
    implementation: see `fastdit.kernels._dispatch`. There is a Triton kernel for all dtypes but fp64.

    Both results are contiguous (B, N, H, d) in the inputs' dtype. The arithmetic is fp32 (fp64 for fp64). q, k and the
    weights get gradients, and every sum has a fixed order. Raises ValueError for other shapes and dtypes, where neither
    norm nor rope is given, and for an `implementation` that cannot run here.
    """
    weights = norm if isinstance(norm, tuple) else (None, None)
    normed = norm is not False  # torch 2.11's compiler cannot trace bool() of a tuple
    _check(q, k, normed, *weights, rope, ids)
    if choose(q.device, implementation=implementation, triton=q.dtype != torch.float64) == "reference":
        return tuple(norm_rotate_reference(x, normed, w, rope, ids, eps) for x, w in zip((q, k), weights))
    return _norm_rotate(q, k, *weights, rope, ids, normed, eps)


def norm_rotate_reference(
    x: Tensor, norm: bool, weight: Tensor | None, rope: Tensor | None, ids: Tensor | None, eps: float = EPS
) -> Tensor:
    """Compute one of the two results of `norm_rotate` in PyTorch."""
    out = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm:
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(out.dtype)
    if rope is not None:
        rows = rope if ids is None else rope[ids]  # (N, d) or (B, N, d)
        cos, sin = rows.to(out.dtype).unsqueeze(-2).chunk(2, dim=-1)
        first, second = out.chunk(2, dim=-1)
        out = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return out.to(x.dtype, memory_format=torch.contiguous_format)


@operator("fastdit::norm_rotate")
def _norm_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rope: Tensor | None, ids: Tensor | None,
    norm: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return q and k, normalized and rotated, contiguous."""
    batch, tokens, heads, dim = q.shape
    outs = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2)]
    _norm_rotate_forward_kernel[(tokens, batch)](
        *(_strided(x) for x in (q, k, *outs)), *(_dense(x) for x in (q_weight, k_weight, rope, ids)),
        tokens, heads, eps, HALF=dim // 2, NORM=norm, **_blocks(heads, dim),
    )  # fmt: skip
    return outs[0], outs[1]


@operator("fastdit::norm_rotate_backward")
def _norm_rotate_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    rope: Tensor | None, ids: Tensor | None, norm: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dq_weight, dk_weight). The last two are fp32, and empty without weights."""
    batch, tokens, heads, dim = q.shape
    dq, dk = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    parts = triton.cdiv(tokens, _TOKENS)
    partial = None if q_weight is None else torch.empty(2, batch * parts, dim, device=q.device)
    _norm_rotate_backward_kernel[(parts, batch)](
        *(_strided(x) for x in (dq_out, dk_out, q, k, dq, dk)), partial,
        *(_dense(x) for x in (q_weight, k_weight, rope, ids)),
        tokens, heads, eps, HALF=dim // 2, NORM=norm, TOKENS=_TOKENS, **_blocks(heads, dim),
    )  # fmt: skip
    sums = torch.empty(2, 0, device=q.device) if partial is None else partial.sum(1)
    return dq, dk, sums[0].clone(), sums[1].clone()


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return x and its first three strides, where x is copied unless its last stride is 1."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, *x.stride()[:3]


def _dense(x: Tensor | None) -> Tensor | None:
    """Return x, contiguous."""
    return None if x is None else x.contiguous()


def _blocks(heads: int, dim: int) -> dict[str, int]:
    """Return a tile that covers all heads of one token, half a head wide, and its number of warps."""
    sizes = {"HEADS": triton.next_power_of_2(heads), "BLOCK": triton.next_power_of_2(dim // 2)}
    return sizes | {"num_warps": max(1, min(8, sizes["HEADS"] * sizes["BLOCK"] // 256))}


@triton.jit
def _places(x, b, n, head, j):
    """Return pointers to the first halves of one token's heads.

    x is (tensor, stride of a sample, stride of a token, stride of a head).
    """
    return x[0] + b * x[1] + n * x[2] + head * x[3] + j


@triton.jit
def _load(x, b, n, head, j, mask, HALF: tl.constexpr):
    """Load both halves of one token's heads as fp32, zero where masked."""
    at = _places(x, b, n, head, j)
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, b, n, head, j, mask, first, second, HALF: tl.constexpr):
    """Store both halves of one token's heads in x's dtype."""
    at = _places(x, b, n, head, j)
    tl.store(at, first.to(x[0].dtype.element_ty), mask=mask)
    tl.store(at + HALF, second.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def _load_row(x, row, j, HALF: tl.constexpr):
    """Load both halves of a row of d numbers as fp32."""
    at = x + row * (2 * HALF) + j
    first = tl.load(at, mask=j < HALF, other=0.0).to(tl.float32)
    return first, tl.load(at + HALF, mask=j < HALF, other=0.0).to(tl.float32)


@triton.jit
def _unit(first, second, eps, HALF: tl.constexpr):
    """Return both halves divided by their root mean square, and its inverse."""
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
    rstd = tl.rsqrt(mean + eps)[:, None]
    return first * rstd, second * rstd, rstd


@triton.jit
def _row_of(ids, b, n, tokens, live):
    """Return token n's row of the rope table, or row 0 for a token past the last."""
    return tl.where(live, n, 0) if ids is None else tl.load(ids + b * tokens + n, mask=live, other=0)


@triton.jit
def _forward_one(x, out, weight, rope, row, b, n, head, j, mask, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    """Normalize and rotate one token of q or of k: read x once and write out once, in registers between."""
    first, second = _load(x, b, n, head, j, mask, HALF)
    if NORM:
        first, second, _ = _unit(first, second, eps, HALF)
    if weight is not None:
        w_first, w_second = _load_row(weight, 0, j, HALF)
        first, second = first * w_first, second * w_second
    if rope is not None:
        cos, sin = _load_row(rope, row, j, HALF)
        first, second = first * cos - second * sin, second * cos + first * sin
    _store(out, b, n, head, j, mask, first, second, HALF)


@triton.jit
def _norm_rotate_forward_kernel(
    q, k, q_out, k_out, q_weight, k_weight, rope, ids, tokens, heads, eps,
    HALF: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Process q and k of one token: a program owns all heads of token n of sample b.

    It reads q and k once, one row of the rope table for both, and writes both results once.
    """
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    head, j = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (j < HALF)
    row = _row_of(ids, b, n, tokens, True)
    _forward_one(q, q_out, q_weight, rope, row, b, n, head, j, mask, eps, HALF, NORM)
    _forward_one(k, k_out, k_weight, rope, row, b, n, head, j, mask, eps, HALF, NORM)


@triton.jit
def _backward_one(d_out, x, dx, weight, rope, row, b, n, head, j, mask, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    """Store dx of one token, and return its share of the weight's gradient, (1, BLOCK) for each half."""
    first, second = _load(d_out, b, n, head, j, mask, HALF)
    # Rotate back, by the negative angle.
    if rope is not None:
        cos, sin = _load_row(rope, row, j, HALF)
        first, second = first * cos + second * sin, second * cos - first * sin
    w_first = tl.zeros((1, first.shape[1]), tl.float32)
    w_second = w_first
    # Recompute the normalized x, and differentiate the norm.
    if NORM:
        u_first, u_second = _load(x, b, n, head, j, mask, HALF)
        u_first, u_second, rstd = _unit(u_first, u_second, eps, HALF)
        if weight is not None:
            w_first = tl.sum(first * u_first, 0)[None, :]
            w_second = tl.sum(second * u_second, 0)[None, :]
            factor_first, factor_second = _load_row(weight, 0, j, HALF)
            first, second = first * factor_first, second * factor_second
        along = ((tl.sum(first * u_first, 1) + tl.sum(second * u_second, 1)) / (2 * HALF))[:, None]
        first = (first - u_first * along) * rstd
        second = (second - u_second * along) * rstd
    _store(dx, b, n, head, j, mask, first, second, HALF)
    return w_first, w_second


@triton.jit
def _norm_rotate_backward_kernel(
    dq_out, dk_out, q, k, dq, dk, partial, q_weight, k_weight, rope, ids, tokens, heads, eps,
    HALF: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dq and dk of TOKENS tokens of sample b: a program owns them and all their heads.

    It reads the results' gradients and, for the norm, q and k once, and writes dq and dk once. The four halves of the
    weights' gradients stay in registers through the loop. The program stores them to its own row of `partial`, and the
    caller adds up the rows in order.
    """
    part = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    head, j = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    q_first = tl.zeros((1, BLOCK), tl.float32)
    q_second = tl.zeros((1, BLOCK), tl.float32)
    k_first = tl.zeros((1, BLOCK), tl.float32)
    k_second = tl.zeros((1, BLOCK), tl.float32)
    # One token at a time.
    for step in range(TOKENS):
        n = part * TOKENS + step
        live = n < tokens
        mask = (head < heads) & (j < HALF) & live
        row = _row_of(ids, b, n, tokens, live)
        first, second = _backward_one(dq_out, q, dq, q_weight, rope, row, b, n, head, j, mask, eps, HALF, NORM)
        q_first += first
        q_second += second
        first, second = _backward_one(dk_out, k, dk, k_weight, rope, row, b, n, head, j, mask, eps, HALF, NORM)
        k_first += first
        k_second += second
    # This program's sums for the weights: q's rows of `partial` precede k's.
    if partial is not None:
        rows = tl.num_programs(1) * tl.num_programs(0)
        at = partial + (b * tl.num_programs(0) + part) * (2 * HALF) + j
        tl.store(at, q_first, mask=j < HALF)
        tl.store(at + HALF, q_second, mask=j < HALF)
        tl.store(at + rows * (2 * HALF), k_first, mask=j < HALF)
        tl.store(at + rows * (2 * HALF) + HALF, k_second, mask=j < HALF)


@_norm_rotate.register_fake
def _(q, k, q_weight, k_weight, rope, ids, norm, eps):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


@_norm_rotate_backward.register_fake
def _(dq_out, dk_out, q, k, q_weight, k_weight, rope, ids, norm, eps):
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    size = 0 if q_weight is None else q.shape[-1]
    return dq, dk, *(torch.empty(size, device=q.device) for _ in range(2))


def _save(ctx, inputs, output):
    *tensors, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dq_out, dk_out):
    saved = ctx.saved_tensors  # read once: with gradient checkpointing a second read fails
    dq, dk, *dw = _norm_rotate_backward(dq_out, dk_out, *saved, ctx.norm, ctx.eps)
    dw = (None if w is None else d.to(w.dtype) for w, d in zip(saved[2:4], dw))
    return dq, dk, *dw, None, None, None, None


_norm_rotate.register_autograd(_backward, setup_context=_save)


def _check(q, k, norm, q_weight, k_weight, rope, ids) -> None:
    """Raise ValueError unless the arguments are those that `norm_rotate` documents."""
    if q.dim() != 4 or k.shape != q.shape or not q.numel() or q.shape[-1] % 2:
        raise ValueError(f"q, k must be (B, N, H, d) of one shape, d even, got {tuple(q.shape)}, {tuple(k.shape)}")
    if k.dtype != q.dtype or not q.is_floating_point():
        raise ValueError(f"q, k must have one floating dtype, got {q.dtype}, {k.dtype}")
    batch, tokens, _, dim = q.shape
    if not norm and rope is None:
        raise ValueError("nothing to do: give norm, rope or both")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("norm's weights go together: (q_weight, k_weight)")
    for weight in (q_weight, k_weight):
        if weight is not None and (weight.shape != (dim,) or not weight.is_floating_point()):
            raise ValueError(f"norm's weights must be floating ({dim},), got {weight.dtype} {tuple(weight.shape)}")
    if rope is not None and (rope.dim() != 2 or rope.shape[1] != dim or rope.dtype != torch.float32):
        raise ValueError(f"rope must be fp32 (positions, {dim}), got {rope.dtype} {tuple(rope.shape)}")
    if rope is not None and ids is None and rope.shape[0] != tokens:
        raise ValueError(f"rope must have {tokens} rows, one a token, or ids must be given; it has {rope.shape[0]}")
    if ids is not None and (rope is None or ids.shape != (batch, tokens) or ids.dtype != torch.int64):
        raise ValueError(f"ids must be int64 ({batch}, {tokens}), with a rope, got {ids.dtype} {tuple(ids.shape)}")
