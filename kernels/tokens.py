"""Draw the visible tokens of a masked encoder, embed only those, and scatter them back among the others.

Drawing and embedding are a few torch calls without a host sync. They read the pixels of visible patches only, which
are few bytes beside the tokens that they become. Scattering is a Triton kernel: one pass over the (B, N, D) result in
either direction, where torch's copy, expanded index and scatter take nearly two.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import choose
from ._operator import operator
from .sample_generator import AnyGenerator, draw_uniform


def visible_tokens(
    batch: int, tokens: int, keep: int, *, generator: AnyGenerator, device: torch.device | str
) -> Tensor:
    """Draw `keep` of the token ids 0..tokens-1 for each sample, uniformly and without replacement.

    Returns (batch, keep) int64 in rising order; with keep == tokens each row is 0..tokens-1. `generator` lives on
    `device`; None means torch's global one. Raises ValueError unless 1 <= keep <= tokens.
    """
    return split_tokens(batch, tokens, keep, generator=generator, device=device)[0]


def split_tokens(
    batch: int, tokens: int, keep: int, *, generator: AnyGenerator, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return the ids that `visible_tokens` draws, and the hidden ones.

    The hidden ids are (batch, tokens - keep) int64, in rising order too. Raises ValueError unless 1 <= keep <= tokens.
    """
    if not 1 <= keep <= tokens:
        raise ValueError(f"keep must be in 1..{tokens}, got {keep}")
    order = draw_uniform((batch, tokens), generator=generator, device=device).argsort(dim=1, stable=True)
    return order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values


def embed_tokens(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, ids: Tensor) -> Tensor:
    """Return patch embedding plus position embedding of the tokens `ids` only.

    x: (B, C, H, W) images.
    weight, bias: (D, C, p, p) and (D,) or None, those of a convolution with stride p.
    positions: (N, D) with N = H/p * W/p, row by row.
    ids: (B, keep) int64 in 0..N-1. Their values are not checked.

    Returns (B, keep, D) in the wider dtype of weight and positions. All floating inputs get gradients, the same bits in
    every run. Raises ValueError for shapes that do not fit.
    """
    patch = weight.shape[-1]
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], patch, patch):
        raise ValueError(f"x (B, C, H, W), weight (D, C, p, p): got {tuple(x.shape)}, {tuple(weight.shape)}")
    rows, cols = (size // patch for size in x.shape[2:])
    if x.shape[2] % patch or x.shape[3] % patch or positions.shape != (rows * cols, weight.shape[0]):
        raise ValueError(
            f"positions must be (H/p * W/p, D) for x {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            f"got {tuple(positions.shape)}"
        )
    _check_ids(ids, x.shape[0], rows * cols)
    # Gather the visible patches' pixels, then multiply as the convolution would.
    grid = x.to(weight.dtype).unflatten(3, (cols, patch)).unflatten(2, (rows, patch)).permute(0, 2, 4, 1, 3, 5)
    sample = torch.arange(x.shape[0], device=x.device)[:, None]
    patches = grid[sample, ids // cols, ids % cols].flatten(2)  # (B, keep, C * p * p)
    embedded = F.linear(patches, weight.flatten(1), bias)
    return embedded + positions[ids]


def scatter_tokens(x: Tensor, ids: Tensor, base: Tensor, *, implementation: str | None = None) -> Tensor:
    """Return base with its tokens `ids` replaced by x: out[b, ids[b, i]] = x[b, i], and out = base elsewhere.

    x: (B, keep, D) of any floating dtype.
    ids: (B, keep) int64 in 0..N-1, distinct within a sample. Their values are not checked.
    base: (B, N, D) of x's dtype and any strides. An expanded mask token is read as it is, never materialized.
    implementation: see `fastdit.kernels._dispatch`. There is a Triton kernel for all dtypes but fp64.

    Returns (B, N, D). Gradients are exact copies: x gets those of its tokens, base gets the others and zeros.
    Raises ValueError for other shapes and dtypes, and for an `implementation` that cannot run here.
    """
    if x.dim() != 3 or base.dim() != 3 or (x.shape[0], x.shape[2]) != (base.shape[0], base.shape[2]):
        raise ValueError(f"x (B, keep, D), base (B, N, D): got {tuple(x.shape)}, {tuple(base.shape)}")
    if x.dtype != base.dtype or not x.is_floating_point():
        raise ValueError(f"x and base must have one floating dtype, got {x.dtype}, {base.dtype}")
    _check_ids(ids, *base.shape[:2])
    if ids.shape != x.shape[:2]:
        raise ValueError(f"ids must be (B, keep) = {tuple(x.shape[:2])}, got {tuple(ids.shape)}")
    if choose(x.device, implementation=implementation, triton=x.dtype != torch.float64) == "reference":
        return scatter_tokens_reference(x, ids, base)
    return _scatter(x, _slots(ids, base.shape[1]), base)


def scatter_tokens_reference(x: Tensor, ids: Tensor, base: Tensor) -> Tensor:
    """Compute `scatter_tokens` in PyTorch."""
    return base.scatter(1, ids[:, :, None].expand_as(x), x)


def _slots(ids: Tensor, tokens: int) -> Tensor:
    """Return (B, N) int32: the index in x of each token, or -1 for tokens that x lacks."""
    slots = torch.full((ids.shape[0], tokens), -1, dtype=torch.int32, device=ids.device)
    places = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
    return slots.scatter(1, ids, places.expand(ids.shape))


def _check_ids(ids: Tensor, batch: int, tokens: int) -> None:
    """Raise ValueError unless ids are int64 (batch, 1..tokens)."""
    if ids.dim() != 2 or ids.shape[0] != batch or not 1 <= ids.shape[1] <= tokens or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 ({batch}, 1..{tokens}), got {ids.dtype} {tuple(ids.shape)}")


@operator("fastdit::scatter_tokens")
def _scatter(x: Tensor, slots: Tensor, base: Tensor) -> Tensor:
    """Return (B, N, D): x[b, slots[b, n]] where that slot is not negative, else base[b, n]."""
    x, out = x.contiguous(), torch.empty(base.shape, dtype=base.dtype, device=base.device)
    batch, tokens, width = base.shape
    _scatter_tokens_kernel[(tokens, batch)](
        x, slots, base, out, x.shape[1], width, *base.stride(), BLOCK=_block(width), num_warps=_warps(width)
    )
    return out


@operator("fastdit::scatter_tokens_backward")
def _scatter_backward(upstream: Tensor, slots: Tensor, keep: int, need_base: bool) -> tuple[Tensor, Tensor]:
    """Return (dx, dbase); dbase is empty where it is not needed."""
    upstream = upstream.contiguous()
    batch, tokens, width = upstream.shape
    dx = upstream.new_empty(batch, keep, width)
    dbase = upstream.new_empty(upstream.shape if need_base else 0)
    _scatter_tokens_backward_kernel[(tokens, batch)](
        upstream, slots, dx, dbase, keep, width, NEED_BASE=need_base, BLOCK=_block(width), num_warps=_warps(width)
    )
    return dx, dbase


def _block(width: int) -> int:
    """Return the features that a program moves at once."""
    return min(1024, triton.next_power_of_2(width))


def _warps(width: int) -> int:
    """Return warps for one 16-byte access of bf16 a thread, where the width allows it."""
    return max(1, _block(width) // 256)


@triton.jit
def _scatter_tokens_kernel(
    x, slots, base, out, keep, width, base_batch, base_token, base_feature, BLOCK: tl.constexpr
):  # fmt: skip
    """Write one token of the result: a program owns it, and copies D numbers from x or from base, a block at a time.

    It reads the token's slot (4 bytes) and only the one source that is needed.
    """
    token = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    place = sample * tl.num_programs(0) + token
    slot = tl.load(slots + place)
    for start in range(0, width, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        inside = feature < width
        if slot >= 0:
            row = tl.load(x + (sample * keep + slot) * width + feature, mask=inside)
        else:
            at = sample * base_batch + token.to(tl.int64) * base_token + feature.to(tl.int64) * base_feature
            row = tl.load(base + at, mask=inside)
        tl.store(out + place * width + feature, row, mask=inside)


@triton.jit
def _scatter_tokens_backward_kernel(
    upstream, slots, dx, dbase, keep, width, NEED_BASE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Route one token's gradient: a program owns it, reads D numbers once and stores them to dx or to dbase.

    dbase gets zeros where x replaced the token. Each element of dx and dbase has one writer.
    """
    sample = tl.program_id(1).to(tl.int64)
    place = sample * tl.num_programs(0) + tl.program_id(0)
    slot = tl.load(slots + place)
    for start in range(0, width, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        inside = feature < width
        row = tl.load(upstream + place * width + feature, mask=inside)
        if slot >= 0:
            tl.store(dx + (sample * keep + slot) * width + feature, row, mask=inside)
            row = tl.zeros_like(row)
        if NEED_BASE:
            tl.store(dbase + place * width + feature, row, mask=inside)


@_scatter.register_fake
def _(x, slots, base):
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


@_scatter_backward.register_fake
def _(upstream, slots, keep, need_base):
    batch, _, width = upstream.shape
    return upstream.new_empty(batch, keep, width), upstream.new_empty(upstream.shape if need_base else 0)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.keep = inputs[0].shape[1]


def _backward(ctx, upstream):
    need_base = ctx.needs_input_grad[2]
    dx, dbase = _scatter_backward(upstream, *ctx.saved_tensors, ctx.keep, need_base)
    return dx, None, dbase if need_base else None


_scatter.register_autograd(_backward, setup_context=_save)
