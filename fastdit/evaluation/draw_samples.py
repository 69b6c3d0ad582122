"""Draw samples from a network. A sample depends on its seed and index alone, however the work is split."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastdit.config import SampleConfig
from fastdit.models import LatentDecoder
from fastdit.noise.sampling import PerSampleNoise, sample
from fastdit.run_parts import Shape

# Samples in a batch, by type of device. The number is fixed, because the rounding of a matrix product depends on its
# number of rows. On a CPU it is small, so that a few samples are quick; larger batches are no faster there. It is not
# 8, because in MKL's AVX2 products of 8, 32 or 200 rows the rounding depends on a row's position. In those of 12, 16,
# 24, 48 or 192 rows it does not. On a GPU the number is large enough to fill it.
BATCH = {"cpu": 12, "cuda": 128}


def balanced_labels(n: int, classes: Sequence[int]) -> np.ndarray:
    """Return n class labels (int64) that cycle through `classes`, so that counts differ by at most one."""
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
    """Return the samples `indices` of `network`, float32 (len(indices), C, H, W) on the CPU, about [-1, 1] for images.

    Sample i has the class label labels[i], and its noise depends on (seed, i) alone. The last batch is filled up by
    repetition, so that the rounding of a sample does not depend on how many are drawn with it.

    network, decoder: on `device`, in eval mode. With a decoder, it returns the decoded images, (len(indices), 3, H, W).
    settings: steps, sampler, guidance and SDE.
    progress: wraps the list of batches, as tqdm does.
    """
    # Split the indices into batches.
    decode = (lambda x: x) if decoder is None else decoder
    batch = BATCH[torch.device(device).type]
    chunks = [list(indices[at : at + batch]) for at in range(0, len(indices), batch)]
    parts = []

    # Draw and decode each batch.
    for chunk in progress(chunks) if progress else chunks:
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
            sde=settings.sde,
            draw_noise=source,
        )
        parts.append(decode(x)[: len(chunk)].cpu())
    if not parts:
        parts = [decode(torch.empty(0, shape.channels, shape.height, shape.width, device=device)).cpu()]
    return torch.cat(parts)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Return images (n, C, H, W) in [-1, 1] as uint8 (n, H, W, C), clamped and rounded to the nearest level."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def grid(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Return a page with one row for each class label, behind the name of the class.

    images: uint8 (n, H, W, 1 or 3). labels: (n,). names: the class names, by label.
    """
    # Lay out the page: small images are enlarged to about 64 pixels.
    rows = [(label, images[labels == label]) for label in np.unique(labels)]
    height, width = images.shape[1:3]
    scale = max(1, 64 // max(height, width))
    gap, left = 2, 8 + 8 * max(len(names[label]) for label, _ in rows)
    cell = (width * scale + gap, height * scale + gap)
    columns = max(len(row) for _, row in rows)

    # Write each class's name, and paste its images.
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
