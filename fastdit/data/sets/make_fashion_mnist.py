"""Make the shipped Fashion-MNIST shards from the 10,000-image pair of idx files.

The same Pillow gives the same bytes again. Usage:

python fastdit/data/sets/make_fashion_mnist.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz OUT
"""

import json
import sys
from pathlib import Path

from fastdit.data.manifest import MANIFEST, build_manifest, write_json
from fastdit.data.sets.fashion_mnist import CLASS_NAMES, read_idx
from fastdit.data.sets.image_sets import png
from fastdit.data.shards import ShardSamples, write_shards
from fastdit.errors import UserError


def main(images: str, labels: str, out: str) -> None:
    """Write shards, class names and manifest to the folder `out`. Raises UserError for files of another format."""
    pixels, numbers = read_idx(images), read_idx(labels)
    Path(out).mkdir(parents=True, exist_ok=True)
    samples = (
        (f"t10k-{i:05d}", {"png": png(image), "cls": str(number).encode()})
        for i, (image, number) in enumerate(zip(pixels, numbers, strict=True))
    )
    paths = write_shards(Path(out) / "fashion-mnist-%02d.tar", samples, per_shard=-(-len(pixels) // 10))
    (Path(out) / "classes.json").write_text(json.dumps(CLASS_NAMES, indent=2) + "\n", encoding="utf-8")
    write_json(Path(out) / MANIFEST, build_manifest(ShardSamples(paths), len(CLASS_NAMES)))
    total = sum(path.stat().st_size for path in paths)
    print(f"{len(pixels)} images in {len(paths)} shards, {total / 1e6:.1f} MB: {out}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
