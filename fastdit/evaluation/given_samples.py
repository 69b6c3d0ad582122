"""Open samples that were made elsewhere: a folder of images, WebDataset shards, an .npz, or a Hugging Face data set."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastdit.data import Source, open_source
from fastdit.data.pillow_images import Header, decode, read_header
from fastdit.errors import UserError
from fastdit.evaluation import reference

FLAG = "--samples_from"
_KINDS = {1: "gray", 3: "color"}
_LOSSY = ("JPEG", "GIF")
_THREADS = 4
_LOOKED_AT = 16  # real images whose headers are compared with the samples


@dataclass(frozen=True)
class GivenSamples:
    """Number images of one size, uint8, from 0 to n - 1.

    Args:
        path: where they come from.
        n: number of images.
        size: height, width and channels (1 or 3) of each.
        read: returns the images of some ids, uint8 (b, H, W, C); a UserError names one that cannot be read.
        labels: class label of each image, int64 (n,), or None if they are not known.
        class_names: names of the classes, or () if they are not known.
        notes: lines about what may move the figures.
    """

    path: str
    n: int
    size: tuple[int, int, int]
    read: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray | None = None
    class_names: Sequence[str] = ()
    notes: tuple[str, ...] = ()


def open_samples(path: str, n: int | None, check: bool = True, **columns: str | None) -> GivenSamples:
    """Open the images at `path`, the first `n` of a fixed random order, or all of them.

    check: whether to read the header of every image file, so that one of another size is found before the work begins.
    columns: the columns of a Hugging Face data set, as `open_source` takes them.

    Raises UserError if they are no images, of different sizes, neither gray nor color, or too few.
    """
    found = _of_archive(path) if path.endswith(".npz") else _of_source(path, check, columns)
    if n is not None and n > found.n:
        raise UserError(f"{FLAG} {path}: has {found.n:,} images, {n:,} are asked for (--n)")
    if found.n < 2:
        raise UserError(f"{FLAG} {path}: has {found.n} image; a comparison takes 2 or more")
    if n is None or n == found.n:
        return found
    ids = np.random.default_rng(0).permutation(found.n)[:n]  # the files may be in the order of classes
    labels = None if found.labels is None else found.labels[ids]
    return GivenSamples(path, n, found.size, lambda some: found.read(ids[some]), labels, found.class_names, found.notes)


def check_reference(samples: GivenSamples, source: Source) -> list[str]:
    """Return lines about real images that fit the samples badly. Raises UserError if only one of both is gray."""
    notes, (height, width, channels) = [], samples.size
    for i in np.unique(np.linspace(0, source.n - 1, _LOOKED_AT).astype(int)).tolist():
        try:
            header = read_header(source.read(i))
        except Exception:  # an image that Pillow cannot open is reported where it is read
            continue
        kind = 1 if header.channels < 3 else 3
        if kind != channels:
            raise UserError(
                f"--data {source.path}: {source.where(i)} is {_KINDS[kind]}, and {FLAG} {samples.path} is "
                f"{_KINDS[channels]}; convert one of the two sets"
            )
        if header.height < height or header.width < width:
            notes = [
                f"note: real images of {header.height}x{header.width} (such as {source.where(i)}) are enlarged to "
                f"{height}x{width}"
            ]
    return notes


def _of_archive(path: str) -> GivenSamples:
    """Open an .npz with the array `images` or `arr_0`, and maybe `labels` or `arr_1`. Raises UserError."""
    arrays = reference.read_archive(path, "give an .npz with images (arr_0), uint8 (n, H, W, 3)")
    images = next((arrays[name] for name in ("images", "arr_0") if name in arrays), None)
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in _KINDS:
        held = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise UserError(f"{FLAG} {path}: holds no images (images or arr_0) of uint8 (n, H, W, 1 or 3), but {held}")
    labels = next((arrays[name] for name in ("labels", "arr_1") if name in arrays), None)
    fits = labels is not None and labels.shape == (len(images),) and np.issubdtype(labels.dtype, np.integer)
    return GivenSamples(
        path, len(images), images.shape[1:], lambda ids: images[ids], labels.astype(np.int64) if fits else None
    )


def _of_source(path: str, check: bool, columns: dict) -> GivenSamples:
    """Open files of images. Raises UserError."""
    if not Path(path).exists() and not any(sign in path for sign in "*{"):
        raise UserError(f"{FLAG} {path}: no such file or folder")
    source = open_source(path, flat=True, **columns)
    if source.kind != "image":
        raise UserError(f"{FLAG} {path}: holds {source.kind}s; give images")
    first = _header(source, 0)
    size = first.height, first.width, first.channels
    if first.channels not in _KINDS:
        raise UserError(f"{FLAG}: {source.where(0)} has {first.channels} channels; save it as plain color or gray")
    lossy = [0] if first.format in _LOSSY else []
    for i in range(1, source.n) if check else ():
        header = _header(source, i)
        if header[:3] != size:
            raise _misfit(source, i, header[:3], size)
        if header.format in _LOSSY:
            lossy.append(i)
    compressed = f"note: {len(lossy):,} samples are compressed with loss, which moves the figures"
    pool = ThreadPoolExecutor(_THREADS, "fastdit-samples")
    Image.init()

    def read(ids: np.ndarray) -> np.ndarray:
        return np.stack(list(pool.map(lambda i: _pixels(source, i, size), ids.tolist())))

    named = source.class_names if source.classes > 1 else ()
    return GivenSamples(path, source.n, size, read, source.labels, named, (compressed,) if lossy else ())


def _header(source: Source, i: int) -> Header:
    """Return the header of image `i`. Raises UserError."""
    try:
        return read_header(source.read(i))
    except Exception:  # a damaged file makes Pillow's parsers fail in many ways
        raise UserError(f"{FLAG}: {source.where(i)} is no image that can be read; remove it") from None


def _pixels(source: Source, i: int, size: tuple[int, int, int]) -> np.ndarray:
    """Return the pixels of image `i`, uint8 `size`. Raises UserError."""
    try:
        image, channels = decode(source.read(i))
    except MemoryError:
        raise
    except Exception:  # as above
        raise UserError(f"{FLAG}: {source.where(i)} is damaged; make it again, or remove it") from None
    if (image.height, image.width, channels) != size:
        raise _misfit(source, i, (image.height, image.width, channels), size)
    mode = "L" if channels == 1 else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode)).reshape(size)


def _misfit(source: Source, i: int, found: tuple[int, int, int], size: tuple[int, int, int]) -> UserError:
    """Return the error for image `i`, whose height, width and channels are not those of the first."""
    shapes = [f"{height}x{width} with {channels} channels" for height, width, channels in (found, size)]
    return UserError(f"{FLAG}: {source.where(i)} is {shapes[0]}, {source.where(0)} is {shapes[1]}; make them alike")
