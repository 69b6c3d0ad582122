"""Builds the compiled kernels of csrc/, each only where it can be: without them the install still succeeds.

fastdit._C      C++ for CPU tensors, where there is a C++ compiler. FASTDIT_MARCH: the CPU it is made for (native; a
                wheel to share: x86-64-v3).
fastdit._cuda   a CUDA library, where nvcc and a GPU are found. FASTDIT_CUDA_ARCHS="80;90": for these instead.

What became of each is written to fastdit/_native.json, for `fastdit.kernels` to tell. Everything else about the package
stands in pyproject.toml.
"""

import json
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MARCH = os.environ.get("FASTDIT_MARCH", "native")
# Nothing that changes results: no -ffast-math, and no contraction, so that every machine computes the same bits.
CPP_FLAGS = ["-std=c++17", "-g0", "-fvisibility=hidden", "-fopenmp", "-Wall", "-O3", f"-march={MARCH}"]
CPP_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-shared", "-Xcompiler=-fPIC"]
REPORT = "_native.json"


class BuildKernels(build_ext):
    def run(self) -> None:
        self.report = {}
        super().run()
        homes = [Path(self.build_lib) / "fastdit"]
        if self.inplace:
            homes.append(Path(self.get_finalized_command("build_py").get_package_dir("fastdit")))
        for home in homes:
            home.mkdir(parents=True, exist_ok=True)
            (home / REPORT).write_text(json.dumps(self.report, indent=1) + "\n")
            for extension in self.extensions:
                if "problem" in self.report[extension.name]:
                    stale = home / Path(self.get_ext_filename(extension.name)).name
                    stale.unlink(missing_ok=True)  # of an earlier build

    def build_extension(self, extension: Extension) -> None:
        build = self._cuda if extension.name == "fastdit._cuda" else self._cpp
        try:
            self.report[extension.name] = build(extension)
        except Exception as error:  # whatever it is, fastdit works without
            problem = _brief(error)
            self.report[extension.name] = {"problem": problem}
            # A warning, not a print: newer pips show it.
            warnings.warn(f"{extension.name} was not built, PyTorch runs instead: {problem}", stacklevel=1)

    def _cpp(self, extension: Extension) -> dict:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        ParallelCompile().install()
        extension.include_dirs = [pybind11.get_include()]
        extension.extra_compile_args = CPP_FLAGS
        extension.extra_link_args = ["-fopenmp"]
        super().build_extension(extension)
        return {"march": MARCH, "needs": self._vector_features()}

    def _vector_features(self) -> list[str]:
        """The vector instructions that the compiler may have used, as /proc/cpuinfo spells them less underscores."""
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        command = [compiler[0], f"-march={MARCH}", "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return sorted(name.lower() for name in re.findall(r"#define __((?:AVX|FMA)[A-Z0-9]*)__ ", macros))

    def _cuda(self, extension: Extension) -> dict:
        archs = _cuda_archs()
        if not archs:
            return {"problem": "no GPU was found, and FASTDIT_CUDA_ARCHS is not set"}
        nvcc = shutil.which("nvcc") or shutil.which(
            "nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
        )
        if nvcc is None:
            raise FileNotFoundError("nvcc is neither on PATH nor in CUDA_HOME")
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # for newer ones, at load time
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([nvcc, *NVCC_FLAGS, *codes, *extension.sources, "-o", str(target)], check=True)
        return {"archs": archs}


def _brief(error: Exception) -> str:
    """One line; of a command that failed, its name only."""
    line = " ".join(str(error).split())
    return re.sub(r"^Command '\['([^']+)'.*\]' returned", r"\1 returned", line) + " (pip install -v tells more)"


def _cuda_archs() -> list[str]:
    """Compute capabilities to build for, as "90", ascending; none without a GPU or a wish."""
    asked = os.environ.get("FASTDIT_CUDA_ARCHS")
    if asked is None:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace(".", "")
        except (OSError, subprocess.CalledProcessError):
            return []
    return sorted(set(re.findall(r"\d+", asked)), key=int)


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "fastdit._C",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            optional=True,
        ),
        Extension(
            "fastdit._cuda",
            ["csrc/adamw_ema_cuda.cu"],
            depends=["csrc/adamw_ema.h", "csrc/bfloat16.h"],
            optional=True,
        ),
    ],
)
