"""Samples from a network as pictures: the same picture for the same seed and index, however the work is split."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastdit.config import SampleConfig
from fastdit.models import LatentDecoder
from fastdit.noise.sampling import PerSampleNoise, sample
from fastdit.run_parts import Shape

# The number of samples drawn at once never changes, because matrix products round differently for another number of
# rows. A CPU draws few, so that a few samples are quick (more at once is no faster there). It does not draw 8: MKL's
# AVX2 product of 8, 32 or 200 rows rounds by a row's position, that of 12, 16, 24, 48 or 192 does not. A GPU draws
# enough to fill it.
BATCH = {"cpu": 12, "cuda": 128}


def balanced_labels(n: int, classes: Sequence[int]) -> np.ndarray:
    """n labels (int64) that go round `classes`: counts differ by at most one."""
    return np.asarray(classes, dtype=np.int64)[np.arange(n) % len(classes)]


@torch.no_grad()
def draw(
    network: torch.nn.Module,
    process,
    settings: SampleConfig,
    shape: Shape,
    labels: np.ndarray,
    *,
    indices: Sequence[int],
    seed: int,
    device: torch.device,
    decoder: LatentDecoder | None = None,
    progress=None,
) -> torch.Tensor:
    """Samples (len(indices), C, H, W) float32 on the CPU; sample `i` has class labels[i] and noise (seed, i).

    With a decoder, which must be on the device: the pictures it makes of them, (len(indices), 3, H, W).

    The last batch is filled up by repetition, so that a sample does not depend, even in rounding, on how many are
    drawn with it.
    """
    shown = (lambda x: x) if decoder is None else decoder
    batch = BATCH[torch.device(device).type]
    rounds = [list(indices[at : at + batch]) for at in range(0, len(indices), batch)]
    parts = []
    for chunk in progress(rounds) if progress else rounds:
        filled = chunk + [chunk[-1]] * (batch - len(chunk))
        source = PerSampleNoise(seed, filled, device)
        x = sample(
            process,
            network,
            source((batch, shape.channels, shape.height, shape.width)),
            torch.as_tensor(labels[filled], device=device),
            steps=settings.steps,
            sampler=settings.sampler,
            guidance=settings.guidance,
            guidance_interval=settings.interval,
            guided_channels=settings.guided_channels,
            null_label=shape.classes,
            draw_noise=source,
        )
        parts.append(shown(x)[: len(chunk)].cpu())
    if not parts:
        parts = [shown(torch.empty(0, shape.channels, shape.height, shape.width, device=device)).cpu()]
    return torch.cat(parts)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """(n, C, H, W) in [-1, 1] to uint8 (n, H, W, C), rounded to the nearest level."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def grid(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """One row for each class, its name in front. images uint8 (n, H, W, 1 or 3), labels (n,)."""
    rows = [(label, images[labels == label]) for label in np.unique(labels)]
    height, width = images.shape[1:3]
    scale = max(1, 64 // max(height, width))
    gap, left = 2, 8 + 8 * max(len(names[label]) for label, _ in rows)
    cell = (width * scale + gap, height * scale + gap)
    columns = max(len(row) for _, row in rows)
    page = Image.new("RGB", (left + columns * cell[0], gap + len(rows) * cell[1]), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for r, (label, row) in enumerate(rows):
        top = gap + r * cell[1]
        pen.text((left - 6, top + cell[1] // 2), names[label], fill="black", font=font, anchor="rm")
        for c, pixels in enumerate(row):
            tile = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
            page.paste(
                tile.resize((width * scale, height * scale), Image.Resampling.NEAREST),
                (left + c * cell[0], top),
            )
    return page
