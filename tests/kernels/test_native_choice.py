"""Which implementation of the optimizer runs: the compiled one, or PyTorch where that is missing, unfit or unwanted."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from test_adamw_ema_native import bits, needs_cpp, needs_gpu, run

from fastdit.kernels import AdamWEMA, _native
from fastdit.kernels._native import describe_native
from fastdit.kernels.adamw_ema import describe_optimizer


@needs_cpp
def test_what_the_kernels_do_not_take_goes_to_torch():
    """Other dtypes and strides are updated too, and refused only where the kernels were ordered."""
    normal = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))  # bf16 near zero has few digits of 0.1
    for start in (normal[0].double(), normal[1].reshape(4, 6).t(), normal[2].bfloat16()):
        param = torch.nn.Parameter(start.clone())
        param.grad = torch.ones_like(param)
        optimizer = AdamWEMA([param], lr=0.1, emas={"ema": 0.7})
        optimizer.step()
        torch.testing.assert_close(param.detach(), start - 0.1)
        torch.testing.assert_close(optimizer.state[param]["ema"], start - 0.03)
        with pytest.raises(ValueError, match="implementation='cpp' cannot run here: it takes contiguous"):
            AdamWEMA([param], implementation="cpp").step()
    with pytest.raises(ValueError, match="AdamWEMA has auto, cpp and reference"):
        AdamWEMA([torch.zeros(1)], implementation="triton")


@needs_cpp
def test_environment_chooses(monkeypatch):
    results = {}
    for wish in ("auto", "cpp", "triton", "reference"):
        monkeypatch.setenv("FASTDIT_KERNELS", wish)
        results[wish] = bits(run(torch.device("cpu"))[0][0])
        built = "optimizer: csrc (cpu)"
        assert describe_optimizer("cpu").startswith(built if wish in ("auto", "cpp") else "optimizer: torch (cpu)")
    assert np.array_equal(results["auto"], results["cpp"])
    assert np.array_equal(results["triton"], results["reference"])
    assert not np.array_equal(results["cpp"], results["reference"])
    assert describe_native("cpu") == "C++ kernels: built"
    monkeypatch.setenv("FASTDIT_KERNELS", "fastest")
    with pytest.raises(ValueError, match="FASTDIT_KERNELS='fastest' is unknown"):
        run(torch.device("cpu"))


@pytest.fixture
def reloaded(monkeypatch):
    """`load_native` that looks again."""
    for load in (_native._load_cpp, _native._load_cuda):
        load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for load in (_native._load_cpp, _native._load_cuda):
        load.cache_clear()


def test_without_the_extension(reloaded):
    """Training goes on in PyTorch, and the reason is told."""
    reloaded.setattr(_native, "_report", lambda name: {"problem": "c++ returned 1"})
    reloaded.delenv("FASTDIT_KERNELS", raising=False)
    assert describe_native("cpu") == "C++ kernels: not built (c++ returned 1)"
    assert describe_native("cuda") == "CUDA kernels: not built (c++ returned 1)"
    assert describe_optimizer("cpu") == "optimizer: torch (cpu); C++ kernels: not built (c++ returned 1)"
    assert np.array_equal(
        bits(run(torch.device("cpu"))[0][0]), bits(run(torch.device("cpu"), implementation="reference")[0][0])
    )
    with pytest.raises(ValueError, match=r"cannot run here: c\+\+ returned 1"):
        run(torch.device("cpu"), implementation="cpp")


def test_built_for_another_machine(reloaded, tmp_path):
    """An instruction this CPU lacks, a module that is gone, a library that is none: a reason, never a crash."""
    reloaded.setattr(_native, "_report", lambda name: {"needs": ["avx", "avx1024f"]})
    reloaded.setattr(_native, "_cpu_features", lambda: {"avx", "avx2"})
    assert "this one lacks avx1024f; reinstall fastdit here" in describe_native("cpu")
    _native._load_cpp.cache_clear()
    reloaded.setattr(_native, "_report", lambda name: {})
    reloaded.setitem(sys.modules, "fastdit._C", None)
    assert "reinstall fastdit" in describe_native("cpu")
    broken = tmp_path / "_cuda.so"
    broken.write_bytes(b"not a library")
    reloaded.setattr(_native.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": str(broken)}))
    assert "reinstall fastdit" in describe_native("cuda")


@needs_cpp
def test_no_second_openmp_runtime():
    """A second one would bring a second pool of threads that fights torch's."""
    code = """
import torch
maps = lambda: {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line}
before = maps()
from fastdit import _C
new = maps() - before
assert before and not new, (before, new)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@needs_gpu
def test_gpu_has_the_cuda_library():
    """On a machine with a GPU and nvcc, the install has built it."""
    assert describe_native("cuda") == "CUDA kernels: built"
