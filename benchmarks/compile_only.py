"""Compile Triton kernels for an H100 on a machine without a GPU.

Inside `compile_only`, code that launches kernels runs with CPU tensors. Each launch compiles its kernel for compute
capability 9.0 and runs nothing, so the results hold no meaning. Triton must be imported without TRITON_INTERPRET=1,
which would replace the compiler by the interpreter.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastdit.errors import UserError

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class _H100:
    """The part of a Triton driver that the compiler asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(on_launch: Callable[[str, CompiledKernel], None]) -> Iterator[None]:
    """Turn each launch of a Triton kernel into a compilation, and call `on_launch("module.kernel", compiled)`.

    The change holds for the whole process. Raises UserError when Triton was imported for its interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1: Triton compiles nothing; unset the variable")
    launch, empty, active, environment = JITFunction.run, torch.empty, driver._active, dict(os.environ)

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        on_launch(f"{self.__module__.rpartition('.')[2]}.{self.__name__}", kernel)
        return kernel

    def zeros(*args, **options):
        """Return zeros in place of memory that no kernel fills, because some of it is used as an index."""
        with _disable_current_modes():
            return torch.zeros(*args, **options)

    # `fastdit.kernels` sends CPU tensors to Triton when it sees the interpreter's variable.
    os.environ.update(TRITON_INTERPRET="1", FASTDIT_KERNELS="triton")
    JITFunction.run, torch.empty = run, zeros
    driver.set_active(_H100())
    try:
        yield
    finally:
        JITFunction.run, torch.empty = launch, empty
        driver._active = active  # `reset_active` would look for a real GPU's driver
        os.environ.clear()
        os.environ.update(environment)


class Resources(NamedTuple):
    """Hold what one thread or block of a compiled kernel needs."""

    registers: int
    spilled: int  # bytes of local memory a thread, which hold spilled registers
    shared: int  # bytes of shared memory a block that the code declares


def resources(kernel: CompiledKernel) -> Resources:
    """Return the resource usage that the kernel's sm_90 binary declares."""
    usage = _inspect("cuobjdump", "-res-usage", kernel)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage).groups())
    return Resources(registers, stack + local, kernel.metadata.shared)


def machine_code(kernel: CompiledKernel) -> str:
    """Return the kernel's sm_90 assembly."""
    return _inspect("nvdisasm", "-c", kernel)


def _inspect(tool: str, flag: str, kernel: CompiledKernel) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [TOOLS / tool, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
