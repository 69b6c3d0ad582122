"""Generate random images behind the same interface as real ones, for benchmarks and tests, at no cost for reading."""

import re
from collections.abc import Iterable

import numpy as np
import torch

from fastdit.data.order import Request
from fastdit.data.transfer import to_device
from fastdit.errors import UserError

_DEFAULT = "synthetic:3x64x64:10:10000"
_POOL = 64


class SyntheticSamples:
    """Generate `n` random images (C, H, W) uint8. Image `i` has label `i % classes` and is image `i % 64` of a pool."""

    is_latent = False

    def __init__(self, shape: tuple[int, int, int], classes: int, n: int):
        self.shape = shape
        self.labels = np.arange(n, dtype=np.int64) % classes
        bits = np.random.Philox(np.random.SeedSequence((*shape, classes)))
        values = bits.random_raw(_POOL * int(np.prod(shape))) >> np.uint64(56)
        self.pool = values.astype(np.uint8).reshape(_POOL, *shape)

    @classmethod
    def parse(cls, text: str) -> "SyntheticSamples":
        """Return the samples that `synthetic` or `synthetic:CxHxW:CLASSES:N` names. Raises UserError."""
        full = _DEFAULT if text == "synthetic" else text
        if (match := re.fullmatch(r"synthetic:(\d+)x(\d+)x(\d+):(\d+):(\d+)", full)) is None:
            raise UserError(f"{text}: not of the form synthetic:CxHxW:CLASSES:N, for example {_DEFAULT}")
        c, h, w, classes, n = map(int, match.groups())
        if 0 in (c, h, w, classes, n):
            raise UserError(f"{text}: every number must be at least 1")
        return cls((c, h, w), classes, n)

    def read(self, i: int) -> np.ndarray:
        """Return image `i`, uint8 (C, H, W)."""
        return self.pool[i % _POOL]

    def where(self, i: int) -> str:
        """Return the name of image `i` for error messages."""
        return f"synthetic image {i}"


class SyntheticReader:
    """Iterate over `(request, x)` from a pool of images on the device: x float32 (b, C, H, W) in [-1, 1]."""

    def __init__(self, samples: SyntheticSamples, requests: Iterable[Request], device: torch.device):
        self._requests, self._device = iter(requests), device
        self._pool = torch.from_numpy(samples.pool).to(device).float().sub_(127.5).div_(127.5)

    def __next__(self) -> tuple[Request, torch.Tensor]:
        request = next(self._requests)
        ids = to_device(request.ids % len(self._pool), self._device)
        flips = to_device(request.flips, self._device)
        x = self._pool[ids]
        return request, torch.where(flips[:, None, None, None], x.flip(-1), x)

    def close(self) -> None:
        """Do nothing: there is no work ahead."""
