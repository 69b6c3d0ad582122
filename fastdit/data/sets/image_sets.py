"""Folders of PNG shards with a manifest, as `fastdit-data fetch` leaves them.

DIR/train, DIR/test   (or DIR itself, of a set in one piece) each with
    NAME-00.tar ...   shards
    classes.json      names of the classes
    manifest.json     source, licence, citation, counts of each class, a checksum of each shard
    .unfinished/      until they are complete
"""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastdit.data.manifest import MANIFEST, check_same, checksum, write_json
from fastdit.data.shards import UNFINISHED, Sample, write_shards
from fastdit.errors import UserError

PER_SHARD = 5000


@dataclass(frozen=True)
class Split:
    """One folder's samples.

    Args:
        name: of the folder below the set's; "" is the set's own folder.
        class_names: by label.
        n: samples.
        samples: key, pixels uint8 (H, W) or (H, W, 3), and label of each.
    """

    name: str
    class_names: Sequence[str]
    n: int
    samples: Iterable[tuple[str, np.ndarray, int]]


def png(image: np.ndarray) -> bytes:
    """A grey (H, W) or colour (H, W, 3) image, uint8, as PNG, as small as zlib makes it."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def is_complete(folder: Path, same: dict) -> bool:
    """Whether the folder holds a whole split. Raises UserError for one whose manifest is not as `same`, or others'."""
    if (folder / UNFINISHED).exists():
        return False
    if (folder / MANIFEST).is_file():
        check_same(folder / MANIFEST, same)
        return True
    if any(folder.glob("*.tar")):
        raise UserError(f"--out {folder}: holds other shards; choose another folder")
    return False


def write_split(folder: Path, split: Split, about: dict, progress: Callable[[int], object]) -> None:
    """Write one split's folder, anew if it was begun; `progress` is told of each sample.

    The manifest holds `about` too, whose `dataset` names the shards.
    """
    (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    labels: list[int] = []

    def encoded() -> Iterator[Sample]:
        for key, pixels, label in split.samples:
            labels.append(label)
            progress(1)
            yield key, {"png": png(pixels), "cls": str(label).encode()}

    paths = write_shards(folder / f"{about['dataset']}-%02d.tar", encoded(), PER_SHARD)
    held = (min(PER_SHARD, len(labels) - at) for at in range(0, len(labels), PER_SHARD))
    shards = {path.name: {"samples": n, "sha256": checksum(path)} for path, n in zip(paths, held, strict=True)}
    counts = np.bincount(labels, minlength=len(split.class_names)).tolist()
    write_json(folder / "classes.json", split.class_names)
    write_json(folder / MANIFEST, about | {"split": split.name, "counts": counts, "shards": shards})
    shutil.rmtree(folder / UNFINISHED)
