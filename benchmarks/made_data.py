"""Data of ImageNet's kind for the loader benchmark, made when asked for, always the same, in a folder that goes away.

photos      2,000 JPEGs of 500 x 375 pixels or upright, about 80 kB each, four qualities, 4:2:0: crops of
            scikit-learn's two photographs (CC BY 2.0)
latents     10,000 random posteriors of shape 4 x 32 x 32 as the SD VAE's, with mirrored ones, in float16
latents8    the same in 8 bits
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from fastdit.data import write_shards
from fastdit.data.latents import quantize
from fastdit.errors import UserError

CLASSES = 10
PHOTOS, LONG, SHORT = 2000, 500, 375
LATENTS, POSTERIOR = 10_000, (4, 4, 32, 32)
Samples = Iterator[tuple[str, dict[str, bytes]]]


@contextmanager
def at_hand(name: str) -> Iterator[str]:
    """Yield the data source for `name`: for a name of MADE a folder that lasts as long as the context, else `name`."""
    if name not in MADE:
        yield name
        return
    with TemporaryDirectory() as folder:
        write_shards(Path(folder) / f"{name}-%02d.tar", MADE[name](), 500)
        yield folder


def _photos() -> Samples:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError("--data photos: are crops of scikit-learn's; pip install scikit-learn") from None
    pictures = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(PHOTOS):
        picture = pictures[i % len(pictures)]
        width, height = (LONG, SHORT) if rng.random() < 0.7 else (SHORT, LONG)
        share = rng.uniform(0.6, 1) * min(picture.width / width, picture.height / height)
        box = round(width * share), round(height * share)
        left, top = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(picture.size, box))
        crop = picture.crop((left, top, left + box[0], top + box[1]))
        out = io.BytesIO()
        crop.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=(90, 95, 97, 98)[i % 4])
        yield f"photo-{i:04d}", {"jpg": out.getvalue(), "cls": str(i % CLASSES).encode()}


def _latents(stored: Callable[[np.ndarray], np.ndarray]) -> Samples:
    rng = np.random.default_rng(0)
    for i in range(LATENTS):
        out = io.BytesIO()
        np.save(out, stored(np.abs(rng.standard_normal(POSTERIOR, dtype=np.float32))))
        yield f"latent-{i:05d}", {"npy": out.getvalue(), "cls": str(i % CLASSES).encode()}


MADE: dict[str, Callable[[], Samples]] = {
    "photos": _photos,
    "latents": lambda: _latents(lambda posterior: posterior.astype(np.float16)),
    "latents8": lambda: _latents(lambda posterior: quantize(posterior[::2])),
}
