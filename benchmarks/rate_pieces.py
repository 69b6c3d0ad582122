"""Define what `rates.py` measures: the pieces of a DiT training step, each at the shapes of a model size.

A piece is one call: a GEMM, attention, one kernel of fastdit, or one PyTorch operator. Bytes are counted from the
algorithm: every input is read once and every output is written once. In the comments a unit is the size of the
residual stream, batch x tokens x width numbers of 2 bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import operations
import torch
import torch.nn.functional as F
from operations import Setting
from torch import Tensor

from fastdit import kernels
from fastdit.kernels.adaln import EPS, adaln, adaln_backward
from fastdit.kernels.adamw_ema import adamw_ema_, describe_optimizer, squared_norm
from fastdit.kernels.linear import gelu, gelu_backward
from fastdit.kernels.packed import pack_gradients
from fastdit.models import SIZES

Run = Callable[[], object]
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
BACKENDS = ("cudnn", "flash", "efficient", "sdpa")  # of fastdit.kernels.attention; flash_attn only where installed
FORWARD_BACKWARD = 3.5  # FLOPs of both passes of attention over those of the forward pass: 7 products instead of 2


@dataclass(frozen=True)
class Piece:
    """One call to time.

    Args:
        operation: what is called; with size and batch it names the piece.
        make: allocate one set of inputs and return a function that makes the call with them.
        bytes: what one call reads and writes.
        flops: of its matrix products. Its rate is in FLOP/s then, else in bytes per second.
        size, batch: of the model whose shapes it has; None where they do not matter.
        profiled: find out which kernels ran.
        ran: which implementation serves the call, where the profiler does not tell.
    """

    operation: str
    make: Callable[[], Run]
    bytes: int
    flops: float = 0.0
    size: str | None = None
    batch: int | None = None
    profiled: bool = False
    ran: str | None = None

    @property
    def name(self) -> str:
        """Return a name such as "XL 256 gemm qkv forward bf16"; the batch is the 256."""
        return " ".join(str(part) for part in (self.size, self.batch, self.operation) if part is not None)


@dataclass(frozen=True)
class Scale:
    """How large the pieces are that do not depend on a model size, and the tokens of an image."""

    tokens: int
    copy: int  # numbers of the copy that the other rates are compared with
    square: int  # rows and columns of the square GEMM
    parameters: int  # of the flat optimizer partition
    pairs: int  # images whose pairwise distances the structure loss takes
    features: int  # of each of them
    prototypes: int


SCALES = {
    "cuda": Scale(256, 1 << 29, 8192, 675_000_000, 1024, 512, 8192),
    "cpu": Scale(4, 1 << 16, 64, 1000, 4, 8, 32),
}
# Width and heads of the dry run on a CPU: small, with the head dims of the real sizes.
TINY = {"S": (128, 2), "B": (192, 3), "XL": (144, 2)}


def setting_of(size: str, batch: int, device: torch.device) -> Setting:
    """Return the shapes of DiT-`size` on a GPU, and tiny ones on a CPU. Activations are bf16 on both."""
    scale, model = SCALES[device.type], SIZES[size]
    width, heads, depth = model["width"], model["heads"], model["depth"]
    if device.type == "cpu":
        width, heads, depth = *TINY[size], 1
    return Setting(size, batch, scale.tokens, width, heads, depth, scale.prototypes, device, torch.bfloat16)


# Ceilings


def copy(device: torch.device) -> Piece:
    """A copy between buffers much larger than the caches."""
    numbers = SCALES[device.type].copy

    def make() -> Run:
        source = torch.randn(numbers, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Piece("copy", make, 8 * numbers)


def square_gemm(device: torch.device) -> Piece:
    """A large square bf16 GEMM of random numbers: their bits decide the power that a GPU draws, and so its clock."""
    n = SCALES[device.type].square

    def make() -> Run:
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        return lambda: a @ b

    return Piece(f"gemm {n}x{n}x{n} bf16", make, 6 * n * n, 2.0 * n**3, profiled=True)


# GEMMs


def layers(width: int) -> dict[str, tuple[int, int]]:
    """Return the input and output width of a block's linear layers."""
    return {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}


def gemms(s: Setting) -> Iterator[Piece]:
    """Yield a block's GEMMs in bf16, then in fp8 with one scale a tensor and with one scale a row."""
    rows = s.batch * s.tokens
    for suffix, product in (("bf16", _bf16), ("fp8", partial(_fp8, by_row=False)), ("fp8 row-wise", _fp8)):
        itemsize = 2 if suffix == "bf16" else 1
        for layer, (inputs, outputs) in layers(s.width).items():
            # Rows, columns and summed dimension of each product.
            sizes = {
                "forward": (rows, outputs, inputs),
                "dgrad": (rows, inputs, outputs),
                "wgrad": (outputs, inputs, rows),
            }
            for phase, (m, n, k) in sizes.items():
                yield Piece(
                    f"gemm {layer} {phase} {suffix}",
                    partial(product, s.device, phase, m, n, k),
                    itemsize * (m * k + n * k) + 2 * m * n,
                    2.0 * m * n * k,
                    s.size,
                    s.batch,
                    profiled=layer == "qkv",
                )


def _bf16(device: torch.device, phase: str, m: int, n: int, k: int) -> Run:
    """Return the product that a linear layer makes in this phase, its operands laid out as there."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    if phase == "forward":
        x, weight, bias = randn(m, k), randn(n, k), randn(n)
        return lambda: F.linear(x, weight, bias)
    if phase == "dgrad":
        gradient, weight = randn(m, k), randn(k, n)
        return lambda: gradient @ weight
    gradient, x = randn(k, m), randn(k, n)
    return lambda: gradient.t() @ x


def _fp8(device: torch.device, phase: str, m: int, n: int, k: int, by_row: bool = True) -> Run:
    """Return the product in fp8. Its operands have the one layout that the hardware takes, in every phase."""

    def quantized(rows: int) -> tuple[Tensor, Tensor]:
        values = torch.randn(rows, k, device=device)
        largest = values.abs().amax(1, keepdim=True) if by_row else values.abs().amax()
        scale = largest / FP8_MAX
        return (values / scale).to(FP8), scale

    (a, a_scale), (b, b_scale) = quantized(m), quantized(n)
    options = {"scale_a": a_scale, "scale_b": b_scale.t(), "out_dtype": torch.bfloat16}
    if phase == "forward":
        options["bias"] = torch.randn(n, device=device, dtype=torch.bfloat16)
    options["use_fast_accum"] = phase == "forward"
    return lambda: torch._scaled_mm(a, b.t(), **options)


# Attention


def attention(s: Setting) -> Iterator[Piece]:
    """Yield attention by backend: forward, and both passes with the gradients in one qkv tensor or in three tensors."""
    head_dim = s.width // s.heads
    installed = kernels.attention_backends(s.device, s.dtype, head_dim)
    flops, unit = 4.0 * s.batch * s.tokens**2 * s.width, _unit(s)
    for backend in (*BACKENDS, *(["flash_attn"] if "flash_attn" in installed else [])):
        # Forward reads q, k, v and writes the output; backward reads those and a gradient, and writes three.
        for name, make, factor, units in (
            ("forward", _attention_forward, 1.0, 4),
            ("forward+backward, one gradient", partial(_attention_both, stacked=True), FORWARD_BACKWARD, 18),
            ("forward+backward, three gradients", partial(_attention_both, stacked=False), FORWARD_BACKWARD, 12),
        ):
            yield Piece(
                f"attention {backend} {name}",
                partial(make, s, backend),
                units * unit,
                factor * flops,
                s.size,
                s.batch,
                profiled=True,
            )


def _attention_forward(s: Setting, backend: str) -> Run:
    qkv = _randn(s, s.batch, s.tokens, 3, s.heads, s.width // s.heads)
    return lambda: kernels.attention(*qkv.unbind(2), backend=backend)


def _attention_both(s: Setting, backend: str, stacked: bool) -> Run:
    """Return both passes. Stacked: autograd copies the three gradients into the gradient of one qkv tensor."""
    qkv = _randn(s, s.batch, s.tokens, 3, s.heads, s.width // s.heads)
    upstream = _randn(s, s.batch, s.tokens, s.heads, s.width // s.heads)
    leaves = [qkv.requires_grad_()] if stacked else [x.detach().requires_grad_() for x in qkv.unbind(2)]

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            out = kernels.attention(*(leaves[0].unbind(2) if stacked else leaves), backend=backend)
        return torch.autograd.grad(out, leaves, upstream)

    return run


# Kernels of fastdit


def fused_kernels(s: Setting) -> Iterator[Piece]:
    """Yield the kernels that run once or twice a block, and those of masked training."""
    unit, like = _unit(s), {"size": s.size, "batch": s.batch}
    stream = s.batch * s.tokens * s.width * 4
    # Read x and the branch y, write r and h.
    yield Piece("adaLN forward", lambda: _adaln_forward(s), 2 * stream + 2 * unit, **like)
    # Read two gradients, y, and r or x. Write two gradients and h.
    moved = 3 * stream + 4 * unit
    yield Piece("adaLN backward from r", lambda: _adaln_backward(s, from_x=False), moved, **like)
    yield Piece("adaLN backward from x", lambda: _adaln_backward(s, from_x=True), moved, **like)
    # With the bias gradient of the layer that made y: the partial sums are a small part more, and are not counted.
    yield Piece("adaLN backward from r, bias", lambda: _adaln_backward(s, False, bias=True), moved, **like)
    yield Piece("adaLN backward from x, bias", lambda: _adaln_backward(s, True, bias=True), moved, **like)
    yield Piece("GELU forward", lambda: _gelu(s, backward=False), 8 * unit, **like)
    yield Piece("GELU backward", lambda: _gelu(s, backward=True), 16 * unit, **like)
    yield Piece("GELU backward, bias", lambda: _gelu(s, backward=True, bias=True), 16 * unit, **like)
    # Read dq, dk and dv, and write them as one tensor.
    yield Piece("qkv gradient, bias", lambda: _pack(s), 6 * unit, **like)
    (rotary,) = operations.rotary(s)
    yield from _both_phases("norm_rotate", rotary, s, 4 * unit, 6 * unit, like)
    (tokens,) = operations.tokens(s)
    visible = unit * (s.tokens * 4 // 5) // s.tokens
    yield from _both_phases("scatter tokens", tokens, s, visible + unit, visible + unit, like)


def losses(s: Setting) -> Iterator[Piece]:
    """Yield the losses. They do not depend on the model size."""
    scale, like = SCALES[s.device.type], {"batch": s.batch}
    (denoise,) = operations.denoise(s)
    numbers = s.batch * 4 * (2 * int(s.tokens**0.5)) ** 2
    # The network's output is bf16; data, noise and the x0 prediction are fp32.
    yield from _both_phases("denoise loss", denoise, s, 14 * numbers, 16 * numbers, like)

    # Two logits and two gradients, each a product of all features with all prototypes.
    (prototypes,) = operations.prototypes(s)
    rows, bottleneck = s.batch * s.tokens, 256
    flops = 8.0 * rows * s.prototypes * bottleneck
    yield Piece(
        "prototype loss forward+backward",
        lambda: _case(prototypes, s, "both"),
        6 * rows * bottleneck,
        flops,
        profiled=True,
        **like,
    )
    # The docstring of kernels/structure.py counts 6 G operations for 1024 images and 512 features.
    flops = 11.0 * scale.pairs**2 * scale.features
    yield Piece(
        "structure loss forward+backward", lambda: _structure(s, scale), 16 * scale.pairs * scale.features, flops
    )


def _adaln_inputs(s: Setting) -> tuple[Tensor, ...]:
    """Return x in fp32, y, gate, scale and shift, the vectors views of those of the whole network."""
    vectors = (0.5 * _randn(s, s.batch, (6 * s.depth + 2) * s.width)).unflatten(1, (-1, s.width)).unbind(1)
    x, y = (_randn(s, s.batch, s.tokens, s.width) for _ in range(2))
    return x.float(), y, vectors[2], vectors[4], vectors[3]


def _adaln_forward(s: Setting) -> Run:
    inputs = _adaln_inputs(s)
    return lambda: adaln(*inputs, None, EPS, False, True, "triton")


def _adaln_backward(s: Setting, from_x: bool, bias: bool = False) -> Run:
    x, *branch = _adaln_inputs(s)
    r, _, stats = adaln(x, *branch, None, EPS, False, True, "triton")
    dr, dh = _randn(s, *x.shape).float(), _randn(s, *x.shape)
    saved = x if from_x else r, *branch, None, stats, _randn(s, s.width) if bias else None
    return lambda: adaln_backward(dr, dh, *saved, s.tokens, False, from_x, True, "triton")


def _gelu(s: Setting, backward: bool, bias: bool = False) -> Run:
    hidden = _randn(s, s.batch, s.tokens, 4 * s.width)
    if not backward:
        return lambda: gelu(hidden)
    gradient = _randn(s, s.batch, s.tokens, 4 * s.width)
    input_bias = _randn(s, 4 * s.width) if bias else None
    return lambda: gelu_backward(gradient, hidden, input_bias)


def _pack(s: Setting) -> Run:
    gradients = [_randn(s, s.batch, s.tokens, s.heads, s.width // s.heads) for _ in range(3)]
    bias = _randn(s, 3 * s.width)
    return lambda: pack_gradients(*gradients, bias)


def _structure(s: Setting, scale: Scale) -> Run:
    real, fake = (torch.randn(scale.pairs, scale.features, device=s.device).requires_grad_() for _ in range(2))

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss = kernels.structure_loss(real, fake).loss
        return torch.autograd.grad(loss, (real, fake))

    return run


def _both_phases(name: str, case, s: Setting, forward: int, backward: int, like: dict) -> Iterator[Piece]:
    """Yield forward and backward of a case of operations.py, with the bytes that each moves."""
    yield Piece(f"{name} forward", lambda: _case(case, s, "forward"), forward, **like)
    yield Piece(f"{name} backward", lambda: _case(case, s, "backward"), backward, **like)


def _case(case, s: Setting, phase: str) -> Run:
    """Return a phase of a case of operations.py: forward, backward or both."""

    def randn(*shape: int, dtype: torch.dtype = s.dtype) -> Tensor:
        return torch.randn(shape, device=s.device, dtype=dtype)

    inputs = tuple(x.detach().requires_grad_(place < case.leaves) for place, x in enumerate(case.make(randn)))
    leaves = inputs[: case.leaves]

    def forward() -> list[Tensor]:
        with torch.set_grad_enabled(phase != "forward"):
            results = case.ours(*inputs)
        return [x for x in operations.as_tuple(results) if x.requires_grad]

    if phase == "forward":
        return forward
    graph = forward()
    upstream = [torch.randn_like(x) for x in graph]
    if phase == "backward":
        return lambda: torch.autograd.grad(graph, leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, upstream)


# The optimizer's pass, and the copies of DeepSpeed around it


def optimizer(device: torch.device) -> Iterator[Piece]:
    """Yield passes over all parameters of DiT-XL/2 as one flat partition."""
    count = SCALES[device.type].parameters
    ran = describe_optimizer(device).removeprefix("optimizer: ")
    # AdamW and the EMA read weight, gradient, two moments and EMA in fp32, and write all but the gradient.
    # Where they write a bf16 copy of the weights, the gradient is bf16.
    yield Piece("AdamW + EMA", lambda: _adamw(device, count, copies=False), 36 * count, ran=ran)
    yield Piece("AdamW + EMA, bf16 copy", lambda: _adamw(device, count, copies=True), 36 * count, ran=ran)
    yield Piece("squared norm", lambda: _norm(device, count), 4 * count, ran=ran)
    for name, source, target in (
        ("fp32 to bf16", torch.float32, torch.bfloat16),
        ("bf16 to fp32", torch.bfloat16, torch.float32),
        ("bf16 to bf16", torch.bfloat16, torch.bfloat16),
    ):
        moved = (source.itemsize + target.itemsize) * count
        yield Piece(f"copy of parameters, {name}", partial(_copy, device, count, source, target), moved)
    yield Piece("division of bf16 gradients in place", lambda: _divide(device, count), 4 * count)


def _adamw(device: torch.device, count: int, copies: bool) -> Run:
    weight, gradient, moment, square, ema = (torch.randn(count, device=device) for _ in range(5))
    square.square_()
    step, skip = torch.ones((), device=device), torch.zeros((), device=device)
    lists = [weight], [gradient], [moment], [square], [step], [(0.9999, [ema])]
    options = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "skip": skip}
    if copies:
        options["bf16_copies"] = [weight.bfloat16()]
        lists[1][0] = gradient.bfloat16()
    return lambda: adamw_ema_(*lists, **options)


def _norm(device: torch.device, count: int) -> Run:
    gradient = torch.randn(count, device=device)
    return lambda: squared_norm([gradient])


def _copy(device: torch.device, count: int, source: torch.dtype, target: torch.dtype) -> Run:
    values, copied = torch.randn(count, device=device).to(source), torch.empty(count, device=device, dtype=target)
    return lambda: copied.copy_(values)


def _divide(device: torch.device, count: int) -> Run:
    gradient = torch.randn(count, device=device).bfloat16()
    return lambda: gradient.div_(1.0)


# PyTorch's operators that the step uses


def torch_operators(s: Setting) -> Iterator[Piece]:
    """Yield the bias gradients of a block's linear layers, and the copy of dq, dk and dv into one tensor."""
    unit, like = _unit(s), {"size": s.size, "batch": s.batch}
    for layer, (_, outputs) in layers(s.width).items():
        yield Piece(
            f"column sums of the {layer} gradient",
            partial(_column_sums, s, outputs),
            unit * outputs // s.width,
            **like,
        )
    yield Piece("stack of dq, dk and dv", lambda: _stack(s), 6 * unit, **like)


def _column_sums(s: Setting, outputs: int) -> Run:
    gradient = _randn(s, s.batch * s.tokens, outputs)
    return lambda: gradient.sum(0)


def _stack(s: Setting) -> Run:
    gradients = [_randn(s, s.batch, s.tokens, s.heads, s.width // s.heads) for _ in range(3)]
    return lambda: torch.stack(gradients, 2)


def _unit(s: Setting) -> int:
    return s.batch * s.tokens * s.width * s.dtype.itemsize


def _randn(s: Setting, *shape: int) -> Tensor:
    return torch.randn(shape, device=s.device, dtype=s.dtype)
