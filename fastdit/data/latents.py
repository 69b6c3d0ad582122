"""Read latent samples. Each `.npy` holds an autoencoder's posterior of an image, and maybe of its mirror image.

    float16, float32   (2, C, H, W): mean, std; or (4, C, H, W): mean, std, then mean and std of the mirrored image
    uint8              (1,) or (2,) records of `quantized_dtype`: the mean alone, of the image and of the mirrored image

A mirrored latent is not the latent of the mirrored image, so a flip is only ever the stored second view.
All samples of a source share one form. A view's bytes travel to the device and are unpacked there.
"""

import io
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdit.data.shards import ShardSamples
from fastdit.errors import UserError

FLOATS = {np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32}


def quantized_dtype(shape: tuple[int, int, int]) -> np.dtype:
    """Return the dtype of a view (C, H, W) in 8 bits, where mean = low + step * codes.

    low and step are (C,) float32, codes is (C, H, W) uint8.
    """
    channels = shape[:1]
    return np.dtype([("low", "<f4", channels), ("step", "<f4", channels), ("codes", "u1", shape)])


def quantize(means: np.ndarray) -> np.ndarray:
    """Convert means (..., C, H, W), finite, to records (...) of `quantized_dtype`.

    The codes of a channel span its smallest to its largest value, in each view separately. So no value is clipped, and
    each is off by at most half a step of 1/255 of that range, plus float32's rounding.
    """
    means = means.astype(np.float32)
    low, high = means.min((-2, -1)), means.max((-2, -1))
    step = (high - low) / np.float32(255)
    out = np.empty(means.shape[:-3], quantized_dtype(means.shape[-3:]))
    out["low"], out["step"] = low, step
    spread = np.where(step > 0, step, 1)[..., None, None]
    out["codes"] = np.rint((means - low[..., None, None]) / spread).clip(0, 255)
    return out


@dataclass(frozen=True)
class LatentForm:
    """Describe the form in which every sample of a source is stored.

    Args:
        dtype: float16, float32 or a `quantized_dtype`.
        shape: (C, H, W) of a latent.
        views: 1, or 2 if the mirrored image's posterior is stored too.
    """

    dtype: np.dtype
    shape: tuple[int, int, int]
    views: int

    @classmethod
    def of(cls, dtype: np.dtype, shape: tuple[int, ...]) -> "LatentForm":
        """Return the form of a stored array of `dtype` and `shape`. Raises ValueError if it is none of the forms."""
        if dtype in FLOATS and len(shape) == 4 and shape[0] in (2, 4) and min(shape) > 0:
            return cls(dtype, shape[1:], shape[0] // 2)
        if dtype.names and "codes" in dtype.names and shape in ((1,), (2,)):
            inner = dtype["codes"].shape
            if len(inner) == 3 and min(inner) > 0 and dtype == quantized_dtype(inner):
                return cls(dtype, inner, shape[0])
        kind = "records" if dtype.names else dtype
        raise ValueError(f"it is {kind} {shape}, not float16 or float32 (2 or 4, C, H, W), nor 1 or 2 quantized views")

    def __str__(self) -> str:
        kind, mirrored = "uint8" if self.quantized else self.dtype, "with" if self.views == 2 else "without"
        return f"{kind} {self.shape} {mirrored} mirrored ones"

    @property
    def quantized(self) -> bool:
        """Return whether the samples are records of 8-bit codes."""
        return self.dtype not in FLOATS

    @cached_property
    def view_bytes(self) -> int:
        """Return the size of a view in bytes."""
        return self.dtype.itemsize * (1 if self.quantized else 2 * math.prod(self.shape))

    def unpack(self, views: Tensor) -> tuple[Tensor, Tensor | None]:
        """Convert views' bytes, uint8 (b, view_bytes), to mean and std, float32 (b, C, H, W) each, on the same device.

        std is None if only the mean is stored.
        """
        if self.quantized:
            channels = 4 * self.shape[0]
            low, step = (
                views[:, start : start + channels].contiguous().view(torch.float32)[..., None, None]
                for start in (0, channels)
            )
            codes = views[:, 2 * channels :].reshape(-1, *self.shape)
            return codes.float().mul_(step).add_(low), None
        return views.view(FLOATS[self.dtype]).view(-1, 2, *self.shape).float().unbind(1)


class LatentSamples:
    """Read the posteriors in some shards. `labels` is (n,) int64."""

    def __init__(self, shards: ShardSamples):
        """Check every sample's header against the first one's. Raises UserError that names shard and key."""
        self._shards = shards
        self.labels = shards.labels
        self.where = shards.where
        self.form, self._start = read_header(shards.read(0), shards.where(0))
        header = shards.read(0)[: self._start].tobytes()
        for i, size in enumerate(shards.sizes):
            if size != shards.sizes[0] or shards.read(i)[: self._start].tobytes() != header:
                raise UserError(
                    f"{self.where(i)}: the latent is not {self.form} like the source's first; encode all samples alike"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of a latent."""
        return self.form.shape

    @property
    def has_flips(self) -> bool:
        """Return whether the mirrored images' posteriors are stored."""
        return self.form.views == 2

    @property
    def folder(self) -> Path:
        """Return the folder of the first shard."""
        return self._shards.paths[0].parent

    def read(self, i: int) -> np.ndarray:
        """Return sample `i` as stored, a view of the mapped shard: float (2 or 4, C, H, W), or records (1 or 2,)."""
        shape = (self.form.views,) if self.form.quantized else (2 * self.form.views, *self.shape)
        return self._shards.read(i)[self._start :].view(self.form.dtype).reshape(shape)

    def view(self, i: int, mirrored: bool) -> np.ndarray:
        """Return the bytes of one view of sample `i`, uint8 (form.view_bytes,), as a view of the mapped shard."""
        start = self._start + int(mirrored) * self.form.view_bytes
        return self._shards.read(i)[start : start + self.form.view_bytes]


def read_header(data: np.ndarray, where: str) -> tuple[LatentForm, int]:
    """Return the form of an `.npy` file and the offset of its values in bytes.

    data: the file's bytes, uint8 (size,). Raises UserError that names `where` if the file is no latent.
    """
    head = io.BytesIO(data[:1024].tobytes())
    try:
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("its .npy version is not 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
        if fortran:
            raise ValueError("it is in Fortran's order")
        form = LatentForm.of(dtype, shape)
        if head.tell() + form.views * form.view_bytes != len(data):
            raise ValueError("its size does not fit its header")
    except Exception as error:  # numpy reads the header as Python: a damaged one ends in errors of many kinds
        raise UserError(f"{where}: no latent: {str(error).splitlines()[0]}") from error
    return form, head.tell()
