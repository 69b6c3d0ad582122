"""Read checkpoint files without running code that they bring along, and name files that are something else.

A .pt file goes through torch's weights-only loader, which builds tensors, numbers, texts and containers of them.
Objects of a few harmless types, such as the paths in a command line, become empty objects. A file with objects of any
other type is refused, and the message names the types.
"""

import argparse
import json
import pickle
import re
import shlex
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastdit.files import stand_in

State = dict[str, Tensor]

# First bytes of files that are no checkpoints: what such a file is, and what to do.
_SIGNATURES = (
    (b"\x1f\x8b", "it is compressed with gzip; unpack it with: gunzip, or tar xzf"),
    (b"BZh", "it is compressed with bzip2; unpack it with: bunzip2, or tar xjf"),
    (b"\xfd7zXZ", "it is compressed with xz; unpack it with: unxz, or tar xJf"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; unpack it with: unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7-Zip archive; unpack it with: 7z x"),
    (b"\x89HDF", "it is an HDF5 file; convert its arrays to a .safetensors file"),
    (b"\x93NUMPY", "it is a NumPy array; give a .pt or .safetensors file"),
    (b"GGUF", "it is a GGUF file; give a .pt or .safetensors file"),
)
_AGAIN = "copy or download it again"
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colors in a message
_TYPE = re.compile(r"\bGLOBAL ([\w.]+)")  # in a message of torch's weights-only loader
# Modules whose functions can do anything. No checkpoint needs them.
_DANGEROUS = {"builtins", "__builtin__", "os", "posix", "nt", "sys", "subprocess", "importlib", "runpy", "shutil"}
_DANGEROUS |= {"socket", "pty", "code", "ctypes", "pickle", "marshal", "timeit", "webbrowser", "pip", "pdb", "cProfile"}
_MOST_TYPES = 4  # that a message names
_ENTRIES = ("ema", "ema_state_dict", "model", "state_dict", "module")


class Omitted:
    """Stand for an object of a harmless type, without its content."""

    def __new__(cls, *args: object) -> "Omitted":
        """Ignore the arguments that the file has for the object."""
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        """Ignore the arguments that the file has for the object."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state that the file has for the object."""


def _harmless_types() -> list:
    """Return what the weights-only loader may build besides tensors and containers.

    An argparse.Namespace is built. All other types become `Omitted`, so that none of their own code runs.
    """
    paths = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    names = [f"{module}.{path}" for module in ("pathlib", "pathlib._local") for path in paths]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [f"{module}.scalar", f"{module}._reconstruct"]
    names += ["numpy.dtype", "numpy.ndarray", *(f"numpy.dtypes.{name}" for name in np.dtypes.__all__)]
    names += ["types.SimpleNamespace", "datetime.datetime", "datetime.date", "datetime.timedelta"]
    return [argparse.Namespace, *((Omitted, name) for name in names)]


def read_tensors(path: Path, which: str) -> State:
    """Return the tensors of a .pt or .safetensors file, on the CPU. Nothing is unpickled but tensors and plain values.

    which: name of the entry to take if the file holds several, "ema" or "model".
    Raises ValueError if there is no such file, or if it cannot be read, or if it does not hold a dict of tensors.
    """
    state = read_content(path)
    if isinstance(state, dict) and ("model" in state or "ema" in state):
        if which not in state:
            raise ValueError(f"it holds no {which!r} weights, only {', '.join(map(str, state))}")
        state = state[which]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("not a checkpoint: it does not hold a dict of tensors")
    return state


def read_content(path: Path) -> object:
    """Return what a .pt or .safetensors file holds, on the CPU. The content tells which of the two it is.

    Raises ValueError, with the cause and the remedy in one line, if it cannot be read.
    """
    if not path.exists():
        raise ValueError("no such file; give a .pt or .safetensors file, or a diffusers folder")
    refusal = f"{path.name} cannot be read as a checkpoint"
    if fault := other_kind(path):
        raise ValueError(f"{refusal}: {fault}")
    try:
        if is_safetensors(path):
            return load_file(path)
        with torch.serialization.safe_globals(_harmless_types()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            with path.open("rb") as file:  # given a path, torch also looks at its suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        reason = _ESCAPE.sub("", str(getattr(error, "strerror", None) or error)).strip().split("\n")[0]
        raise ValueError(f"{refusal} ({reason}); {_AGAIN}") from None
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        raise ValueError(f"{refusal}: {_unreadable(path, error)}") from None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, empty for other files and for files that cannot be read."""
    try:
        if path.is_file() and is_safetensors(path):
            with safe_open(path, "pt") as file:
                return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        pass  # `read_content` names the cause
    return {}


def is_safetensors(path: Path) -> bool:
    """Return whether a file is a safetensors file by its first bytes; if these tell nothing, by its name."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        return True
    return path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))


def other_kind(path: Path) -> str | None:
    """Return what a file is, and what to do, if it is plainly no checkpoint; else None. Raises ValueError."""
    if not path.is_file():
        return "it is no regular file; give a .pt or .safetensors file"
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        return f"{error.strerror}; choose another file, or change its permissions"
    if not head:
        return f"it is empty; {_AGAIN}"
    for start, fault in _SIGNATURES:
        if head.startswith(start):
            return fault
    if fault := stand_in(head):
        return f"it {fault}"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it with: tar xf"
    if head.startswith(b"PK"):
        return _other_zip(path)
    if head[:1] != b"\x80" and head[8:9] != b"{" and _is_text(head):
        return "it is a text file; give a .pt or .safetensors file"
    return None


def _other_zip(path: Path) -> str | None:
    """Return what a zip file is, and what to do, unless `torch.save` wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return f"it is cut short or damaged; {_AGAIN}"
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript module; save its state_dict() with torch.save, and give that file"
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy arrays; give a .pt or .safetensors file"
    return "it is a zip archive that torch.save did not write; unpack it, and give the file in it"


def _is_text(head: bytes) -> bool:
    """Return whether the first bytes of a file are text."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3 and _is_text(head[: error.start]) if error.start else False
    return all(character.isprintable() or character in "\t\r\n" for character in text)


def _unreadable(path: Path, error: Exception) -> str:
    """Return why torch could not read a file, and what to do. The texts of torch are not passed on."""
    if isinstance(error, pickle.UnpicklingError) and (types := _refused_types(path, error)):
        return _blocked(path, types)
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return f"it is cut short or damaged; {_AGAIN}"
    if start[:1] == b"\x80":
        return "it is a pickle that torch.save did not write, or damaged; save its tensors with torch.save"
    return f"it is neither a file of torch.save nor a safetensors file, or it is damaged; {_AGAIN}"


def _refused_types(path: Path, error: Exception) -> list[str]:
    """Return the types in a file that the weights-only loader refuses, by their full names."""
    try:
        with torch.serialization.safe_globals(_harmless_types()):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it reads no files of the older layout, and no damaged ones
        names = []
    names = names or _TYPE.findall(_ESCAPE.sub("", str(error)))
    return sorted({name.rstrip(".") if "." in name else f"builtins.{name}" for name in names})


def _blocked(path: Path, types: list[str]) -> str:
    """Return the message for a file with objects of types that are not unpickled."""
    shown = ", ".join(types[:_MOST_TYPES]) + (f" and {len(types) - _MOST_TYPES} more" if types[_MOST_TYPES:] else "")
    if dangerous := [name for name in types if name.split(".")[0] in _DANGEROUS]:
        return f"it calls {dangerous[0]}, which can run any code; do not use it, take weights from another source"
    if any(name.startswith("torch.nn.modules.") for name in types):
        return (
            f"it holds a whole network ({shown}), not its weights; in the project that wrote it, save "
            "network.state_dict(), and give that file"
        )
    code = (
        "import pydoc, torch; "
        f"torch.serialization.add_safe_globals([pydoc.locate(name) for name in {json.dumps(types)}]); "
        f'file = torch.load({json.dumps(str(path))}, map_location="cpu"); '
        f"torch.save({{key: file[key] for key in {json.dumps(_ENTRIES)} if key in file}}, "
        f"{json.dumps(str(path.with_name(path.stem + '-tensors.pt')))})"
    )
    return (
        f"it holds objects of type {shown}, and only tensors and plain values are read; if you trust the file, keep "
        f"its weights alone, in the project that wrote it: python -c {shlex.quote(code)}"
    )
