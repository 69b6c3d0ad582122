"""Turn any source into latents that the timed runs keep on the device, so that no run waits for its data.

    images    decoded once with Pillow, and written as 8-bit identity latents into a temporary folder
    latents   used as they are

An identity latent's mean is the image itself, and its mirrored view is the mirrored image. In 8 bits a mean is
-1 + codes * 2/255, and the codes are the image's own levels, so nothing is rounded. (float16 would take four times the
memory, half of it for standard deviations that are all zero.) DALI is not needed.

CIFAR-10 for a machine without network: `fastdit-data fetch cifar10`, then
`python benchmarks/convergence.py --data data/cifar10/train --pack cifar10.tar.gz` writes its 50,000 training images as
JPEGs of quality 95 without chroma subsampling, 45 MB. `--data cifar10.tar.gz` reads that file.
"""

import gzip
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdit.config import DataConfig
from fastdit.data import Source, make_loader, open_source, read_in_order, write_shard, write_shards
from fastdit.data.latents import quantized_dtype
from fastdit.errors import UserError

QUALITY = 95  # of packed JPEGs
PACKED = ".tar.gz"
DECODED_AT_ONCE, PER_SHARD = 1000, 5000
LARGEST = 8 << 30  # bytes of decoded images and their mirror images
MOST_WORKERS = 8


@dataclass(frozen=True)
class Data:
    """A source as the runs train on it.

    Args:
        path: latents, for `data.source`.
        name: the source's own name.
        n, classes: its samples and classes.
        shape: channels, height and width of a sample.
        pictures: whether samples are images with values in [-1, 1].
        digest: identifies the content, also on another machine.
    """

    path: str
    name: str
    n: int
    classes: int
    shape: tuple[int, int, int]
    pictures: bool
    digest: str

    def flags(self) -> list[str]:
        """Return the flags of fastdit/train.py for this data."""
        channels, height, width = self.shape
        return [
            f"--data.source={self.path or self.name}", f"--data.channels={channels}", f"--data.size=[{height},{width}]",
            f"--data.classes={self.classes}", "--data.cache=device",
        ]  # fmt: skip


@contextmanager
def opened(name: str, size: int | None) -> Iterator[tuple[Source, Data]]:
    """Open a source, a packed one too, and describe it. Nothing is decoded yet: `path` is empty for images.

    Raises UserError where it holds neither images nor latents.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _unpack(name, Path(folder)) if name.endswith(PACKED) else name
        source = open_source(path)
        if source.kind == "synthetic":
            raise UserError(f"--data {name}: is made up, so nothing can be judged by it; give images or latents")
        shape = source.samples.shape if source.kind == "latent" else _image_shape(source, size)
        if source.kind == "image" and 2 * source.n * int(np.prod(shape)) > LARGEST:
            raise UserError(
                f"--data {name}: {source.n:,} images of {shape[1]}x{shape[2]} take more than {LARGEST >> 30} GiB "
                "decoded; give a smaller --size, or latents made by fastdit/encode.py"
            )
        latent = source.kind == "latent"
        where = path if latent else ""
        yield source, Data(where, Path(name).name, source.n, source.classes, shape, not latent, _digest(source))


@contextmanager
def at_hand(source: Source, data: Data) -> Iterator[Data]:
    """Yield `data` with the path of its latents. Those of images are written first, and removed at the end.

    Raises UserError for an image that cannot be decoded.
    """
    if data.path:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "images-%03d.tar", _latents(source, data.shape), PER_SHARD)
        yield Data(folder, data.name, data.n, data.classes, data.shape, True, data.digest)


def read_samples(data: Data, config: DataConfig, count: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return `count` samples (count, C, H, W), chosen at random but always the same, not mirrored; and their labels.

    They are read as training reads them. The third value is the `checksum` of all samples.
    """
    batch = 500
    channels, *size = data.shape
    options = {"latent_scale": config.latent_scale, "latent_shift": config.latent_shift}
    options |= {"flip": False, "device": device, "cache": "device"}
    source = open_source(data.path, classes=data.classes)
    loader = make_loader(source, batch=batch, size=tuple(size), channels=channels, **options)
    pairs = [next(loader) for _ in range(-(-count // batch))]
    loader.close()
    images, labels = (torch.cat(parts)[:count] for parts in zip(*pairs))
    return images, labels, checksum(loader.held.views)


def checksum(views: Tensor) -> int:
    """Return a number that depends on all bytes (n, bytes) of the samples and on their order."""
    places = torch.arange(1, len(views) + 1, device=views.device)
    return int((views.sum(1, dtype=torch.int64) * places).sum())


def pack(name: str, out: Path) -> tuple[int, int]:
    """Write all images of a source into one compressed shard of JPEGs. Return their number and the file's bytes.

    A shard's headers compress to almost nothing: CIFAR-10 takes 45 MB, 163 MB without gzip.
    """
    source = open_source(name)
    if source.kind != "image":
        raise UserError(f"--pack: {name} holds no images")
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "packed.tar"
        write_shard(shard, _jpegs(source))
        with shard.open("rb") as plain, gzip.open(out, "wb") as packed:
            shutil.copyfileobj(plain, packed)
    return source.n, out.stat().st_size


def _jpegs(source: Source) -> Iterator[tuple[str, dict[str, bytes]]]:
    for i in range(source.n):
        encoded = io.BytesIO()
        image = _open_image(source, i)
        image.convert("L" if image.mode == "L" else "RGB").save(encoded, "JPEG", quality=QUALITY, subsampling=0)
        yield f"{i:06d}", {"jpg": encoded.getvalue(), "cls": str(source.labels[i]).encode()}


def _unpack(name: str, folder: Path) -> str:
    path = folder / "packed.tar"
    try:
        with gzip.open(name) as packed, path.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    except (OSError, EOFError) as error:
        raise UserError(f"--data {name}: cannot be read ({error}); write it with --pack") from None
    return str(path)


def _open_image(source: Source, i: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(source.read(i).tobytes()))
    except OSError as error:
        raise UserError(f"{source.where(i)}: Pillow cannot decode the image ({error}); replace it") from None


def _image_shape(source: Source, size: int | None) -> tuple[int, int, int]:
    """Return (C, H, W) by the first image, or with both sides `size`."""
    first = _open_image(source, 0)
    height, width = (size, size) if size else (first.height, first.width)
    return 1 if first.mode in ("1", "L") else 3, height, width


def _digest(source: Source) -> str:
    """Return a checksum over all labels and 64 samples as they are stored."""
    content = hashlib.sha256(source.labels.tobytes())
    for i in np.unique(np.linspace(0, source.n - 1, 64).astype(int)).tolist():
        content.update(source.read(i).tobytes())
    return content.hexdigest()[:12]


def _latents(source: Source, shape: tuple[int, int, int]) -> Iterator[tuple[str, dict[str, bytes]]]:
    channels, *size = shape
    record = np.empty(2, quantized_dtype(shape))  # the image and its mirror image
    record["low"], record["step"] = -1, 2 / 255
    batches = [np.arange(at, min(at + DECODED_AT_ONCE, source.n)) for at in range(0, source.n, DECODED_AT_ONCE)]
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    # Pillow also where DALI is installed: their decoders differ by a level or two, and all machines train on one set.
    options = {"size": tuple(size), "device": torch.device("cpu"), "threads": workers, "reader": "torch"}
    for ids, x in read_in_order(source, batches, **options):
        levels = ((x[:, :channels] + 1) * 127.5).round().to(torch.uint8).numpy()  # grey images have equal channels
        for i, pixels in zip(ids.tolist(), levels):
            record["codes"][0], record["codes"][1] = pixels, pixels[..., ::-1]
            stored = io.BytesIO()
            np.save(stored, record)
            yield f"{i:08d}", {"npy": stored.getvalue(), "cls": str(source.labels[i]).encode()}
