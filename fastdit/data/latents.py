"""Latent samples: one `.npy` a sample, holding an autoencoder's posterior of an image, and maybe of its mirror image.

    float16, float32   (2, C, H, W): mean, std; or (4, C, H, W): mean, std, then mean and std of the mirrored image
    uint8              (1,) or (2,) records of `quantised_dtype`: the mean alone, of the image and of the mirrored image

A mirrored latent is not the latent of the mirrored image, so a flip is only ever the stored second view.
All samples of a source share one form. What travels to the device is a view's bytes, unpacked there.
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


def quantised_dtype(shape: tuple[int, int, int]) -> np.dtype:
    """A view (C, H, W) in 8 bits: mean = low + step * codes, low and step (C,) float32, codes (C, H, W) uint8."""
    channels = shape[:1]
    return np.dtype([("low", "<f4", channels), ("step", "<f4", channels), ("codes", "u1", shape)])


def quantise(means: np.ndarray) -> np.ndarray:
    """Means (..., C, H, W), finite, to records (...) of `quantised_dtype`.

    A channel's codes span its smallest to its largest value, in each view for itself: no value is clipped, and each is
    off by at most half a step of 1/255 of that range (and float32's rounding).
    """
    means = means.astype(np.float32)
    low, high = means.min((-2, -1)), means.max((-2, -1))
    step = (high - low) / np.float32(255)
    out = np.empty(means.shape[:-3], quantised_dtype(means.shape[-3:]))
    out["low"], out["step"] = low, step
    spread = np.where(step > 0, step, 1)[..., None, None]
    out["codes"] = np.rint((means - low[..., None, None]) / spread).clip(0, 255)
    return out


@dataclass(frozen=True)
class LatentForm:
    """How every sample of a source is stored.

    Args:
        dtype: float16, float32 or a `quantised_dtype`.
        shape: of a latent, (C, H, W).
        views: 1, or 2 with that of the mirrored image.
    """

    dtype: np.dtype
    shape: tuple[int, int, int]
    views: int

    @classmethod
    def of(cls, dtype: np.dtype, shape: tuple[int, ...]) -> "LatentForm":
        """Of an array as stored. Raises ValueError when it is none of the forms."""
        if dtype in FLOATS and len(shape) == 4 and shape[0] in (2, 4) and min(shape) > 0:
            return cls(dtype, shape[1:], shape[0] // 2)
        if dtype.names and "codes" in dtype.names and shape in ((1,), (2,)):
            inner = dtype["codes"].shape
            if len(inner) == 3 and min(inner) > 0 and dtype == quantised_dtype(inner):
                return cls(dtype, inner, shape[0])
        kind = "records" if dtype.names else dtype
        raise ValueError(f"it is {kind} {shape}, not float16 or float32 (2 or 4, C, H, W), nor 1 or 2 quantised views")

    def __str__(self) -> str:
        kind, mirrored = "uint8" if self.quantised else self.dtype, "with" if self.views == 2 else "without"
        return f"{kind} {self.shape} {mirrored} mirrored ones"

    @property
    def quantised(self) -> bool:
        return self.dtype not in FLOATS

    @cached_property
    def view_bytes(self) -> int:
        return self.dtype.itemsize * (1 if self.quantised else 2 * math.prod(self.shape))

    def unpack(self, views: Tensor) -> tuple[Tensor, Tensor | None]:
        """Views' bytes, uint8 (b, view_bytes), to mean and std, float32 (b, C, H, W) each, on the same device.

        std is None where the mean alone is stored.
        """
        if self.quantised:
            channels = 4 * self.shape[0]
            low, step = (
                views[:, at : at + channels].contiguous().view(torch.float32)[..., None, None] for at in (0, channels)
            )
            codes = views[:, 2 * channels :].reshape(-1, *self.shape)
            return codes.float().mul_(step).add_(low), None
        return views.view(FLOATS[self.dtype]).view(-1, 2, *self.shape).float().unbind(1)


class LatentSamples:
    """Posteriors out of shards. `labels` is (n,) int64."""

    def __init__(self, shards: ShardSamples):
        """Checks every sample's header against the first's. Raises UserError that names shard and key."""
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
        """Of a latent: (C, H, W)."""
        return self.form.shape

    @property
    def has_flips(self) -> bool:
        """Whether the mirrored image's posterior is stored."""
        return self.form.views == 2

    @property
    def folder(self) -> Path:
        """Of the first shard."""
        return self._shards.paths[0].parent

    def read(self, i: int) -> np.ndarray:
        """Sample `i` as stored, a view of the mapped shard: float (2 or 4, C, H, W), or (1 or 2,) records."""
        shape = (self.form.views,) if self.form.quantised else (2 * self.form.views, *self.shape)
        return self._shards.read(i)[self._start :].view(self.form.dtype).reshape(shape)

    def view(self, i: int, mirrored: bool) -> np.ndarray:
        """The bytes of one view of sample `i`, uint8 (form.view_bytes,), a view of the mapped shard."""
        start = self._start + int(mirrored) * self.form.view_bytes
        return self._shards.read(i)[start : start + self.form.view_bytes]


def read_header(data: np.ndarray, where: str) -> tuple[LatentForm, int]:
    """Form and offset of the values of an `.npy` file's bytes. Raises UserError that names `where`."""
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
