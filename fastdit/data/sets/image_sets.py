"""Write folders of PNG shards with a manifest, for `fastdit-data fetch`.

DIR/train and DIR/test each hold
    NAME-00.tar ...   shards
    classes.json      names of the classes
    manifest.json     source, license, citation, counts of each class, a checksum of each shard
    .unfinished/      until they are complete
"""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastdit.data.manifest import MANIFEST, check_same, write_json
from fastdit.data.shards import UNFINISHED, Sample, write_shards
from fastdit.errors import UserError
from fastdit.files import sha256_of

PER_SHARD = 5000


@dataclass(frozen=True)
class Split:
    """Hold the samples of one folder.

    Args:
        name: the folder's name below the folder of the set.
        class_names: the name of each class, in the order of the labels.
        n: the number of samples.
        samples: key, pixels uint8 (H, W) or (H, W, 3), and class label of each sample.
    """

    name: str
    class_names: Sequence[str]
    n: int
    samples: Iterable[tuple[str, np.ndarray, int]]


def png(image: np.ndarray) -> bytes:
    """Return a gray (H, W) or RGB (H, W, 3) image, uint8, as a PNG file that is as small as zlib makes it."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def is_complete(folder: Path, settings: dict) -> bool:
    """Return whether the folder holds a whole split.

    Raises UserError if its manifest differs from `settings`, or if it holds other shards.
    """
    if (folder / UNFINISHED).exists():
        return False
    if (folder / MANIFEST).is_file():
        check_same(folder / MANIFEST, settings)
        return True
    if any(folder.glob("*.tar")):
        raise UserError(f"--out {folder}: holds other shards; choose another folder")
    return False


def write_split(folder: Path, split: Split, about: dict, progress: Callable[[int], object]) -> None:
    """Write the folder of one split, anew if it was begun earlier.

    about: more fields of the manifest; its `dataset` names the shards. progress: called with 1 for each sample.
    """
    # Write the shards.
    (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    labels: list[int] = []

    def encoded() -> Iterator[Sample]:
        for key, pixels, label in split.samples:
            labels.append(label)
            progress(1)
            yield key, {"png": png(pixels), "cls": str(label).encode()}

    paths = write_shards(folder / f"{about['dataset']}-%02d.tar", encoded(), PER_SHARD)

    # Write the manifest.
    sample_counts = (min(PER_SHARD, len(labels) - start) for start in range(0, len(labels), PER_SHARD))
    records = zip(paths, sample_counts, strict=True)
    shards = {path.name: {"samples": n, "sha256": sha256_of(path)} for path, n in records}
    counts = np.bincount(labels, minlength=len(split.class_names)).tolist()
    write_json(folder / "classes.json", split.class_names)
    write_json(folder / MANIFEST, about | {"split": split.name, "counts": counts, "shards": shards})
    shutil.rmtree(folder / UNFINISHED)
