"""Latent samples: one `.npy` a sample, float16 or float32, holding an autoencoder's posterior.

The array is (2, C, H, W): mean, std; or (4, C, H, W): mean, std, then mean and std of the mirrored image.
A mirrored latent is not the latent of the mirrored image, so a flip is only ever the stored second half.
All samples of a source share one shape and dtype.
"""

import io

import numpy as np

from fastdit.data.shards import ShardSamples
from fastdit.errors import UserError


class LatentSamples:
    """Posteriors out of shards. `shape` is (2 or 4, C, H, W); `labels` is (n,) int64."""

    def __init__(self, shards: ShardSamples):
        """Checks every sample's header against the first's. Raises UserError that names shard and key."""
        self._shards = shards
        self.labels = shards.labels
        self.where = shards.where
        self.shape, self.dtype, self._start = _npy_header(shards.read(0), shards.where(0))
        header = shards.read(0)[: self._start].tobytes()
        for i, size in enumerate(shards.sizes):
            if size != shards.sizes[0] or shards.read(i)[: self._start].tobytes() != header:
                raise UserError(
                    f"{self.where(i)}: the latent is not {self.dtype} {self.shape} like the source's first; "
                    "encode all samples alike"
                )

    @property
    def has_flips(self) -> bool:
        """Whether the mirrored image's posterior is stored."""
        return self.shape[0] == 4

    def read(self, i: int) -> np.ndarray:
        """Sample `i` (2 or 4, C, H, W), a view of the mapped shard."""
        return self._shards.read(i)[self._start :].view(self.dtype).reshape(self.shape)


def _npy_header(data: np.ndarray, where: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, offset of the values) of an `.npy` file's bytes."""
    head = io.BytesIO(data[:1024].tobytes())
    try:
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("its .npy version is not 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
        if len(shape) != 4 or shape[0] not in (2, 4) or fortran or dtype not in (np.float16, np.float32):
            raise ValueError(f"it is {dtype} {shape}, not float16 or float32 (2 or 4, C, H, W) in C order")
        if head.tell() + dtype.itemsize * int(np.prod(shape)) != len(data):
            raise ValueError("its size does not fit its header")
    except ValueError as error:
        raise UserError(f"{where}: no latent: {str(error).splitlines()[0]}") from error
    return shape, dtype, head.tell()
