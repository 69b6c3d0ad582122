"""A source is a numbered set of labelled samples. `open_source` recognises what a path or name means."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastdit.data.folders import FolderSamples
from fastdit.data.latents import LatentSamples
from fastdit.data.shards import UNFINISHED, Report, ShardSamples, find_shards, refuse
from fastdit.data.synthetic import SyntheticSamples
from fastdit.errors import UserError

Samples = ShardSamples | FolderSamples | LatentSamples | SyntheticSamples
_MOST_CLASSES = 1_000_000  # more than that is a damaged label
_SHIPPED = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled samples 0 .. n-1. `kind` says what `read` gives; `labels` is (n,) int64 below `classes`."""

    path: str
    kind: Literal["image", "latent", "synthetic"]
    samples: Samples
    class_names: tuple[str, ...]

    @property
    def n(self) -> int:
        return len(self.samples.labels)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def labels(self) -> np.ndarray:
        return self.samples.labels

    def read(self, i: int) -> np.ndarray:
        """Sample `i`: an image file's bytes, uint8 (size,), not decoded; or a latent's mean, std[, mirrored
        mean, std], float16 or float32 (2 or 4, C, H, W); or a synthetic image, uint8 (C, H, W)."""
        return self.samples.read(i)

    def where(self, i: int) -> str:
        """How an error names sample `i`: file, and key where a file holds many."""
        return self.samples.where(i)


def open_source(path: str, *, classes: int | None = None) -> Source:
    """Opens the source that `path` means:

    - the bare name of a shipped set (`fashion_mnist`; write `./fashion_mnist` for a folder of your own);
    - `synthetic` or `synthetic:CxHxW:CLASSES:N`;
    - a `.tar` shard, a folder of shards, or a pattern `shards-{000..099}.tar`: images or latents;
    - a tree of class folders.

    The number of classes is `classes` if given, else that of the class folders or of the names in the shards'
    `classes.json` (a list of strings beside them), else the largest label + 1.
    Raises UserError, also where a label is not below the number of classes.
    """
    path = str(path)
    if path.partition(":")[0] == "synthetic":
        samples, kind, names = SyntheticSamples.parse(path), "synthetic", ()
    elif isinstance(found := locate(path), Path):
        samples, kind = FolderSamples(found), "image"
        names = samples.class_names
    else:
        check_finished(found[0].parent)
        samples = ShardSamples(found)
        kind = "latent" if samples.is_latent else "image"
        samples = LatentSamples(samples) if samples.is_latent else samples
        names = read_class_names(found[0].parent)

    count = classes or len(names) or classes_needed(samples)
    check_labels(samples, count)
    names = (*names[:count], *(str(i) for i in range(len(names), count)))
    return Source(path, kind, samples, names)


def locate(path: str) -> Path | list[Path]:
    """What a path or the name of a shipped set means: the root of a tree of class folders, or shards."""
    if "{" not in path and (folder := _shipped(path)).is_dir() and not any(folder.glob("*.tar")):
        return folder
    return find_shards(str(_shipped(path)))


def check_finished(folder: Path, report: Report = refuse) -> None:
    """That its shards are no part of what is still being written."""
    if (folder / UNFINISHED).exists():
        report(UserError(f"{folder}: not all of its shards are written yet; run again what writes them"))


def classes_needed(samples: Samples) -> int:
    """As many as the labels ask for, from 1 to a million."""
    return int(np.clip(samples.labels.max(initial=0) + 1, 1, _MOST_CLASSES))


def check_labels(samples: Samples, classes: int, report: Report = refuse) -> None:
    """That each label is one of `classes`."""
    for i in np.flatnonzero((samples.labels < 0) | (samples.labels >= classes)):
        what = f"label {samples.labels[i]} is out of range for {classes} classes (0 to {classes - 1})"
        report(UserError(f"{samples.where(i)}: {what}; mend the label or the number of classes"))


def _shipped(path: str) -> Path:
    """The folder of the shipped set of that name, else `path` itself."""
    shipped = _SHIPPED / path
    if path and Path(path).name == path and shipped.is_dir():
        return shipped
    if not path or ("{" not in path and not Path(path).exists()):
        names = ", ".join(sorted(p.name for p in _SHIPPED.iterdir() if p.is_dir()))
        raise UserError(f"{path or 'data path'}: no such file or folder; sets that ship with fastdit: {names}")
    return Path(path)


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Those in `classes.json` beside shards; none where there is no such file. Raises UserError."""
    path = folder / "classes.json"
    if not path.is_file():
        return ()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON; write a list of class names") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}: is not a list of class names, such as ["cat", "dog"]')
    return tuple(names)
