"""The build of the compiled kernels: what nvcc makes of the CUDA source, and an install where nothing can be built."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")
# One instantiation for each gradient dtype (f: fp32, t: bf16) and number of EMAs.
UPDATES = {f"adamw_ema_updateI{dtype}Li{averages}E" for dtype in "ft" for averages in range(5)}
KERNELS = {"adamw_ema_advance", "squared_norm_chunksIf", "squared_norm_chunksIt", "squared_norm_total"} | UPDATES


def checkout(folder: Path) -> Path:
    """A copy of what an install reads, with nothing built in it, of the data no more than it needs."""
    ignored = shutil.ignore_patterns("*.so", "_native.json", "__pycache__", "*.tar")
    for name in ("fastdit", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def install(source: Path, target: Path, **environment: str) -> str:
    """pip's output. It must succeed."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(target)]
    ended = subprocess.run(
        [*command, "-v", str(source)], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_install_without_a_compiler(tmp_path):
    """It succeeds, says so in one line, and the installed package runs in PyTorch and knows why."""
    environment = {"CC": "/bin/false", "CXX": "/bin/false", "FASTDIT_CUDA_ARCHS": ""}
    said = install(checkout(tmp_path / "source"), tmp_path / "site", **environment)
    line = r"fastdit\._C was not built, PyTorch runs instead: .*/bin/false.* \(pip install -v tells more\)"
    assert re.search(line, said)

    code = """
import torch
from fastdit import kernels
from fastdit.kernels._native import describe_native
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
kernels.AdamWEMA([weight], lr=0.5).step()
assert torch.allclose(weight, torch.full((3,), 0.5)), weight
print(kernels.__file__, describe_native("cpu"), describe_native("cuda"), sep="\\n")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    where, cpp, cuda = run.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path / "site")
    assert re.fullmatch(r"C\+\+ kernels: not built \(.*/bin/false.*\)", cpp)
    assert cuda == "CUDA kernels: not built (no GPU was found, and FASTDIT_CUDA_ARCHS is not set)"


def test_a_failed_build_leaves_no_older_one(tmp_path):
    """In a working tree the last build's module would otherwise run with this build's Python."""
    source = checkout(tmp_path)
    stale = source / "fastdit" / f"_C{_suffix()}"
    stale.write_bytes(b"an older build")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=source,
        env=os.environ | {"CC": "/bin/false", "CXX": "/bin/false", "FASTDIT_CUDA_ARCHS": ""},
        check=True,
        capture_output=True,
    )
    assert not stale.exists()
    report = json.loads((source / "fastdit" / "_native.json").read_text())
    assert "/bin/false" in report["fastdit._C"]["problem"]


def _suffix() -> str:
    import sysconfig

    return sysconfig.get_config_var("EXT_SUFFIX")


def test_this_install_built_the_cpp_kernels():
    """Where there is a C++ compiler, a test run must not pass on fallbacks alone."""
    from fastdit.kernels._native import describe_native

    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert describe_native("cpu") == "C++ kernels: built"


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_nvcc_compiles_for_every_architecture(tmp_path):
    """setup.py's own command, warnings as errors: sm_80 and all newer data-centre and consumer GPUs nvcc knows."""
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    archs = [arch for arch in re.findall(r"compute_(\d+)\b", known) if int(arch) >= 80]
    assert {"80", "90"} <= set(archs)
    source = checkout(tmp_path / "source")
    ended = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "built")],
        cwd=source,
        env=os.environ
        | {"CC": "/bin/false", "CXX": "/bin/false", "FASTDIT_CUDA_ARCHS": ";".join(archs)}
        | {"NVCC_APPEND_FLAGS": "-Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -Xptxas -v --threads 2"},
        capture_output=True,
        text=True,
        check=False,
    )
    log = ended.stdout + ended.stderr
    assert ended.returncode == 0, log
    library = next((tmp_path / "built" / "fastdit").glob("_cuda*.so"), None)
    assert library, log

    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*\n(.*)\n", log)
    for arch in archs:
        mine = [(name, memory) for name, target, memory in compiled if target == arch]
        assert all(any(kernel in name for name, _ in mine) for kernel in KERNELS), (arch, mine)
        spills = [int(n) for _, memory in mine for n in re.findall(r"(\d+) bytes spill stores", memory)]
        assert len(spills) == len(KERNELS)
        assert max(spills) <= 16
    assert library.read_bytes()[:4] == b"\x7fELF"

    problem = ctypes.CDLL(str(library)).fastdit_cuda_problem
    problem.restype = ctypes.c_char_p
    import torch

    if not torch.cuda.is_available():
        assert problem()  # a reason, not a crash
