"""Load the compiled kernels of csrc/: a C++ module for CPU tensors and a CUDA library.

Either may be absent. setup.py writes the reason to fastdit/_native.json.
"""

import ctypes
import importlib
import importlib.util
import json
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

Addresses = Sequence[int]
NAMES = {"cpu": ("fastdit._C", "C++ kernels"), "cuda": ("fastdit._cuda", "CUDA kernels")}


def load_native(device_type: str) -> tuple["ModuleType | CudaLibrary | None", str]:
    """Return (kernels, "") for device type "cpu" or "cuda", or (None, the reason why there are none)."""
    if device_type not in NAMES:
        return None, f"there are none for {device_type}"
    return _load_cpp() if device_type == "cpu" else _load_cuda()


def describe_native(device: torch.device | str) -> str:
    """Return 'C++ kernels: built' or 'C++ kernels: not built (reason)', for the start of a run."""
    device_type = torch.device(device).type
    kernels, problem = load_native(device_type)
    name = NAMES.get(device_type, ("", "compiled kernels"))[1]
    return f"{name}: built" if kernels else f"{name}: not built ({problem})"


@lru_cache
def _load_cpp() -> tuple[ModuleType | None, str]:
    """Import fastdit._C, unless this CPU lacks instructions that it was compiled for."""
    built = _report("fastdit._C")
    if problem := built.get("problem"):
        return None, problem
    features = _cpu_features()
    if features and (missing := set(built.get("needs", ())) - features):
        return None, (
            f"they were built for another CPU, this one lacks {', '.join(sorted(missing))}; "
            "reinstall fastdit here, or with FASTDIT_MARCH=x86-64-v3"
        )
    try:
        return importlib.import_module("fastdit._C"), ""
    except ImportError as error:
        return None, f"{error}; reinstall fastdit"


@lru_cache
def _load_cuda() -> tuple["CudaLibrary | None", str]:
    """Load fastdit._cuda, unless its kernels cannot run on the current device."""
    if problem := _report("fastdit._cuda").get("problem"):
        return None, problem
    spec = importlib.util.find_spec("fastdit._cuda")
    if spec is None:
        return None, "fastdit._cuda is missing; reinstall fastdit"
    try:
        library = CudaLibrary(spec.origin)
    except OSError as error:
        return None, f"{error}; reinstall fastdit"
    problem = library.problem()
    return (None, f"{problem}; reinstall fastdit here, or with FASTDIT_CUDA_ARCHS") if problem else (library, "")


def _report(name: str) -> dict:
    """Return the entry of fastdit/_native.json for `name`."""
    package = importlib.util.find_spec("fastdit").submodule_search_locations[0]
    try:
        return json.loads((Path(package) / "_native.json").read_text())[name]
    except (OSError, ValueError, KeyError):
        return {"problem": "fastdit was not installed by pip"}


def _cpu_features() -> set[str]:
    """Return this CPU's features in setup.py's spelling; an empty set where the system does not list them."""
    try:
        return set(Path("/proc/cpuinfo").read_text().replace("_", "").split())
    except OSError:
        return set()


class CudaLibrary:
    """Wrap csrc/adamw_ema_cuda.cu in the interface of `fastdit._C`.

    Tensors are device addresses. Kernels run on `stream` of the current device. Functions raise RuntimeError with
    CUDA's message if a launch fails.
    """

    def __init__(self, path: str, device: str = "cuda"):
        self._library, self._device = ctypes.CDLL(path), device
        for name in ("fastdit_cuda_problem", "fastdit_adamw_ema", "fastdit_squared_norm"):
            getattr(self._library, name).restype = c_char_p
        self._library.fastdit_squared_norm_scratch.restype = c_int64

    def problem(self) -> str | None:
        """Return why the kernels cannot run on the current device, or None."""
        error = self._library.fastdit_cuda_problem()
        return error and error.decode()

    def adamw_ema(
        self,
        weights: Addresses,
        gradients: Addresses,
        exp_avgs: Addresses,
        exp_avg_sqs: Addresses,
        steps: Addresses,
        averages: Sequence[Addresses],
        copies: Addresses,
        bf16_gradients: bool,
        sizes: Sequence[int],
        decays: Sequence[float],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        skip: int,
        grad_scale: int,
        stream: int,
    ) -> None:
        """Update lists of fp32 tensors in place: `fastdit_adamw_ema` of the library.

        averages holds one list of addresses for each EMA. copies is empty or one bf16 tensor for each weight. With
        bf16_gradients, all gradients are bf16. skip and grad_scale are addresses of one float; a grad_scale of 0 means
        none.
        """
        corrections = torch.empty(2 * len(weights), device=self._device)
        self._call(
            "fastdit_adamw_ema",
            c_int(len(weights)),
            *(_list(c_void_p, addresses) for addresses in (weights, gradients, exp_avgs, exp_avg_sqs, steps)),
            c_int(len(averages)),
            _list(c_void_p, [address for addresses in averages for address in addresses]),
            _list(c_void_p, copies) if copies else None,
            c_int(bf16_gradients),
            _list(c_int64, sizes),
            _list(c_double, decays),
            *map(c_double, (lr, beta1, beta2, eps, weight_decay)),
            *map(c_void_p, (skip, grad_scale, corrections.data_ptr(), stream)),
        )

    def squared_norm(self, tensors: Addresses, bf16: bool, sizes: Sequence[int], stream: int) -> torch.Tensor:
        """Return the 0-dim fp64 sum of squares of fp32 or bf16 tensors, which stays on the device."""
        sizes = _list(c_int64, sizes)
        count = c_int(len(tensors))
        parts = self._library.fastdit_squared_norm_scratch(count, sizes)
        sums = torch.empty(parts + 1, dtype=torch.float64, device=self._device)
        scratch, out = sums[1:], sums[0]
        self._call(
            "fastdit_squared_norm",
            count,
            _list(c_void_p, tensors),
            c_int(bf16),
            sizes,
            *map(c_void_p, (scratch.data_ptr(), out.data_ptr(), stream)),
        )
        return out

    def _call(self, name: str, *arguments) -> None:
        """Call a function of the library and raise the error that it returns."""
        if error := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name}: {error.decode()}")


def _list(kind, values):
    """Return a C array."""
    return (kind * len(values))(*values)
