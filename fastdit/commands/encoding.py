"""Latent shards of a source of images, made by any number of processes that need not know of each other.

    out/latents-00000.tar ...   the shards, in the source's order; each appears when it is whole
    out/.unfinished/            settings.json, and a record of each shard that is done; gone at the end
    out/manifest.json           at the end: settings, counts, statistics, a checksum of each shard
    out/classes.json            names of the classes

Shard k is the work of rank k mod world. What is done is not done again, by whatever ranks the work is continued.
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
from fastdit.data.latents import LatentForm
from fastdit.data.latents import quantize as quantise
from fastdit.data.manifest import MANIFEST, check_same, read_manifest, write_json
from fastdit.errors import UserError
from fastdit.files import sha256_of as checksum
from fastdit.models import Autoencoder

PICTURES = 8  # of each shard, that are decoded again


@dataclass(frozen=True)
class Settings:
    """What the shards of one folder have in common.

    Args:
        source: as given to `open_source`.
        samples: in it.
        size: height and width of the images that are encoded.
        autoencoder: its name, sha256, and the scale and shift it advises.
        dtype: of the latents; uint8 keeps the posteriors' means alone, quantised.
        mirrored: whether each mirrored image's latent is stored too.
        per_shard: samples.
    """

    source: str
    samples: int
    size: tuple[int, int]
    autoencoder: dict
    dtype: Literal["float16", "float32", "uint8"]
    mirrored: bool
    per_shard: int

    @property
    def shards(self) -> range:
        return range(-(-self.samples // self.per_shard))

    def ids(self, shard: int) -> range:
        """Of its samples, in the source."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.samples))


def name_of(shard: int) -> str:
    return f"latents-{shard:05d}.tar"


def remaining(out: Path, settings: Settings, rank: int, world: int) -> list[int]:
    """The shards that this rank still has to write into `out`. Raises UserError if it holds something else."""
    finished, own = out / MANIFEST, json.loads(json.dumps(asdict(settings)))
    begun = out / UNFINISHED / "settings.json"
    if finished.is_file() or begun.is_file():
        check_same(finished if finished.is_file() else begun, own)
    elif any(out.glob("*.tar")):
        raise UserError(f"--out {out}: holds other shards; choose another folder")
    if finished.is_file():
        return []
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_json(begun, own)
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
    """Write these shards; the autoencoder is on `device`. `progress` is told how many samples are done each time.

    Raises UserError for an image that cannot be decoded (unless on_corrupt is "skip") or a latent that is not finite.
    """
    chunks = [
        np.array(settings.ids(k)[at : at + batch]) for k in shards for at in range(0, len(settings.ids(k)), batch)
    ]
    images = read_in_order(source, chunks, size=settings.size, device=device, threads=threads, on_corrupt=on_corrupt)
    waiting = next(images, None)
    for shard in shards:
        statistics = Statistics()

        def samples(shard=shard, statistics=statistics) -> Iterator[tuple[str, dict[str, bytes]]]:
            nonlocal waiting
            while waiting is not None and int(waiting[0][0]) in settings.ids(shard):
                ids, x = waiting
                posteriors = _posteriors(autoencoder, x, settings)
                stored = _stored(posteriors.cpu().numpy(), settings, [source.where(i) for i in ids])
                means = statistics.add(stored, source.labels[ids])
                if not statistics.pictures:
                    few = slice(PICTURES)
                    statistics.compare(autoencoder, x[few], posteriors[few, 0], means[few])
                for i, latent in zip(ids.tolist(), stored):
                    yield f"{i:08d}", {"npy": _npy(latent), "cls": str(source.labels[i]).encode()}
                progress(len(ids))
                waiting = next(images, None)

        path = out / name_of(shard)
        write_shard(path, samples())
        write_json(_record(out, shard), {"sha256": checksum(path), **statistics.state()})


def finish(out: Path, settings: Settings, source: Source) -> dict | None:
    """Write the manifest if all shards are done, by whatever rank. Returns it; None if they are not."""
    try:
        records = {name_of(k): json.loads(_record(out, k).read_text(encoding="utf-8")) for k in settings.shards}
        write_json(out / "classes.json", source.class_names)
        write_json(out / MANIFEST, asdict(settings) | _merged(records, source.classes))
    except FileNotFoundError:  # another rank is not done, or was faster
        if not (out / MANIFEST).is_file():
            return None
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return read_manifest(out)


def _merged(records: dict[str, dict], classes: int) -> dict:
    """What a manifest says of all shards together. Standard deviations are those of draws from the posteriors.
    Raises UserError when there is not one sample.

    psnr: in dB, over a few images of each shard: of what their exact latents decode to, and of what the stored ones do.
    """
    labels = Counter()
    for record in records.values():
        labels.update({int(label): n for label, n in record["labels"].items()})
    total, squares, cells = (
        sum(np.array(record[part]) for record in records.values()) for part in ("sum", "squares", "cells")
    )
    if not cells:
        raise UserError("--source: none of its images can be decoded; see the warnings above")
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
    """Of one shard's latents as they are stored: labels, what mean and variance of each channel follow from, and what a
    few of them look like when decoded."""

    def __init__(self) -> None:
        self.labels, self.cells, self.sums = Counter(), 0, None
        self.pictures, self.errors = 0, [0.0, 0.0]

    def add(self, stored: np.ndarray, labels: np.ndarray) -> Tensor:
        """stored (b, ...), see data/latents.py; labels (b,). Returns the means that are read back, (b, C, h, w)."""
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
        """Pictures x (b, 3, H, W) in [-1, 1] with what their means, exact and as stored, (b, C, h, w), decode to."""
        self.pictures = len(x)
        for k, z in enumerate((exact, stored.to(x.device))):
            picture = torch.cat([autoencoder.decode(part) for part in z.split(1)]).clamp(-1, 1)
            self.errors[k] = (picture - x).double().square().mean((1, 2, 3)).sum().item()

    def state(self) -> dict:
        total, squares = (0, 0) if self.sums is None else self.sums.tolist()
        moments = {"cells": self.cells, "sum": total, "squares": squares}
        return {"labels": dict(self.labels), **moments, "pictures": self.pictures, "errors": self.errors}


def psnr(mean_square: float) -> float | None:
    """In dB, of pictures in [-1, 1]; None for those that are equal."""
    return 10 * math.log10(4 / mean_square) if mean_square else None


@torch.no_grad()
def _posteriors(autoencoder: Autoencoder, x: Tensor, settings: Settings) -> Tensor:
    """float32 (b, 2 or 4, C, h, w): mean and std, of the mirrored images too where they are stored."""
    views = [x, x.flip(-1)] if settings.mirrored else [x]
    return torch.stack([part for view in views for part in autoencoder.encode(view)], dim=1)


def _stored(posteriors: np.ndarray, settings: Settings, where: list[str]) -> np.ndarray:
    """As data/latents.py has it, (b, ...). Raises UserError for one that is not finite; `where` names the images."""
    quantised = settings.dtype == "uint8"
    with np.errstate(over="ignore"):
        kept = posteriors[:, ::2] if quantised else posteriors.astype(settings.dtype)
    wrong = np.flatnonzero(~np.isfinite(kept).reshape(len(kept), -1).all(1))
    if len(wrong):
        raise UserError(f"{where[wrong[0]]}: its latent is not finite in {settings.dtype}; encode as float32")
    return quantise(kept) if quantised else kept


def _npy(latent: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, latent)
    return out.getvalue()


def _record(out: Path, shard: int) -> Path:
    return out / UNFINISHED / f"{name_of(shard)}.json"
