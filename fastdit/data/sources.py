"""Open a source, which is a numbered set of labeled samples, from a path or a name."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastdit.data.find_tables import find_tables, is_table, tables_in
from fastdit.data.folders import FOLDERS, FolderSamples, holds_images
from fastdit.data.latents import LatentSamples
from fastdit.data.shards import (
    COMPRESSED,
    UNFINISHED,
    ShardSamples,
    by_split,
    find_shards,
    is_leftover,
    nested_shards,
    shards_in,
    shared_pattern,
)
from fastdit.data.synthetic import SyntheticSamples
from fastdit.data.tables import TableSamples
from fastdit.data.tar_archives import Report, refuse
from fastdit.errors import UserError, a_few

Samples = ShardSamples | FolderSamples | TableSamples | LatentSamples | SyntheticSamples
_MOST_CLASSES = 1_000_000  # a larger label is taken for a damaged one
_SHIPPED = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True, eq=False)
class Source:
    """Number labeled samples from 0 to n - 1.

    Args:
        path: the path or name that the source was opened from.
        kind: the kind of samples that `read` returns.
        samples: the samples behind this interface.
        class_names: the name of each class.
        notes: lines for the start of a run, about files that are not taken and classes without samples.
        own_classes: the number of classes that folders or `classes.json` give, None if only labels tell it.
    """

    path: str
    kind: Literal["image", "latent", "synthetic"]
    samples: Samples
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    own_classes: int | None = None

    @property
    def n(self) -> int:
        """Return the number of samples."""
        return len(self.samples.labels)

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    @property
    def labels(self) -> np.ndarray:
        """Return the class label of each sample, (n,) int64 from 0 to `classes` - 1."""
        return self.samples.labels

    def read(self, i: int) -> np.ndarray:
        """Return sample `i`.

        It is an image file's bytes, uint8 (size,), not decoded. Or it is a latent as stored: mean and std, maybe with
        those of the mirrored image, float16 or float32 (2 or 4, C, H, W), or records (1 or 2,), see latents.py. Or it
        is a synthetic image, uint8 (C, H, W).
        """
        return self.samples.read(i)

    def where(self, i: int) -> str:
        """Return the name of sample `i` for error messages: its file, and its key if the file holds many samples."""
        return self.samples.where(i)


def open_source(
    path: str,
    *,
    classes: int | None = None,
    labels: str = "auto",
    flat: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Open the source that `path` names:

    - the bare name of a shipped set (`fashion_mnist`; write `./fashion_mnist` for a folder of your own);
    - `synthetic` or `synthetic:CxHxW:CLASSES:N`;
    - a `.tar` shard, a folder of shards, or a pattern `shards-{000..099}.tar`: images or latents;
    - a Hugging Face data set: a parquet or Arrow file, a folder of them, or a pattern `train-*.parquet`;
    - a tree of class folders, or, with `flat` or one class, a folder of images.

    The number of classes is `classes` if it is set, else that of the class folders, of the data set's class names, or
    of the names in the shards' `classes.json` (a list of strings beside them), else the largest label + 1. `labels`
    chooses the folders of a tree that are its classes, or names a file of labels, as in `FolderSamples`; "none" puts
    all samples of any source into one class. `image_column` and `label_column` choose the columns of a Hugging Face
    data set, as in `TableSamples`.

    Raises UserError if the source cannot be read, or if a label is not below the number of classes.
    """
    # Find the samples.
    path, notes, unlabeled = str(path), (), flat or classes == 1 or labels == "none"
    if path.partition(":")[0] == "synthetic":
        samples, kind, names = SyntheticSamples.parse(path), "synthetic", ()
    elif isinstance(location := locate(path), Path):
        check_finished(location)
        samples, kind = FolderSamples(location, labels, unlabeled), "image"
        names = samples.class_names
        notes += (f"{path}: not taken: {samples.left_out}",) if samples.left_out else ()
    elif is_table(location[0]):
        columns = {"image_column": image_column, "label_column": label_column}
        samples, kind = (
            TableSamples(path, location, **columns, unlabeled=flat or classes == 1 or labels == "none"),
            "image",
        )
        names, notes = samples.class_names, samples.notes
    else:
        check_finished(location[0].parent)
        samples = ShardSamples(location)
        kind = "latent" if samples.is_latent else "image"
        samples = LatentSamples(samples) if samples.is_latent else samples
        names = read_class_names(location[0].parent)

    if labels not in FOLDERS and not isinstance(samples, FolderSamples):
        raise UserError(f"--data.labels {labels}: is for a folder of images, and {path} has labels of its own")

    # Drop the labels, if they are not wanted.
    if labels == "none":
        samples.labels, names = np.zeros_like(samples.labels), ()

    # Check the labels, and name classes that have no name by their numbers.
    own = len(names) or None
    count = classes or own or classes_needed(samples)
    check_labels(samples, count)
    notes += _unused_labels(path, samples.labels, count)
    names = (*names[:count], *(str(i) for i in range(len(names), count)))
    return Source(path, kind, samples, names, notes, own)


def locate(path: str) -> Path | list[Path]:
    """Return the root of a tree of class folders, or a list of shards or tables, for a path or a shipped set's name.

    Raises UserError if there is neither, if a folder holds both, or if shards lie in folders below it.
    """
    if is_table(path) and not Path(path).is_dir():  # Spark names folders so
        return find_tables(path)
    if "{" in path or "*" in path or not (folder := _shipped(path)).is_dir():
        return find_shards(str(_shipped(path)))
    if tables := tables_in(folder):
        return tables
    if not (shards := shards_in(folder)):
        if (nested := nested_shards(folder)) and not holds_images(folder):
            raise UserError(f"{folder}: its shards lie in folders; point --data.source at one of them: {nested.parent}")
        return folder
    if nested := nested_shards(folder):
        raise UserError(
            f"{folder}: holds shards (such as {shards[0].name}), and so does a folder in it ({nested.parent}); move "
            "all that belong together into one folder"
        )
    if len(sets := by_split(shards)) > 1:
        raise UserError(
            f"{folder}: holds shards of several splits ({', '.join(sets)}), which are not mixed; point --data.source "
            f"at one: {shared_pattern(next(iter(sets.values())))}, or at all: '{folder}/*.tar'"
        )
    for beside in sorted(p for p in folder.iterdir() if not is_leftover(p.name) and p.is_dir()):
        if holds_images(beside):
            raise UserError(
                f"{folder}: holds both .tar files (such as {shards[0].name}) and folders of images (such as "
                f"{beside.name}); move one of the two elsewhere"
            )
    if packed := sorted(p.name for p in folder.iterdir() if p.name.endswith(COMPRESSED) and p.name[0] != "."):
        raise UserError(
            f"{folder}: holds .tar shards and compressed archives (such as {packed[0]}), which are not read; unpack "
            "them, or move them elsewhere"
        )
    return shards


def check_finished(folder: Path, report: Report = refuse) -> None:
    """Report an error if the shards or pictures in `folder` are still being written."""
    if (folder / UNFINISHED).exists():
        report(UserError(f"{folder}: not all of its samples are written yet; run again what writes them"))


def check_apart(source: Source, out: Path, flag: str, around: bool = True) -> None:
    """Raise UserError if the folder `out`, the value of `flag`, is the source's tree of images or lies in it.

    around: whether a tree in `out` is refused too, as where shards are written: shards and images cannot be told apart.
    """
    if isinstance(source.samples, FolderSamples):
        tree, target = source.samples.root.resolve(), out.resolve()
        if tree == target or tree in target.parents or (around and target in tree.parents):
            raise UserError(
                f"{flag} {out}: it and the images in {source.path} lie one in the other; choose a folder beside them"
            )
    if around and out.is_dir() and holds_images(out):
        raise UserError(f"{flag} {out}: holds images, beside which shards are no source; choose another folder")


def classes_needed(samples: Samples) -> int:
    """Return the number of classes that the labels need, from 1 to a million."""
    return int(np.clip(samples.labels.max(initial=0) + 1, 1, _MOST_CLASSES))


def check_labels(samples: Samples, classes: int, report: Report = refuse) -> None:
    """Report each sample whose label is not from 0 to `classes` - 1."""
    for i in np.flatnonzero((samples.labels < 0) | (samples.labels >= classes)):
        problem = f"label {samples.labels[i]} is out of range for {classes} classes (0 to {classes - 1})"
        report(UserError(f"{samples.where(i)}: {problem}; mend the label or the number of classes"))


def check_classes(source: Source, asked: int | None, flag: str) -> None:
    """Raise UserError if `asked`, the value of `flag`, is not the number of classes of the source's own names."""
    own = source.own_classes
    if asked and own and asked != own:
        names = a_few(source.class_names[:own])
        raise UserError(f"{flag}: {asked}, but {source.path} has {own} classes ({names}); leave {flag} out")


def _unused_labels(path: str, labels: np.ndarray, classes: int) -> tuple[str, ...]:
    """Return a line about the classes without samples, or nothing if there are none."""
    unused = np.setdiff1d(np.arange(classes), labels).tolist()
    if not unused:
        return ()
    if unused == [0]:
        return (f"{path}: labels start at 1, so that class 0 has no samples; number them from 0 unless that is meant",)
    listed = ", ".join(map(str, unused[:5])) + (", ..." if len(unused) > 5 else "")
    return (f"{path}: {len(unused)} of {classes} classes have no samples ({listed}); their pictures will be noise",)


def _shipped(path: str) -> Path:
    """Return the folder of the shipped set of that name, else `path` itself. Raises UserError if there is neither."""
    shipped = _SHIPPED / path
    if path and Path(path).name == path and shipped.is_dir():
        return shipped
    if not path or not ("{" in path or "*" in path or Path(path).exists()):
        names = ", ".join(sorted(p.name for p in _SHIPPED.iterdir() if p.is_dir()))
        raise UserError(
            f"{path or 'data.source'}: no such file or folder; point --data.source at your data, take a set "
            f"that ships with fastdit ({names}), or get one with fastdit-data fetch"
        )
    return Path(path)


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Return the names in `classes.json` beside shards, () without one. Raises UserError if it holds no names."""
    path = folder / "classes.json"
    if not path.is_file():
        return ()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON; write a list of class names") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}: is not a list of class names, such as ["cat", "dog"]')
    return tuple(names)
