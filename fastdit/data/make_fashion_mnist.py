"""Makes the shipped Fashion-MNIST shards from the 10,000-image pair of idx files.

Re-running it with the same Pillow gives the same bytes.

python fastdit/data/make_fashion_mnist.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz OUT
"""

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fastdit.data.shards import write_shards

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


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array in a gzipped idx file (MNIST's format: magic, big-endian extents, bytes)."""
    data = gzip.decompress(Path(path).read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: is no gzipped idx file of bytes")
    extents = np.frombuffer(data, dtype=">i4", count=data[3], offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * len(extents)).reshape(extents)


def png(image: np.ndarray) -> bytes:
    """A grey image (H, W) uint8 as PNG, as small as zlib makes it."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def main(images: str, labels: str, out: str) -> None:
    pictures, numbers = read_idx(images), read_idx(labels)
    Path(out).mkdir(parents=True, exist_ok=True)
    samples = (
        (f"t10k-{i:05d}", {"png": png(picture), "cls": str(number).encode()})
        for i, (picture, number) in enumerate(zip(pictures, numbers, strict=True))
    )
    paths = write_shards(Path(out) / "fashion-mnist-%02d.tar", samples, per_shard=-(-len(pictures) // 10))
    (Path(out) / "classes.json").write_text(json.dumps(CLASS_NAMES, indent=2) + "\n", encoding="utf-8")
    total = sum(path.stat().st_size for path in paths)
    print(f"{len(pictures)} images in {len(paths)} shards, {total / 1e6:.1f} MB: {out}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
