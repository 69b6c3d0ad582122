"""Class agreement of a run's samples: the judge of `fastdit.metrics.class_agreement`, fitted on its training images."""

import numpy as np
import torch
from torch import Tensor

from fastdit import run_parts
from fastdit.config import Config
from fastdit.data import Source
from fastdit.metrics.class_agreement import class_agreement

KNOWN_IMAGES = 10_000  # the judge's share of the training images, at most


def known_images(config: Config, source: Source) -> tuple[Tensor, Tensor]:
    """The first training images (n, C, H, W), not mirrored, and their labels (n,), on the CPU."""
    batch, count = 500, min(source.n, KNOWN_IMAGES)
    here = {"rank": 0, "world": 1, "device": torch.device("cpu")}
    loader = run_parts.build_loader(config, source, batch=batch, flip=False, **here)
    pairs = [next(loader) for _ in range(-(-count // batch))]
    loader.close()
    images, labels = (torch.cat(parts)[:count] for parts in zip(*pairs))
    return images, labels


def agreement(images: np.ndarray, asked: np.ndarray, known: tuple[Tensor, Tensor]) -> float:
    """Share of samples, uint8 (n, H, W, C), in which the judge sees the class `asked` (n,)."""
    samples = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    return class_agreement(samples, torch.from_numpy(asked), *known)
