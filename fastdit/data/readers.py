"""Choose between the two libraries that read files: NVIDIA DALI, or a torch DataLoader with Pillow.

Both `pipeline` (DALI) and `torch_reader` have ImageReader, ShapeReader and LatentReader with the same arguments.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from fastdit.data.image_rules import Crop
from fastdit.data.order import BatchFailed
from fastdit.errors import UserError

ReaderName = Literal["auto", "dali", "torch"]
_INSTALL = "pip install nvidia-dali-cuda130 nvidia-nvimgcodec-cu13"


@dataclass(frozen=True)
class Backend:
    """Name a module of readers. `instead` gives the reason if it replaces DALI and the user did not ask for that."""

    name: Literal["dali", "torch"]
    module: ModuleType
    instead: str | None = None

    def describe(self, kind: Literal["image", "latent"], threads: int) -> str:
        """Return the way in which samples of that kind are read, in words for the start of a run."""
        if self.name == "dali":
            return "read by DALI"
        workers = f"{threads} {'worker' if kind == 'image' else 'thread'}{'s' if threads > 1 else ''}"
        how = f"torch DataLoader with Pillow, {workers}" if kind == "image" else workers
        return f"read by {how}" + (f" ({self.instead})" if self.instead else "")


def choose_backend(reader: ReaderName, crop: Crop = "center") -> Backend:
    """Return the module that reads files. "auto" takes DALI if it can be imported and `crop` is "center".

    crop: the way in which images are scaled. "adm" is Pillow's arithmetic, which DALI does not reproduce to the bit.

    Raises UserError if "dali" is asked for and cannot be imported or cannot crop so, ValueError for another name.
    """
    if reader not in ("auto", "dali", "torch"):
        raise ValueError(f"{reader=} is none of 'auto', 'dali' and 'torch'")
    if crop == "adm" and reader == "dali":
        raise UserError("data.reader: DALI cannot crop as data.crop adm does; leave it out, or set data.crop center")
    missing = "data.crop adm is Pillow's" if crop == "adm" and reader == "auto" else None
    if reader != "torch" and crop == "center":
        try:
            return Backend("dali", importlib.import_module("fastdit.data.pipeline"))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("nvidia"):
                raise
            part = "" if error.name in ("nvidia", "nvidia.dali") else f"'s {error.name.removeprefix('nvidia.')}"
            missing = f"NVIDIA DALI{part} is not installed"
        except (ImportError, OSError) as error:  # installed, but a library that it needs is not
            missing = f"NVIDIA DALI cannot be imported: {str(error).splitlines()[0][:120]}"
    if reader == "dali":
        raise UserError(f"data.reader: {missing}; {_INSTALL}, or set --data.reader torch")
    return Backend("torch", importlib.import_module("fastdit.data.torch_reader"), missing)


def find_corrupt(failure: BatchFailed) -> list[int]:
    """Return the ids of the failed batch's images that cannot be decoded.

    Raises the failure itself if no image is to blame (but a lack of memory, for example).
    """
    if not failure.corrupt:
        raise failure
    return failure.corrupt
