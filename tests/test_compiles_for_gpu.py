"""The Triton kernels as the GPU's compiler sees them, on machines without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "adaln_triton": {"_adaln_forward_kernel", "_adaln_backward_kernel", "_adaln_sum_kernel"},
    "linear": {"_gelu_kernel", "_gelu_backward_kernel"},
    "denoise": {"_denoise_forward_kernel", "_denoise_backward_kernel"},
    "prototypes": {"_prototype_rows_kernel"},
    "rotary": {"_norm_rotate_forward_kernel", "_norm_rotate_backward_kernel"},
    "structure_triton": {
        "_structure_moments_kernel",
        "_structure_sums_kernel",
        "_structure_coefficients_kernel",
        "_structure_pull_kernel",
    },
    "tokens": {"_scatter_tokens_kernel", "_scatter_tokens_backward_kernel"},
}


@pytest.fixture(scope="module")
def compiled():
    program = Path(__file__).with_name("compile_for_gpu.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_every_kernel_compiles_and_no_register_spills(compiled):
    for module, names in KERNELS.items():
        assert {line[1] for line in compiled if line[0] == module} == names
    assert {line[-1] for line in compiled} == {"0"}
