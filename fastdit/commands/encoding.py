"""Encode a source of images into latent shards, with any number of processes that do not communicate.

    out/latents-00000.tar ...   the shards, in the source's order; each appears when it is complete
    out/.unfinished/            settings.json, and a record of each finished shard; removed at the end
    out/manifest.json           settings, counts, statistics, and a checksum of each shard; written at the end
    out/classes.json            names of the classes

Rank k mod world writes shard k. When the work is continued, even by another number of ranks, finished shards are kept.
"""

import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastdit.data import UNFINISHED, Source, read_in_order, write_shard
from fastdit.data.image_rules import Crop
from fastdit.data.latents import LatentForm, quantize
from fastdit.data.manifest import MANIFEST, check_same, read_manifest, write_json
from fastdit.errors import UserError
from fastdit.files import sha256_of
from fastdit.models import Autoencoder

OLDER = {"crop": "center"}  # settings that older versions did not write
PICTURES = 8  # images of each shard that are decoded again, to measure the PSNR


@dataclass(frozen=True)
class Settings:
    """Hold what the shards of one folder have in common.

    Args:
        source: path or name of the images, as given to `open_source`.
        samples: number of samples in the source.
        size: height and width of the images that are encoded, in pixels.
        autoencoder: name, sha256, scale and shift of the autoencoder.
        dtype: type of the stored latents; uint8 keeps only the posteriors' means, quantized.
        mirrored: whether the latent of each mirrored image is stored too.
        per_shard: number of samples in a shard.
        image_column, label_column: the columns of a Hugging Face data set, as given to `open_source`.
        crop: the way in which images were scaled to `size`, as `data.crop` of a run.
    """

    source: str
    samples: int
    size: tuple[int, int]
    autoencoder: dict
    dtype: Literal["float16", "float32", "uint8"]
    mirrored: bool
    per_shard: int
    image_column: str | None = None
    label_column: str | None = None
    crop: Crop = "center"

    @property
    def shards(self) -> range:
        """Return the numbers of the shards."""
        return range(-(-self.samples // self.per_shard))

    def ids(self, shard: int) -> range:
        """Return the source ids of the samples in a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.samples))


def name_of(shard: int) -> str:
    """Return the file name of a shard."""
    return f"latents-{shard:05d}.tar"


def remaining(out: Path, settings: Settings, rank: int, world: int) -> list[int]:
    """Return the shards that this rank still has to write into `out`. Raises UserError if it holds other shards."""
    finished, expected = out / MANIFEST, json.loads(json.dumps(asdict(settings)))
    begun = out / UNFINISHED / "settings.json"
    if finished.is_file() or begun.is_file():
        check_same(finished if finished.is_file() else begun, expected, OLDER)
    elif any(out.glob("*.tar")):
        raise UserError(f"--out {out}: holds other shards; choose another folder")
    if finished.is_file():
        return []
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_json(begun, expected)
    return [k for k in settings.shards if k % world == rank and not _record(out, k).is_file()]


def encode_shards(
    shards: list[int],
    source: Source,
    autoencoder: Autoencoder,
    out: Path,
    settings: Settings,
    *,
    batch: int,
    device: torch.device,
    threads: int,
    on_corrupt: Literal["stop", "skip"],
    progress: Callable[[int], object],
) -> None:
    """Write the shards with these numbers into `out`.

    batch: images that the autoencoder, which is on `device`, encodes at once.
    threads: CPU threads that decode images.
    progress: called with the number of samples that were encoded since the last call.

    Raises UserError for an image that cannot be decoded (unless on_corrupt is "skip") or a latent that is not finite.
    """
    # Read the images of all shards in order, in batches that end with their shard.
    chunks = [
        np.array(settings.ids(k)[at : at + batch]) for k in shards for at in range(0, len(settings.ids(k)), batch)
    ]
    options = {"size": settings.size, "crop": settings.crop, "on_corrupt": on_corrupt}
    images = read_in_order(source, chunks, device=device, threads=threads, **options)
    upcoming = next(images, None)
    for shard in shards:
        statistics = Statistics()

        def samples(shard=shard, statistics=statistics) -> Iterator[tuple[str, dict[str, bytes]]]:
            """Yield key and files of each sample of the shard."""
            nonlocal upcoming
            while upcoming is not None and int(upcoming[0][0]) in settings.ids(shard):
                # Encode a batch, and gather statistics of the latents.
                ids, x = upcoming
                posteriors = _posteriors(autoencoder, x, settings)
                stored = _stored(posteriors.cpu().numpy(), settings, [source.where(i) for i in ids])
                means = statistics.add(stored, source.labels[ids])
                if not statistics.pictures:
                    few = slice(PICTURES)
                    statistics.compare(autoencoder, x[few], posteriors[few, 0], means[few])

                # Yield its samples, and read the next batch.
                for i, latent in zip(ids.tolist(), stored):
                    yield f"{i:08d}", {"npy": _npy(latent), "cls": str(source.labels[i]).encode()}
                progress(len(ids))
                upcoming = next(images, None)

        # Write the shard, and then its record, by which it counts as finished.
        path = out / name_of(shard)
        write_shard(path, samples())
        write_json(_record(out, shard), {"sha256": sha256_of(path), **statistics.state()})


def finish(out: Path, settings: Settings, source: Source) -> dict | None:
    """Write the manifest if all shards are finished, and return it. Return None if they are not.

    Raises UserError if not one image could be encoded.
    """
    try:
        records = {name_of(k): json.loads(_record(out, k).read_text(encoding="utf-8")) for k in settings.shards}
        write_json(out / "classes.json", source.class_names)
        write_json(out / MANIFEST, asdict(settings) | _merged(records, source.classes))
    except FileNotFoundError:  # another rank is at work, or has written the manifest and removed the records
        if not (out / MANIFEST).is_file():
            return None
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return read_manifest(out)


def _merged(records: dict[str, dict], classes: int) -> dict:
    """Return the part of the manifest that sums up the records of all shards, by file name.

    channel_mean and channel_std are those of samples from the posteriors. psnr, in dB over a few images of each shard,
    compares images with what their exact latents and their stored latents decode to.

    Raises UserError if there is no sample.
    """
    # Add up the records.
    labels = Counter()
    for record in records.values():
        labels.update({int(label): n for label, n in record["labels"].items()})
    total, squares, cells = (
        sum(np.array(record[part]) for record in records.values()) for part in ("sum", "squares", "cells")
    )
    if not cells:
        raise UserError("--source: none of its images can be decoded; see the warnings above")

    # Compute the statistics from the sums.
    mean = total / cells
    pictures = sum(record["pictures"] for record in records.values())
    exact, stored = (psnr(sum(record["errors"][k] for record in records.values()) / pictures) for k in (0, 1))
    return {
        "encoded": labels.total(),
        "counts": [labels[label] for label in range(classes)],
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(squares / cells - mean**2).tolist(),
        "psnr": {"pictures": pictures, "autoencoder": exact, "stored": stored},
        "shards": {
            name: {"samples": sum(record["labels"].values()), "sha256": record["sha256"]}
            for name, record in records.items()
        },
    }


class Statistics:
    """Sum up one shard's latents as they are stored: labels, moments of each channel, and errors of decoded images."""

    def __init__(self) -> None:
        self.labels, self.cells, self.sums = Counter(), 0, None
        self.pictures, self.errors = 0, [0.0, 0.0]

    def add(self, stored: np.ndarray, labels: np.ndarray) -> Tensor:
        """Add stored latents (b, ...), in the form of data/latents.py, and their labels (b,).

        Return the posteriors' means as a reader gets them, (b, C, h, w), without those of mirrored images.
        """
        self.labels.update(labels.tolist())
        form = LatentForm.of(stored.dtype, stored.shape[1:])
        views = torch.from_numpy(stored.reshape(len(stored), -1).view(np.uint8)).view(-1, form.view_bytes)
        mean, std = form.unpack(views)
        squares = mean.double().square() + (std.double().square() if std is not None else 0)
        sums = torch.stack([mean.double().sum((0, 2, 3)), squares.sum((0, 2, 3))])
        self.sums = sums if self.sums is None else self.sums + sums
        self.cells += mean[:, 0].numel()
        return mean[:: form.views]

    @torch.no_grad()
    def compare(self, autoencoder: Autoencoder, x: Tensor, exact: Tensor, stored: Tensor) -> None:
        """Compare images with what their exact and their stored means decode to.

        x: (b, 3, H, W) in [-1, 1], on the autoencoder's device. exact, stored: (b, C, h, w).
        """
        self.pictures = len(x)
        for k, z in enumerate((exact, stored.to(x.device))):
            decoded = torch.cat([autoencoder.decode(part) for part in z.split(1)]).clamp(-1, 1)
            self.errors[k] = (decoded - x).double().square().mean((1, 2, 3)).sum().item()

    def state(self) -> dict:
        """Return the sums as numbers that JSON can hold."""
        total, squares = (0, 0) if self.sums is None else self.sums.tolist()
        moments = {"cells": self.cells, "sum": total, "squares": squares}
        return {"labels": dict(self.labels), **moments, "pictures": self.pictures, "errors": self.errors}


def psnr(mean_square: float) -> float | None:
    """Return the PSNR, in dB, of images in [-1, 1] with this mean squared error; None if it is zero."""
    return 10 * math.log10(4 / mean_square) if mean_square else None


@torch.no_grad()
def _posteriors(autoencoder: Autoencoder, x: Tensor, settings: Settings) -> Tensor:
    """Return mean and std of the posteriors, float32 (b, 2, C, h, w), or (b, 4, C, h, w) with mirrored images."""
    views = [x, x.flip(-1)] if settings.mirrored else [x]
    return torch.stack([part for view in views for part in autoencoder.encode(view)], dim=1)


def _stored(posteriors: np.ndarray, settings: Settings, where: list[str]) -> np.ndarray:
    """Return the posteriors in the form of data/latents.py, (b, ...).

    Raises UserError for a latent that is not finite in `settings.dtype`; `where` names the images.
    """
    quantized = settings.dtype == "uint8"
    with np.errstate(over="ignore"):
        latents = posteriors[:, ::2] if quantized else posteriors.astype(settings.dtype)
    wrong = np.flatnonzero(~np.isfinite(latents).reshape(len(latents), -1).all(1))
    if len(wrong):
        raise UserError(f"{where[wrong[0]]}: its latent is not finite in {settings.dtype}; encode as float32")
    return quantize(latents) if quantized else latents


def _npy(latent: np.ndarray) -> bytes:
    """Return a latent as the bytes of an .npy file."""
    out = io.BytesIO()
    np.save(out, latent)
    return out.getvalue()


def _record(out: Path, shard: int) -> Path:
    """Return the path of a shard's record."""
    return out / UNFINISHED / f"{name_of(shard)}.json"
