"""Make images, trees and shards for the data tests."""

import io
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdit.data import make_loader, open_source, write_shards


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return an image of smooth shapes and a little grain, uint8 (H, W) or (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    image = np.clip(smooth.astype(int) + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
    return image if channels == 3 else image[..., 0].copy()


def encode(image: np.ndarray | Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, form, **options)
    return out.getvalue()


def decode(data: bytes) -> np.ndarray:
    """Return the pixels that Pillow decodes, (H, W, C)."""
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return pixels.reshape(*pixels.shape[:2], -1)


def numbered(n: int, size: tuple[int, int] = (5, 7)) -> list[bytes]:
    """Return `n` gray PNGs; image i's pixels are i, except for a bright right edge that shows mirroring."""
    images = np.empty((n, *size), dtype=np.uint8)
    images[:] = np.arange(n)[:, None, None]
    images[..., -1] = 255
    return [encode(image, "PNG") for image in images]


def numbered_source(folder: Path, n: int, per_shard: int = 4):
    """Return a source of `numbered` images in shards; image i has label i % 3."""
    samples = ((f"s{i:03d}", {"png": p, "cls": str(i % 3).encode()}) for i, p in enumerate(numbered(n)))
    write_shards(folder / "n-%02d.tar", samples, per_shard)
    return open_source(str(folder))


def numbers_and_flips(x: torch.Tensor) -> tuple[list[int], list[bool]]:
    """Return the numbers of the `numbered` images in a batch, and which are mirrored."""
    pixels = ((x + 1) * 127.5).round().int()
    flips = pixels[:, 0, 0, 0] == 255
    return pixels[:, 0, 0, 3].tolist(), flips.tolist()


def take(count: int, source, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the first `count` batches of a new loader."""
    with closing(make_loader(source, **options)) as loader:
        return [next(loader) for _ in range(count)]


def levels(x: torch.Tensor) -> np.ndarray:
    """Convert a batch (b, C, H, W) in [-1, 1] to pixel values, float64 (b, H, W, C)."""
    return (x.double().permute(0, 2, 3, 1).numpy() + 1) * 127.5


def latent_source(folder: Path, posteriors: np.ndarray, labels=None):
    """Return a source of the latents `posteriors` (n, 2 or 4, C, H, W) in shards of 3."""

    def samples():
        for i, posterior in enumerate(posteriors):
            out = io.BytesIO()
            np.save(out, posterior)
            yield f"l{i:03d}", {"npy": out.getvalue(), "cls": str(labels[i] if labels else i % 2).encode()}

    write_shards(folder / "l-%d.tar", samples(), 3)
    return open_source(str(folder))
