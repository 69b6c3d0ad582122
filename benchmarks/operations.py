"""Define what is measured: each operation of fastdit.kernels, at a model size's shapes, beside PyTorch's own.

Bytes are counted from the algorithm, not from an implementation: forward reads every input and writes every output
once; backward reads the outputs' gradients and what `Case.reads` names, and writes the gradients `Case.writes` names.
Who moves more bytes than that is slower, and shows a lower rate.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import as_tuple, nbytes
from torch import Tensor

from fastdit import kernels
from fastdit.kernels._dispatch import choose
from fastdit.models import SIZES


class Setting(NamedTuple):
    """Shapes of one model size on one device. Activations have `dtype`."""

    size: str
    batch: int
    tokens: int
    width: int
    heads: int
    depth: int
    prototypes: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, size: str, batch: int, device: torch.device, quick: bool) -> "Setting":
        """Return the shapes of DiT-`size` with 256 tokens. `quick`: few tokens and one block."""
        model, gpu = SIZES[size], device.type == "cuda"
        dtype = torch.bfloat16 if gpu else torch.float32
        shape = (16, model["width"], model["heads"], 1, 64) if quick else (256, *map(model.get, _DIMENSIONS), 0)
        tokens, width, heads, depth, prototypes = shape
        return cls(size, batch, tokens, width, heads, depth, prototypes or (8192 if gpu else 1024), device, dtype)


_DIMENSIONS = ("width", "heads", "depth")


class Case(NamedTuple):
    """A differentiable function to measure.

    `make(randn)` returns one set of inputs; the first `leaves` of them get gradients.
    """

    name: str
    shape: str
    make: Callable[[Callable], tuple[Tensor, ...]]
    leaves: int
    ours: Callable
    eager: Callable
    ran: str  # which implementation serves `ours`
    reads: Callable[[tuple, tuple], tuple]  # of (inputs, outputs): what backward reads besides outputs' gradients
    writes: Callable[[tuple], tuple] = lambda leaves: leaves  # of the leaves: whose gradients are written

    def bytes(self, inputs: tuple[Tensor, ...]) -> dict[str, int]:
        """Bytes moved, by phase."""
        with torch.no_grad():
            outputs = as_tuple(self.eager(*inputs))
        forward = nbytes(inputs) + nbytes(outputs)
        backward = nbytes(outputs) + nbytes(self.reads(inputs, outputs)) + nbytes(self.writes(inputs[: self.leaves]))
        return {"forward": forward, "backward": backward, "both": forward + backward}


class Steps(NamedTuple):
    """Optimizer steps to measure. A contender is its name, what runs, and the step."""

    name: str
    shape: str
    contenders: Callable[[bool, bool], Iterator[tuple[str, str, Callable[[], object]]]]  # of: eager too? compile too?
    bytes: int


def adaln(s: Setting) -> list[Case]:
    """The residual stream between two GEMMs. Each site is one call."""
    shape = _shape(s.batch, s.tokens, s.width, dtype=s.dtype)

    def make(streams, vectors, randn):
        return (
            *(randn(s.batch, s.tokens, s.width) for _ in range(streams)),
            *(0.5 * randn(s.batch, s.width) for _ in range(vectors)),
        )

    def case(function, streams, vectors, **counted):
        slow = partial(function, implementation="reference")
        return Case(
            function.__name__,
            shape,
            partial(make, streams, vectors),
            streams + vectors,
            function,
            slow,
            _served(s, cpp=True, auto_cpp=function is not kernels.gate_residual),
            **counted,
        )

    return [
        case(kernels.modulate, 1, 2, reads=lambda i, o: i[:2]),  # x, scale
        case(kernels.gate_residual_modulate, 2, 3, reads=lambda i, o: (o[0], *i[1:4])),  # r, y, gate, scale
        # y and gate; the gradient of x is that of r itself
        case(kernels.gate_residual, 2, 1, reads=lambda i, o: i[1:], writes=lambda leaves: leaves[1:]),
    ]


def linear(s: Setting) -> list[Case]:
    """gate_residual_modulate and the linear layer to q, k and v after it. Bound by arithmetic."""
    width = s.width

    def make(randn):
        vectors = (0.5 * randn(s.batch, width) for _ in range(3))
        weight = randn(3 * width, width) / width**0.5
        return *(randn(s.batch, s.tokens, width) for _ in range(2)), *vectors, weight, randn(3 * width)

    slow = partial(kernels.modulated_linear, implementation="reference")
    shape = _shape(s.batch, s.tokens, width, dtype=s.dtype) + f" -> {3 * width}"
    ran = _served(s, cpp=True)
    reads = lambda i, o: (o[0], *i[1:4], i[5])  # noqa: E731 - r, y, gate, scale, weight
    return [Case("modulated_linear", shape, make, 7, kernels.modulated_linear, slow, ran, reads)]


def gelu(s: Setting) -> list[Case]:
    """The second half of an MLP. Bound by arithmetic."""
    hidden = 4 * s.width

    def make(randn):
        return randn(s.batch, s.tokens, hidden), randn(s.width, hidden) / hidden**0.5, randn(s.width)

    slow = partial(kernels.gelu_linear, implementation="reference")
    shape = _shape(s.batch, s.tokens, hidden, dtype=s.dtype) + f" -> {s.width}"
    return [Case("gelu_linear", shape, make, 3, kernels.gelu_linear, slow, _served(s), lambda i, o: i[:2])]


def structure(s: Setting) -> list[Case]:
    """Pairs of a global batch of pooled features: B^2 d differences of B d numbers. Bound by arithmetic."""
    pairs = min(32 * s.batch, 1024) if s.device.type == "cuda" else 16 * s.batch

    def loss(real, fake, **options):
        return kernels.structure_loss(real, fake, **options).loss

    def make(randn):
        return tuple(randn(pairs, s.width, dtype=torch.float32) for _ in range(2))

    slow = partial(loss, implementation="reference")
    shape = _shape(pairs, s.width, dtype=torch.float32)
    return [Case("structure_loss", shape, make, 2, loss, slow, _served(s), lambda i, o: i)]


def prototypes(s: Setting) -> list[Case]:
    """Features of all tokens against all prototypes; PyTorch's is the textbook's, whole logits. Bound by arithmetic.

    fastdit's forms the gradient on the way forward: look at both phases together.
    """
    bottleneck, sharpness = 256, (0.1, 0.04)
    names = ("student_temperature", "teacher_temperature")

    def make(randn):
        student, teacher = (randn(s.batch * s.tokens, bottleneck) for _ in range(2))
        own, others = (randn(s.prototypes, bottleneck) for _ in range(2))
        return student, own, teacher, others, 0.1 * randn(s.prototypes, dtype=torch.float32)

    def loss(student, own, teacher, others, center):
        options = dict(zip(names, sharpness)) | {"center": center}
        return kernels.prototype_loss(student, teacher, own, others, **options).loss

    def textbook(student, own, teacher, others, center):
        student, own, teacher, others = (F.normalize(x, dim=1) for x in (student, own, teacher, others))
        target = (((teacher @ others.t()).float() - center) / sharpness[1]).softmax(1)
        return -(target * ((student @ own.t()).float() / sharpness[0]).log_softmax(1)).sum(1).mean()

    shape = _shape(s.batch * s.tokens, bottleneck, dtype=s.dtype) + f", {s.prototypes} prototypes"
    return [Case("prototype_loss", shape, make, 2, loss, textbook, _served(s), lambda i, o: i)]


def tokens(s: Setting) -> list[Case]:
    """Visible tokens, four of five, back among mask tokens."""
    keep = s.tokens * 4 // 5

    def make(randn):
        generator = torch.Generator(s.device).manual_seed(0)
        ids = kernels.visible_tokens(s.batch, s.tokens, keep, generator=generator, device=s.device)
        return randn(s.batch, keep, s.width), randn(1, 1, s.width), ids

    def scatter(x, mask, ids, **options):
        return kernels.scatter_tokens(x, ids, mask.expand(s.batch, s.tokens, s.width), **options)

    slow = partial(scatter, implementation="reference")
    shape = _shape(s.batch, keep, s.width, dtype=s.dtype) + f" into {s.tokens}"
    return [Case("scatter_tokens", shape, make, 2, scatter, slow, _served(s), lambda i, o: i[2:])]


def denoise(s: Setting) -> list[Case]:
    """Weighted loss and clean estimate of a latent (4, 32, 32), the network's output in the activations' dtype."""
    side = 2 * int(s.tokens**0.5)

    def make(randn):
        x0, eps = (randn(s.batch, 4, side, side, dtype=torch.float32) for _ in range(2))
        coefficients = (randn(s.batch, dtype=torch.float32).abs() for _ in range(6))
        return randn(s.batch, 4, side, side), x0, eps, *coefficients

    def loss(out, x0, eps, *coefficients, **options):
        return kernels.affine_denoise_loss(out, x0, eps, kernels.DenoiseCoefficients(*coefficients), **options)

    slow = partial(loss, implementation="reference")
    shape = _shape(s.batch, 4, side, side, dtype=s.dtype)
    return [Case("affine_denoise_loss", shape, make, 1, loss, slow, _served(s), lambda i, o: i)]


def philox(s: Setting) -> list[Steps]:
    """The noise of latents (4, 32, 32) by position, beside torch's generator. Bytes: each number is written once."""
    side = 2 * int(s.tokens**0.5)
    numel = 4 * side * side

    def contenders(eager, compiling):
        place = {"seed": 0, "position": 0, "draw": 0, "device": s.device}
        yield "fastdit", _served(s, cpp=True), lambda: kernels.philox_normal(s.batch, numel, **place)
        if eager:
            generator = torch.Generator(s.device).manual_seed(0)
            yield "randn", "torch", lambda: torch.randn(s.batch, numel, generator=generator, device=s.device)
        if compiling:
            reference = partial(kernels.philox_normal, s.batch, numel, **place, implementation="reference")
            yield "compile", "torch.compile", torch.compile(reference, dynamic=False)

    shape = _shape(s.batch, 4, side, side, dtype=torch.float32)
    return [Steps("philox_normal", shape, contenders, 4 * s.batch * numel)]


def rotary(s: Setting) -> list[Case]:
    """RMS norm with weights and 2-D rotation of q and k, views of a fused qkv."""
    make, shape, rope = _heads(s)

    def with_weights(randn):
        return *make(randn)[:2], *(randn(s.width // s.heads) for _ in range(2))

    def ours(q, k, q_weight, k_weight, **options):
        return kernels.norm_rotate(q, k, norm=(q_weight, k_weight), rope=rope, **options)

    slow = partial(ours, implementation="reference")
    return [Case("norm_rotate", shape, with_weights, 4, ours, slow, _served(s), lambda i, o: (*i, rope))]


def attention(s: Setting) -> list[Case]:
    """Against torch's scaled_dot_product_attention with the kernel torch itself chooses. Bound by arithmetic."""
    make, shape, rope = _heads(s)
    ran = kernels.describe_attention("auto", s.device, s.dtype, s.width // s.heads).removeprefix("attention: ")

    def plain(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def normed(q, k, v):
        return plain(*kernels.norm_rotate(q, k, norm=True, rope=rope, implementation="reference"), v)

    ours = partial(kernels.attention, qk_norm=True, rope=rope)
    return [
        Case("attention", shape, make, 3, kernels.attention, plain, ran, lambda i, o: (*i, *o)),
        Case(
            "attention, norm + rope",
            shape,
            make,
            3,
            ours,
            normed,
            f"{_served(s)}, {ran}",
            lambda i, o: (*i, *o, rope),
        ),
    ]


def optimizer(s: Setting) -> list[Steps]:
    """AdamW and one average of a model's fp32 parameters, as one flat partition (ZeRO's) and as a list of tensors.

    Bytes: weight, gradient, two moments and average read, all but the gradient written: 36 for each parameter. The
    look for infinite gradients that fastdit's step begins with reads 4 more, which no other contender's does.
    """
    w = s.width
    block = [(6 * w, w), (6 * w,), (3 * w, w), (3 * w,), (w, w), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    shapes = block * s.depth
    count = sum(torch.Size(shape).numel() for shape in shapes)
    text = f"{count / 1e6:.1f} M parameters"
    ran = kernels.describe_optimizer(s.device).removeprefix("optimizer: ").split(";")[0]

    def contenders(shapes, eager, compiling):
        generator = torch.Generator(s.device).manual_seed(0)
        params = [torch.randn(shape, generator=generator, device=s.device).requires_grad_() for shape in shapes]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, device=s.device)
        yield "fastdit", ran, kernels.AdamWEMA(params, lr=1e-4, emas={"ema": 0.9999}).step
        for kind in ("for-loop", "foreach", "fused") if eager else ():
            yield f"AdamW {kind}", "torch", _adamw(params, kind)
        if compiling:
            yield "compile", "torch.compile", torch.compile(_adamw(params, "foreach"), dynamic=False)

    return [
        Steps("AdamW + average, flat", text, partial(contenders, [(count,)]), 36 * count),
        Steps("AdamW + average, list", f"{text}, {len(shapes)} tensors", partial(contenders, shapes), 36 * count),
    ]


def _adamw(params: list[Tensor], kind: str) -> Callable[[], None]:
    """torch.optim.AdamW and torch._foreach_lerp_, with states of their own."""
    stepper = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, foreach=kind == "foreach", fused=kind == "fused")
    averages = [param.detach().clone() for param in params]

    def step():
        stepper.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1e-4)

    return step


OPERATIONS: dict[str, Callable[[Setting], list[Case] | list[Steps]]] = {
    function.__name__: function
    for function in (
        adaln,
        optimizer,
        linear,
        gelu,
        structure,
        prototypes,
        tokens,
        denoise,
        philox,
        rotary,
        attention,
    )
}
UNSIZED = ("denoise", "philox")  # latents are the same at every size: measured at the first only


def _heads(s: Setting) -> tuple[Callable, str, Tensor]:
    """(maker of q, k, v, their shape, a rope table)."""
    dim, side = s.width // s.heads, int(s.tokens**0.5)

    def make(randn):
        return randn(s.batch, s.tokens, 3, s.heads, dim).unbind(2)

    rope = kernels.rope_table((side, side), dim, device=s.device)
    return make, _shape(s.batch, s.tokens, s.heads, dim, dtype=s.dtype), rope


def _served(s: Setting, cpp: bool = False, auto_cpp: bool = True) -> str:
    return choose(s.device, cpp=cpp, auto_cpp=auto_cpp)


def _shape(*sizes: int, dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, sizes))} {str(dtype).removeprefix('torch.')}"
