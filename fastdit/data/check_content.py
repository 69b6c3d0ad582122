"""Verify the content of samples: decode every image, and read the values of every latent."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from tqdm import tqdm

from fastdit.data.image_rules import decoding_fault
from fastdit.data.latents import LatentSamples, read_header
from fastdit.data.order import BatchFailed, Request
from fastdit.data.readers import choose_backend, find_corrupt
from fastdit.data.shards import ShardSamples
from fastdit.data.sources import Source
from fastdit.data.tar_archives import Report
from fastdit.errors import UserError

_BATCH = 32
_FAR = 10_000.0  # times the usual largest value: float16's own range is 65,504
_FAR_STDS = 1_000.0  # standard deviations of a channel: of n values, none is farther off than the root of n
_CHANNELS = ((1, "gray"), (2, "gray with alpha"), (3, "color"), (4, "with alpha, or CMYK"))


def check_images(source: Source, threads: int, report: Report) -> str:
    """Decode every image as training does, report those that are corrupt, and return a summary in words.

    The CPU decodes with `threads` threads, because a GPU leaves to the CPU what it cannot decode itself.
    """
    # Decode, and collect the height, width and channels of each file.
    backend = choose_backend("auto")
    options = {"batch": _BATCH, "device": torch.device("cpu"), "threads": threads, "prefetch": 2}
    options |= {"size": (8, 8), "channels": 3, "convert": True}
    shapes, bad = [np.empty((0, 3), dtype=np.int64)], 0
    reader = backend.module.ShapeReader(source, _requests(source.n), **options)
    with _progress(source.n, "decoding") as bar, closing(reader):
        for request in _requests(source.n):
            try:
                shapes.append(next(reader)[1])
            except BatchFailed as failure:
                corrupt = find_corrupt(failure)
                bad += len(corrupt)
                for i in corrupt:
                    fault = decoding_fault(source, i, "replace it")
                    report(UserError(f"{source.where(i)}: the image {fault}"))
            bar.update(len(request.ids))

    # Summarize kinds and extents.
    shapes = np.concatenate(shapes)
    kinds = ", ".join(f"{n} {name}" for c, name in _CHANNELS if (n := int((shapes[:, 2] == c).sum())))
    if not kinds:
        return f"{bad} images do not decode"
    by_area = shapes[np.argsort(shapes[:, 0] * shapes[:, 1], kind="stable"), :2]
    (h, w), (height, width) = by_area[0], by_area[-1]
    extents = f"{h} x {w}" if (h, w) == (height, width) else f"{h} x {w} to {height} x {width}"
    decoder = " by Pillow" if backend.name == "torch" else ""
    beyond = f"; {len(reader.by_pillow)} by Pillow instead of DALI" if reader.by_pillow else ""
    return f"{source.n - bad} images decode{decoder} ({kinds}; {extents} pixels{beyond})"


def _requests(n: int) -> Iterator[Request]:
    """Yield requests for the samples 0 .. n-1 in order, none of them mirrored."""
    for start in range(0, n, _BATCH):
        ids = np.arange(start, min(start + _BATCH, n))
        yield Request(start, ids, np.zeros(len(ids), dtype=bool))


def check_latents(samples: ShardSamples, report: Report, manifest: dict | None = None) -> str:
    """Report latents in another form than most, or with impossible values. Return a summary in words.

    Impossible are values that are not finite, standard deviations below 0, and values far out of the range of the
    others. `manifest` may hold the statistics of the channels.
    """
    alike = samples.subset(_of_one_form(samples, report))
    if not len(alike.labels):
        return "no latents can be read"
    latents = LatentSamples(alike)
    center, spread = _statistics(manifest, latents.shape[0])
    largest, deviation = np.zeros((2, len(alike.labels)))
    with _progress(len(alike.labels), "values") as bar:
        for i in range(len(alike.labels)):
            if wrong := _wrong_values(latents.read(i)):
                report(UserError(f"{latents.where(i)}: {wrong}; encode it again"))
            else:
                extremes = _extremes(latents.read(i))
                largest[i] = np.abs(extremes).max()
                deviation[i] = (np.abs(extremes - center) / spread).max()
            bar.update()

    # Compare the ranges of the latents, in which one with a huge value does not count for more than another.
    usual = np.median(largest[largest > 0]) if largest.any() else 0.0
    for i in np.flatnonzero((largest > _FAR * usual) | (deviation > _FAR_STDS)):
        report(
            UserError(
                f"{latents.where(i)}: the latent has a value of {largest[i]:.3g}, and the largest value of most is "
                f"about {usual:.3g}; encode it again"
            )
        )
    return f"latents {latents.form} are finite, none far out of range"


def _statistics(manifest: dict | None, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the channels, (channels, 1) each; 0 and infinity if they are not known."""
    try:
        mean, std = (np.array(manifest[name], np.float64)[:, None] for name in ("channel_mean", "channel_std"))
        if mean.shape == std.shape == (channels, 1) and np.isfinite(mean).all() and (std > 0).all():
            return mean, std
    except (KeyError, TypeError, ValueError, IndexError):
        pass
    return np.zeros((channels, 1)), np.full((channels, 1), np.inf)


def _extremes(latent: np.ndarray) -> np.ndarray:
    """Return the smallest and largest values of each channel of a latent, float64 (C, 2 for each stored array)."""
    if latent.dtype.names is not None:
        low, step = latent["low"].astype(np.float64), latent["step"].astype(np.float64)
        return np.concatenate([low, low + 255 * step]).T
    flat = latent.reshape(*latent.shape[:2], -1)
    return np.concatenate([flat.min(-1), flat.max(-1)]).astype(np.float64).T


def _of_one_form(samples: ShardSamples, report: Report) -> np.ndarray:
    """Return the ids of the latents in the most common form, (k,) int64, and report the others."""
    forms = []
    for i in range(len(samples.labels)):
        try:
            *_, start = read_header(samples.read(i), samples.where(i))
            forms.append((len(samples.read(i)), samples.read(i)[:start].tobytes()))
        except UserError as error:
            report(error)
            forms.append(None)
    usual, _ = Counter(filter(None, forms)).most_common(1)[0] if any(forms) else (None, 0)
    for i, form in enumerate(forms):
        if form not in (None, usual):
            report(UserError(f"{samples.where(i)}: the latent is not stored as most are; encode all samples alike"))
    return np.array([i for i, form in enumerate(forms) if form and form == usual], dtype=np.int64)


def _wrong_values(latent: np.ndarray) -> str | None:
    """Return the problem with a latent's values, or None. `latent` is an array as `LatentSamples.read` returns it."""
    quantized = latent.dtype.names is not None
    parts, spread = ([latent["low"], latent["step"]], latent["step"]) if quantized else ([latent], latent[1::2])
    if not all(np.isfinite(part).all() for part in parts):
        return "values of the latent are not finite"
    if (spread < 0).any():
        return f"{'steps' if quantized else 'standard deviations'} of the latent are negative"
    return None


def _progress(n: int, stage: str) -> tqdm:
    """Return a progress bar over `n` samples."""
    return tqdm(total=n, desc=stage, unit="sample", disable=None)
