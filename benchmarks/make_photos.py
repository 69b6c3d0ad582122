"""JPEGs as large and as detailed as ImageNet's, for the loader benchmark: `python benchmarks/make_photos.py OUT`.

Crops of scikit-learn's two photographs (CC BY 2.0), 500 x 375 pixels or upright, of four qualities, 4:2:0; about 100 kB
each. Always the same 2,000 images, in 10 classes.
"""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from fastdit.data import write_shards

COUNT, CLASSES = 2000, 10
LONG, SHORT = 500, 375


def photos() -> Iterator[tuple[str, dict[str, bytes]]]:
    pictures = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        picture = pictures[i % len(pictures)]
        width, height = (LONG, SHORT) if rng.random() < 0.7 else (SHORT, LONG)
        share = rng.uniform(0.6, 1) * min(picture.width / width, picture.height / height)
        box = round(width * share), round(height * share)
        left, top = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(picture.size, box))
        crop = picture.crop((left, top, left + box[0], top + box[1]))
        out = io.BytesIO()
        crop.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=(90, 95, 97, 98)[i % 4])
        yield f"photo-{i:04d}", {"jpg": out.getvalue(), "cls": str(i % CLASSES).encode()}


def main(out: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = write_shards(folder / "photos-%02d.tar", photos(), 500)
    (folder / "classes.json").write_text(json.dumps([str(k) for k in range(CLASSES)]))
    size = sum(path.stat().st_size for path in paths)
    print(f"{COUNT} images, {size / COUNT / 1e3:.0f} kB each, in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
