"""Compute the class agreement of a run's samples with its training images, by `fastdit.metrics.class_agreement`."""

import numpy as np
import torch
from torch import Tensor

from fastdit import run_parts
from fastdit.config import Config
from fastdit.data import Source
from fastdit.metrics.class_agreement import class_agreement

KNOWN_IMAGES = 10_000  # training images, at most, that the classifier is fitted on


def known_images(config: Config, source: Source) -> tuple[Tensor, Tensor]:
    """Return the first training images, not mirrored, and their class labels, on the CPU.

    The images are float32 (n, C, H, W) in [-1, 1] and the labels int64 (n,), with n at most KNOWN_IMAGES. Raises
    UserError if the source does not fit the settings.
    """
    batch, count = 500, min(source.n, KNOWN_IMAGES)
    place = {"rank": 0, "world": 1, "device": torch.device("cpu")}
    loader = run_parts.build_loader(config, source, batch=batch, flip=False, **place)
    pairs = [next(loader) for _ in range(-(-count // batch))]
    loader.close()
    images, labels = (torch.cat(parts)[:count] for parts in zip(*pairs))
    return images, labels


def agreement(images: np.ndarray, labels: np.ndarray, known: tuple[Tensor, Tensor]) -> float:
    """Return the share of samples that the classifier assigns to their class label.

    images: uint8 (n, H, W, C). labels: the class labels (n,) that the samples were drawn for. known: the images and
    labels from `known_images`, which the classifier is fitted on.
    """
    samples = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    return class_agreement(samples, torch.from_numpy(labels), *known)
