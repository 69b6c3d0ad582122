"""Compute SD-DiT's discriminative loss (arXiv 2403.17004), as DINO and iBOT do (arXiv 2104.14294, 2111.07832).

It is the cross-entropy between the teacher's and the student's distributions over K prototypes:

    l = (z / |z|) . (V_k / |V_k|)        logits of bottleneck features z with prototypes V, student's and teacher's
    q = softmax((l_T - C) / tau_t),  p = softmax(l_S / tau_s),  L = mean_i -q_i . log p_i

The logits of 52,000 tokens and 8,192 prototypes take 1.7 GB for each side. Tokens are therefore processed in chunks,
and the forward pass forms the gradient while a chunk's logits exist. Two GEMMs compute the logits, one kernel reads
them once and writes the gradient of the student's logits, and two GEMMs take it to features and prototypes. The
backward pass only scales. The chunking and the fused gradient are ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import choose
from ._operator import operator

CENTERINGS = ("ema", "sinkhorn", "none")
SINKHORN_ITERATIONS = 3  # as in DINOv2

_CHUNK_LOGITS = {"cuda": 1 << 24, "cpu": 1 << 21}
_BLOCK = 4096  # prototypes that a Triton program holds at once
_TINY = 1e-30


class PrototypeLoss(NamedTuple):
    """Hold the loss and the statistics for centering and for detecting collapse, all on the device.

    Only `loss` carries a gradient. Entropy and KL are means over tokens, with the loss's weights.
    """

    loss: Tensor  # () fp32
    teacher_mean: Tensor  # (K,) fp32, the mean of the teacher's raw logits over tokens, which the center follows
    wins: Tensor  # (K,) int64, the number of tokens for which the teacher prefers this prototype
    teacher_entropy: Tensor  # () fp32, in nats
    kl: Tensor  # () fp32, KL(teacher || student)


def prototype_loss(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    centering: str = "ema",
    center: Tensor | None = None,
    weight: Tensor | None = None,
    all_reduce: Callable[[Tensor], object] | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> PrototypeLoss:
    """Return L of the module's docstring, with gradients for `student` and `student_prototypes` only.

    student, teacher: (T, k) bottleneck features of the same tokens, floating, any strides.
    student_prototypes, teacher_prototypes: (K, k), floating, any strides.
    student_temperature, teacher_temperature: tau_s and tau_t, positive.
    centering: "ema" subtracts `center`, which the caller moves towards `teacher_mean`. "sinkhorn" balances the
        prototypes' shares by 3 Sinkhorn-Knopp iterations over all tokens, as DINOv2 does (arXiv 2304.07193), in three
        more passes over the teacher's logits. It needs teacher_temperature >= 0.025, so that exp(-2 / temperature) is
        an fp32 number. "none" does neither.
    center: C (K,), floating, for "ema" only.
    weight: (T,) >= 0, floating. L, entropy and KL are weighted means over tokens. `teacher_mean`, `wins` and Sinkhorn
        count every token once. The loss is zero if all weights are.
    all_reduce: sums Sinkhorn's (K,) totals over ranks, in place.
    chunk: tokens that are processed at once. Results depend on it only by rounding.
    implementation: see `fastdit.kernels._dispatch`. There is a Triton kernel for all dtypes but fp64.

    Features and prototypes are normalized in fp32. GEMMs run in `student`'s dtype and accumulate in fp32. Logits and
    everything after them are fp32 (fp64 for fp64).

    At most 3 fp32 arrays of `chunk` x K logits exist at once with Triton, and 4 without. By default such an array holds
    2^24 numbers on a GPU (64 MiB) and 2^21 on a CPU (8 MiB). Normalized copies and gradients of the inputs come on top.
    Raises ValueError for other shapes, dtypes and choices, and for an `implementation` that cannot run here.
    """
    _check(student, teacher, student_prototypes, teacher_prototypes, centering, center, weight, chunk)
    _check_temperatures(student_temperature, teacher_temperature, centering)
    # Normalize features and prototypes, and form what centering adds to the teacher's logits.
    work = torch.promote_types(student.dtype, torch.float32)
    chosen = choose(student.device, implementation=implementation, triton=work == torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        s, vs, t, vt = (
            F.normalize(x.to(work), dim=1).to(student.dtype)
            for x in (student, student_prototypes, teacher.detach(), teacher_prototypes.detach())
        )
        size, count = t.shape[0], vt.shape[0]
        chunk = min(size, chunk or max(1, _CHUNK_LOGITS.get(s.device.type, _CHUNK_LOGITS["cuda"]) // count))
        if centering == "sinkhorn":
            offset = _sinkhorn(t, vt, teacher_temperature, chunk, all_reduce)
        elif centering == "ema":
            offset = center.detach().to(work) / -teacher_temperature
        else:
            offset = t.new_zeros(count, dtype=work)
        teacher_mean = vt.to(work) @ t.mean(0, dtype=work)

    # Compute the loss, its gradient and the statistics, in chunks of tokens.
    weight = t.new_ones(size, dtype=work) if weight is None else weight.detach().to(work)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (s, vs)]
    temperatures = (student_temperature, teacher_temperature)
    loss, entropy, wins, *_ = _cross_entropy(s, t, vs, vt, offset, weight, *temperatures, chunk, *needs, chosen)
    entropy = entropy.detach()
    return PrototypeLoss(loss, teacher_mean, wins, entropy, loss.detach() - entropy)


@torch.no_grad()
def _sinkhorn(t: Tensor, vt: Tensor, temperature: float, chunk: int, all_reduce: Callable | None) -> Tensor:
    """Return b (K,) such that the balanced assignment of token i is softmax_k(l_ik / temperature + b_k).

    Sinkhorn-Knopp alternates between scaling prototypes to equal sums over tokens and scaling tokens to sums of 1. The
    softmax includes the tokens' scale, so only the prototypes' scale is stored: b is its logarithm.
    """
    offset = None
    for _ in range(SINKHORN_ITERATIONS):
        total = 0.0
        for part in t.split(chunk):
            logits = _product(part, vt.t()).div_(temperature)
            if offset is None:  # |l| <= 1 keeps the exponent below 0
                total = total + logits.sub_(1 / temperature).exp_().sum(0)
            else:
                total = total + logits.add_(offset).softmax(1).sum(0)
        if all_reduce is not None:
            all_reduce(total)
        step = total.clamp_min(_TINY).log()
        offset = -step if offset is None else offset - step
    return offset


@operator("fastdit::prototype_cross_entropy")
def _cross_entropy(
    s: Tensor, t: Tensor, vs: Tensor, vt: Tensor, offset: Tensor, weight: Tensor,
    student_temperature: float, teacher_temperature: float, chunk: int, need_s: bool, need_v: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (loss, entropy, wins, ds, dvs, scale) for unit vectors.

    ds and dvs, empty where they are not needed, are gradients without the factor `scale`, which backward applies.
    """
    # Allocate the results.
    size, (count, width) = s.shape[0], vs.shape
    offset, weight = offset.contiguous(), weight.contiguous()
    ds = torch.empty_like(s, memory_format=torch.contiguous_format) if need_s else s.new_empty(0)
    dvs = offset.new_zeros(count, width) if need_v else offset.new_empty(0)
    terms, entropies = offset.new_empty(2, size)
    winners = torch.empty(size, dtype=torch.int64, device=s.device)
    rows = _rows_triton if implementation == "triton" else _rows_reference
    temperatures = (student_temperature, teacher_temperature)

    def run(part: slice) -> None:
        """Process a chunk; its logits are freed on return, before the next chunk's are allocated."""
        ls, lt = _product(s[part], vs.t()), _product(t[part], vt.t())
        pull = rows(
            ls, lt, offset, weight[part], *temperatures, terms[part], entropies[part], winners[part],
            s.dtype if need_s or need_v else None,
        )  # fmt: skip
        del ls, lt
        if need_s:
            ds[part] = _product(pull, vs)
        if need_v:
            dvs.add_(_product(pull.t(), s[part]))

    with torch.autocast(s.device.type, enabled=False):
        for start in range(0, size, chunk):
            run(slice(start, min(start + chunk, size)))
    # Reduce the tokens' terms.
    total = weight.sum().clamp_min(_TINY)
    wins = torch.zeros(count, dtype=torch.int64, device=s.device)
    wins.scatter_add_(0, winners, torch.ones_like(winners))
    loss, entropy = ((weight * x).sum() / total for x in (terms, entropies))
    return loss, entropy, wins, ds, dvs, 1 / (total * student_temperature)


@_cross_entropy.register_fake
def _(s, t, vs, vt, offset, weight, student_temperature, teacher_temperature, chunk, need_s, need_v, implementation):
    scalar = offset.new_empty(())
    ds = s.new_empty(s.shape if need_s else 0)
    dvs = offset.new_empty(vs.shape if need_v else 0)
    wins = offset.new_empty(vs.shape[0], dtype=torch.int64)
    return scalar, scalar.clone(), wins, ds, dvs, scalar.clone()


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = inputs[0].dtype, inputs[2].dtype


def _backward(ctx, upstream, *_):
    ds, dvs, scale = ctx.saved_tensors
    scale = upstream * scale
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    ds, dvs = (
        (x.to(scale.dtype) * scale).to(dtype) if needed else None
        for x, dtype, needed in zip((ds, dvs), ctx.dtypes, needs)
    )
    return ds, None, dvs, *[None] * 9


_cross_entropy.register_autograd(_backward, setup_context=_save)


def _rows_reference(
    ls: Tensor, lt: Tensor, offset: Tensor, weight: Tensor, student_temperature: float, teacher_temperature: float,
    terms: Tensor, entropies: Tensor, winners: Tensor, gradient: torch.dtype | None,
) -> Tensor | None:  # fmt: skip
    """Fill each row's -q . log p, its entropy of q and its most likely prototype, in PyTorch.

    Returns weight * (p - q) in the dtype `gradient`, or None without one. ls and lt (chunk, K) are overwritten.
    """
    a = ls.div_(student_temperature)
    z = lt.div_(teacher_temperature).add_(offset)
    torch.argmax(z, 1, out=winners)
    a -= a.logsumexp(1, keepdim=True)  # log p
    z -= z.logsumexp(1, keepdim=True)  # log q
    q = z.exp()
    torch.sum(a.mul(q), 1, out=terms).neg_()
    torch.sum(z.mul_(q), 1, out=entropies).neg_()
    return None if gradient is None else a.exp_().sub_(q).mul_(weight[:, None]).to(gradient)


def _rows_triton(
    ls: Tensor, lt: Tensor, offset: Tensor, weight: Tensor, student_temperature: float, teacher_temperature: float,
    terms: Tensor, entropies: Tensor, winners: Tensor, gradient: torch.dtype | None,
) -> Tensor | None:  # fmt: skip
    """Compute `_rows_reference` with one kernel, whose second read of a row hits the cache."""
    count = ls.shape[1]
    pull = ls if gradient in (None, ls.dtype) else torch.empty_like(ls, dtype=gradient)
    _prototype_rows_kernel[(ls.shape[0],)](
        ls, lt, offset, weight, pull, terms, entropies, winners, count,
        1 / student_temperature, 1 / teacher_temperature,
        LOWEST=-1e30, BLOCK=min(_BLOCK, triton.next_power_of_2(count)), GRADIENT=gradient is not None, num_warps=8,
    )  # fmt: skip
    return None if gradient is None else pull


@triton.jit
def _prototype_rows_kernel(
    ls, lt, offset, weight, pull, terms, entropies, winners, count, student_sharpness, teacher_sharpness,
    LOWEST: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Compute one token's terms and gradient: a program owns a row of K logits of either side.

    It reads both rows once from memory, BLOCK prototypes at a time, and writes three numbers. Running maxima and sums
    stay in registers. With GRADIENT it reads both rows again, then from cache, and writes w (p - q) once, in place of
    the student's logits if the dtype allows.
    """
    row = tl.program_id(0).to(tl.int64)
    ls += row * count
    lt += row * count
    # Keep running maxima, sums of exponentials, and the teacher's mean of both sides' logits below their maxima.
    # Cross-entropy and entropy then are sums of positive terms, which keep their digits when they are small.
    a_max = LOWEST
    z_max = LOWEST
    a_sum = 0.0
    z_sum = 0.0
    a_by_q = 0.0
    z_by_q = 0.0
    winner = 0
    for start in range(0, count, BLOCK):
        # Load a block of scaled logits.
        k = start + tl.arange(0, BLOCK)
        inside = k < count
        a = tl.load(ls + k, mask=inside, other=0.0) * student_sharpness
        z = tl.load(lt + k, mask=inside, other=0.0) * teacher_sharpness + tl.load(offset + k, mask=inside, other=0.0)
        # Move the maxima, and rescale the sums to them.
        a_top = tl.maximum(a_max, tl.max(tl.where(inside, a, LOWEST)))
        z_block, index = tl.max(tl.where(inside, z, LOWEST), axis=0, return_indices=True)
        z_top = tl.maximum(z_max, z_block)
        winner = tl.where(z_block > z_max, start + index, winner)
        p = tl.where(inside, tl.exp(a - a_top), 0.0)
        q = tl.where(inside, tl.exp(z - z_top), 0.0)
        shrink = tl.exp(z_max - z_top)
        a_by_q = shrink * (a_by_q + (a_max - a_top) * z_sum) + tl.sum(q * (a - a_top))
        z_by_q = shrink * (z_by_q + (z_max - z_top) * z_sum) + tl.sum(q * (z - z_top))
        a_sum = a_sum * tl.exp(a_max - a_top) + tl.sum(p)
        z_sum = z_sum * shrink + tl.sum(q)
        a_max = a_top
        z_max = z_top
    # Store the row's cross-entropy, entropy and winner.
    tl.store(terms + row, tl.log(a_sum) - a_by_q / z_sum)
    tl.store(entropies + row, tl.log(z_sum) - z_by_q / z_sum)
    tl.store(winners + row, winner)
    # Store the gradient of the student's scaled logits.
    if GRADIENT:
        a_log = a_max + tl.log(a_sum)
        z_log = z_max + tl.log(z_sum)
        w = tl.load(weight + row)
        pull += row * count
        for start in range(0, count, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = k < count
            a = tl.load(ls + k, mask=inside, other=0.0) * student_sharpness
            z = tl.load(lt + k, mask=inside, other=0.0) * teacher_sharpness
            z += tl.load(offset + k, mask=inside, other=0.0)
            tl.store(pull + k, (w * (tl.exp(a - a_log) - tl.exp(z - z_log))).to(pull.dtype.element_ty), mask=inside)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, accumulated and returned in fp32 (fp64 for fp64) for inputs of any dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _check(student, teacher, student_prototypes, teacher_prototypes, centering, center, weight, chunk) -> None:
    """Raise ValueError unless the arguments are those that `prototype_loss` documents."""
    # Check features and prototypes.
    size, count = student.shape[:1], student_prototypes.shape[:1]
    if student.dim() != 2 or teacher.shape != student.shape or not student.numel():
        shapes = f"{tuple(student.shape)}, {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher must be (T, k) of one shape, not empty, got {shapes}")
    for name, x in (("student_prototypes", student_prototypes), ("teacher_prototypes", teacher_prototypes)):
        if x.shape != (*count, student.shape[1]) or not x.numel():
            raise ValueError(f"{name} must be (K, k) with k = {student.shape[1]}, got {tuple(x.shape)}")
    if not all(x.is_floating_point() for x in (student, teacher, student_prototypes, teacher_prototypes)):
        raise ValueError("features and prototypes must be floating")
    # Check the options.
    if centering not in CENTERINGS:
        raise ValueError(f"centering={centering!r} is unknown; choose one of {', '.join(CENTERINGS)}")
    if (centering == "ema") != (center is not None):
        raise ValueError(f"center goes with centering='ema' and no other, got centering={centering!r}")
    for name, x, shape in (("center", center, count), ("weight", weight, size)):
        if x is not None and (x.shape != shape or not x.is_floating_point()):
            raise ValueError(f"{name} must be floating, {tuple(shape)}, got {x.dtype} {tuple(x.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")


def _check_temperatures(student: float, teacher: float, centering: str) -> None:
    """Raise ValueError unless both temperatures are in range."""
    lowest = 0.025 if centering == "sinkhorn" else 0.0
    if not student > 0 or not teacher > 0 or teacher < lowest:
        raise ValueError(f"temperatures must be positive, with sinkhorn the teacher's >= 0.025: {student}, {teacher}")
