"""Compile Triton kernels as an H100 would see them, without a GPU: a program for tests/test_compiles_for_gpu.py.

The interpreter runs code that the compiler refuses. Here public functions are called with CPU tensors, forward and
backward, while each launch only compiles, for compute capability 9.0; what they return is meaningless. Prints one
line a compiled kernel: its module and name, registers a thread, and bytes of local memory, which are spilled registers.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastdit.kernels import (
    DenoiseCoefficients,
    affine_denoise_loss,
    gelu_linear,
    modulated_linear,
    norm_rotate,
    prototype_loss,
    rope_table,
    scatter_tokens,
    structure_loss,
)

os.environ["TRITON_INTERPRET"] = "1"  # after triton was imported: only `choose` sees it, and lets CPU tensors pass
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class H100:
    """The part of a driver that compiling needs."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    if kernel.hash not in seen:
        seen.add(kernel.hash)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage.stdout).groups()
        print(self.__module__.rpartition(".")[2], self.__name__, registers, int(stack) + int(local))
    return kernel


seen: set[str] = set()
launch = JITFunction.run
JITFunction.run = compile_only
torch.empty = torch.zeros  # what no kernel fills must still be an index
driver.set_active(H100())


def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype).requires_grad_()


def adaln():
    """A block's two sites, the second's backward from x, at the widths of S, B and XL; and visible tokens only."""
    for width in (384, 768, 1152):
        x, y, weight = leaf(2, 40, width), leaf(2, 40, width), leaf(8, width)
        gate, scale, shift = leaf(2, 3 * width).unflatten(1, (3, width)).unbind(1)
        for choices in ({}, {"keep_x": True}, {"rows": torch.arange(9).expand(2, 9)}):
            r, out = modulated_linear(x, y, gate, scale, shift, weight, implementation="triton", **choices)
            (r.sum() + out.sum()).backward()


def gelu():
    gelu_linear(leaf(2, 40, 1536), leaf(384, 1536), implementation="triton").sum().backward()


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


def rotary():
    for heads, dim in ((6, 64), (16, 72)):
        q, k, _ = leaf(2, 4, 3, heads, dim).unbind(2)
        rope, ids = rope_table((2, 2), dim), torch.zeros(2, 4, dtype=torch.int64)
        weights = leaf(dim, dtype=torch.float32), leaf(dim, dtype=torch.float32)
        for choices in ({"norm": weights, "rope": rope, "ids": ids}, {"rope": rope}):
            sum(x.sum() for x in norm_rotate(q, k, implementation="triton", **choices)).backward()


if __name__ == "__main__":
    for operation in (adaln, gelu, structure, prototypes, tokens, denoise, rotary):
        operation()
