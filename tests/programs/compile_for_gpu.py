"""Compile Triton kernels as an H100 would see them, without a GPU: a program for test_compiles_for_gpu.py.

The interpreter runs code that the compiler refuses. Here public functions are called with CPU tensors, forward and
backward, while each launch only compiles (benchmarks/compile_only.py). The program prints one line for each compiled
kernel: the function below that calls it, its module and name, the registers of a thread, the bytes of a block's shared
memory, and the bytes of local memory, which are spilled registers.
"""

import itertools
import sys
from pathlib import Path

import torch

from fastdit.kernels import (
    DenoiseCoefficients,
    affine_denoise_loss,
    fp8_linear,
    gelu_linear,
    modulated_linear,
    norm_rotate,
    philox_bits,
    philox_integers,
    philox_normal,
    philox_uniform,
    prototype_loss,
    rope_table,
    scatter_tokens,
    split_qkv,
    structure_loss,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from compile_only import compile_only, resources

seen: set[str] = set()


def print_once(name, kernel):
    if kernel.hash not in seen:
        seen.add(kernel.hash)
        needs = resources(kernel)
        print(operation.__name__, *name.split("."), needs.registers, needs.shared, needs.spilled)


def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype).requires_grad_()


def adaln():
    """A block's two sites, the second's backward from x, at the widths of S, B and XL; and visible tokens only.

    The stream is fp32 or bf16.
    """
    for width, stream in itertools.product((384, 768, 1152), (torch.float32, torch.bfloat16)):
        x, y, weight = leaf(2, 40, width, dtype=stream), leaf(2, 40, width), leaf(8, width)
        gate, scale, shift = leaf(2, 3 * width).unflatten(1, (3, width)).unbind(1)
        rows, y_bias = torch.arange(9).expand(2, 9), leaf(width)
        for choices in (
            {}, {"keep_x": True}, {"rows": rows},
            {"y_bias": y_bias}, {"y_bias": y_bias, "keep_x": True}, {"y_bias": y_bias, "rows": rows},
        ):  # fmt: skip
            r, out = modulated_linear(x, y, gate, scale, shift, weight, implementation="triton", **choices)
            (r.sum() + out.sum()).backward()


def wide_adaln():
    """fp32 up to the largest width, with vectors per sample and per token: the most that a program holds of a row."""
    for width in (2048, 4104, 8192):
        shape, y_bias = (2, 12, width), leaf(width, dtype=torch.float32)
        x, y, weight = leaf(*shape, dtype=torch.float32), leaf(*shape, dtype=torch.float32), leaf(8, width)
        for vectors in ((2, width), shape):
            gate, scale, shift = (leaf(*vectors, dtype=torch.float32) for _ in range(3))
            r, out = modulated_linear(x, y, gate, scale, shift, weight.float(), y_bias=y_bias, implementation="triton")
            (r.sum() + out.sum()).backward()


def gelu():
    for bias in (None, leaf(1536), leaf(1536, dtype=torch.float32)):
        out = gelu_linear(leaf(2, 40, 1536), leaf(384, 1536), input_bias=bias, implementation="triton")
        out.sum().backward()


def qkv():
    """The gradients as backends return them: a token's heads next to each other, and a head's tokens."""
    for heads, dim in ((6, 64), (16, 72)):
        q, k, v = split_qkv(leaf(2, 40, 3 * heads * dim), heads, leaf(3 * heads * dim), implementation="triton")
        together = torch.randn(2, 40, heads, dim).bfloat16()
        apart = torch.randn(2, heads, 40, dim).bfloat16().transpose(1, 2)
        for gradient in (together, apart):
            torch.autograd.backward((q, k, v), [gradient] * 3, retain_graph=True)


def fp8():
    """A block's four layers at the widths of S, B and XL, and visible tokens only; all gradients."""
    for width in (384, 768, 1152):
        x, y, weight, weight2 = leaf(2, 40, width), leaf(2, 40, width), leaf(4 * width, width), leaf(width, 4 * width)
        gate, scale, shift = leaf(2, 3 * width).unflatten(1, (3, width)).unbind(1)
        for choices in ({}, {"rows": torch.arange(9).expand(2, 9)}):
            r, u = modulated_linear(x, y, gate, scale, shift, weight, implementation="triton", fp8=True, **choices)
            out = fp8_linear(gelu_linear(u, weight2, implementation="triton", fp8=True), weight)
            (r.sum() + out.sum()).backward()


def structure():
    for distance, penalty in (("euclidean", "l2"), ("cosine", "huber")):
        f, g = leaf(48, 32), leaf(48, 32)
        structure_loss(
            f, g, torch.ones(48), distance=distance, penalty=penalty, implementation="triton"
        ).loss.backward()


def prototypes():
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = leaf(16, 32, dtype=dtype), leaf(16, 32, dtype=dtype)
        prototypes, center = leaf(8192, 32, dtype=torch.float32), torch.zeros(8192)
        temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.04}
        inputs = (student, teacher, prototypes, prototypes.detach())
        prototype_loss(*inputs, center=center, implementation="triton", **temperatures).loss.backward()


def tokens():
    for width in (72, 1152):
        x, base = leaf(2, 3, width), leaf(2, 4, width)
        ids = torch.tensor([[0, 1, 2], [1, 2, 3]])
        scatter_tokens(x, ids, base, implementation="triton").sum().backward()
        scatter_tokens(x, ids, base.detach()[:, :1].expand(2, 4, width), implementation="triton").sum().backward()


def denoise():
    coefficients = DenoiseCoefficients(*torch.ones(6, 2))
    for dtype in (torch.float32, torch.bfloat16):
        out, x0, eps = leaf(2, 4, 32, 32, dtype=dtype), torch.ones(2, 4, 32, 32), torch.ones(2, 4, 32, 32)
        loss, clean = affine_denoise_loss(out, x0, eps, coefficients, implementation="triton")
        (loss.sum() + clean.sum()).backward()
        loss, _ = affine_denoise_loss(out, x0, eps, coefficients, implementation="triton")
        loss.sum().backward()


def philox():
    """A number for each sample, and the noise of a latent; every kind of number."""
    place = {"seed": 2**64 - 1, "position": 2**40, "draw": 7, "device": "cpu", "implementation": "triton"}
    for numel in (1, 4 * 32 * 32):
        for numbers in (philox_bits, philox_uniform, philox_normal):
            numbers(2, numel, **place)
        philox_integers(1000, 2, numel, **place)


def rotary():
    for heads, dim in ((6, 64), (16, 72)):
        q, k, _ = leaf(2, 4, 3, heads, dim).unbind(2)
        rope, ids = rope_table((2, 2), dim), torch.zeros(2, 4, dtype=torch.int64)
        weights = leaf(dim, dtype=torch.float32), leaf(dim, dtype=torch.float32)
        for choices in ({"norm": weights, "rope": rope, "ids": ids}, {"rope": rope}):
            sum(x.sum() for x in norm_rotate(q, k, implementation="triton", **choices)).backward()


if __name__ == "__main__":
    with compile_only(print_once):
        for operation in (adaln, wide_adaln, gelu, qkv, fp8, structure, prototypes, tokens, denoise, philox, rotary):
            operation()
