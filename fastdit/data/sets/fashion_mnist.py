"""Read Fashion-MNIST's raw format: gzipped idx files of images and labels."""

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastdit.data.sets.image_sets import Split
from fastdit.errors import UserError

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read(files: Mapping[str, Path]) -> list[Split]:
    """Return both splits from the set's four files, given by their official names. Raises UserError.

    A key is the name of the split's files and the image's number.
    """
    splits = []
    for name, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(files[f"{stem}-images-idx3-ubyte.gz"])
        labels = read_idx(files[f"{stem}-labels-idx1-ubyte.gz"]).tolist()
        keys = (f"{stem}-{i:05d}" for i in range(len(images)))
        splits.append(Split(name, CLASS_NAMES, len(images), zip(keys, images, labels, strict=True)))
    return splits


def read_idx(path: str | Path) -> np.ndarray:
    """Return the uint8 array in a gzipped idx file. Raises UserError if it is no such file.

    The format is MNIST's: a magic number, big-endian extents, bytes.
    """
    try:
        data = gzip.decompress(Path(path).read_bytes())
        if data[:3] != b"\0\0\x08":  # 8: unsigned bytes
            raise ValueError("magic number")
        extents = np.frombuffer(data, dtype=">i4", count=data[3], offset=4)
        return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * len(extents)).reshape(extents)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: is no gzipped idx file of bytes ({error}); get it again") from None
