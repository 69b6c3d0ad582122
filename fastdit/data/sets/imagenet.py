"""Convert ImageNet's training images from the official tar of class tars to shards, without unpacking.

ILSVRC2012_img_train.tar holds nNNNNNNNN.tar (a WordNet id) for each class, and that holds nNNNNNNNN_NUMBER.JPEG. The
label of a class is its rank among the ids. Samples keep the tar's order and bytes, because the loader shuffles them.

    out/imagenet-00000.tar ...         each appears when it is whole
    out/.unfinished/                   settings.json, and a record of each shard that is done; removed at the end
    out/manifest.json, classes.json    at the end
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdit.data.manifest import MANIFEST, check_same, read_manifest, write_json
from fastdit.data.shards import UNFINISHED, Sample, write_shard
from fastdit.data.tar_archives import tar_members
from fastdit.errors import UserError
from fastdit.files import sha256_of

IMAGES, CLASSES = 1_281_167, 1000
INSTRUCTIONS = """\
ImageNet (ILSVRC 2012) is given to registered users only; fastdit cannot obtain it.
1. Register at https://image-net.org/signup and ask for access at https://image-net.org/download-images
   (terms: non-commercial research and education only; images are not to be passed on).
2. Under "ILSVRC2012", download "Training images (Task 1 & 2)":
   ILSVRC2012_img_train.tar, 147,897,477,120 bytes, md5 1d675b47d978889d74fa0da5fadfb00e, 1,281,167 images
3. md5sum ILSVRC2012_img_train.tar
4. Make shards (as large again; the tar is not unpacked):
   fastdit-data convert-imagenet ILSVRC2012_img_train.tar --out data/imagenet
   (--names LOC_synset_mapping.txt names the classes; labels are ranks of the WordNet ids, as is usual)
5. Make latents with an autoencoder, here one in models/sd-vae:
   python fastdit/encode.py --source data/imagenet --size 256 --autoencoder models/sd-vae --out data/imagenet-latents
   It prints the flags to train with at its end; add --preset imagenet256.
Cite: Russakovsky et al.: ImageNet Large Scale Visual Recognition Challenge. IJCV 115, 2015"""
_ABOUT = {
    "home": "https://image-net.org",
    "licence": "ImageNet's terms of access: non-commercial research and education only; not to be passed on",
    "citation": "Russakovsky et al.: ImageNet Large Scale Visual Recognition Challenge. IJCV 115, 2015",
}


class _Image(NamedTuple):
    """Locate an image in the tar: key, extension, the WordNet id of its class, and start and size in bytes."""

    key: str
    extension: str
    wnid: str
    start: int
    size: int


def convert(
    tar: Path, out: Path, *, per_shard: int, names: Mapping[str, str] | None, progress: Callable[[int], object]
) -> dict:
    """Write the shards that `out` still lacks, and the manifest, and return the manifest.

    names: names of the classes by WordNet id; None names the classes by their ids.
    progress: called with the number of bytes of the tar that were done since the last call.

    Raises UserError. For a damaged tar it names the byte.
    """
    # Find the classes, and check that the work can begin or continue.
    data = _mapped(tar)
    class_tars = _class_tars(tar, data)
    wnids = sorted(wnid for wnid, _, _ in class_tars)
    unnamed = [wnid for wnid in wnids if names is not None and wnid not in names]
    if unnamed:
        raise UserError(f"--names: has no name for {unnamed[0]}; write a line `{unnamed[0]} its name`")
    settings = {"dataset": "imagenet-1k", "source": tar.name, "bytes": len(data), "per_shard": per_shard}
    if _is_finished(out, settings):
        return read_manifest(out)

    # Write each shard that has no record yet.
    images, records, done = _images(tar, data, class_tars), {}, 0
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    while part := list(islice(images, per_shard)):
        name = f"imagenet-{len(records):05d}.tar"
        record = out / UNFINISHED / f"{name}.json"
        if not record.is_file():
            write_shard(out / name, _samples(data, part, labels))
            counts = Counter(image.wnid for image in part)
            write_json(record, {"samples": len(part), "sha256": sha256_of(out / name), "counts": counts})
        records[name] = json.loads(record.read_text(encoding="utf-8"))
        progress(part[-1].start + part[-1].size - done)
        done = part[-1].start + part[-1].size

    # Write the manifest.
    total = sum((Counter(record.pop("counts")) for record in records.values()), Counter())
    counts = {"counts": [total[wnid] for wnid in wnids], "shards": records}
    write_json(out / "classes.json", [names[wnid] if names else wnid for wnid in wnids])
    write_json(out / MANIFEST, settings | _ABOUT | counts)
    shutil.rmtree(out / UNFINISHED)
    return read_manifest(out)


def read_names(path: Path) -> dict[str, str]:
    """Return {WordNet id: name} from a text file with lines `n01440764 tench, Tinca tinca`. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--names {path}: cannot be read ({error})") from None
    names = {}
    for number, line in enumerate(lines, 1):
        if found := re.fullmatch(r"(n\d{8})\s+(\S.*)", line.strip()):
            names[found[1]] = found[2]
        elif line.strip():
            raise UserError(f"--names {path}: line {number} is not `n01440764 name of the class`")
    return names


def _mapped(tar: Path) -> np.ndarray:
    """Return the bytes of the tar, uint8 (size,), as a memory map. Raises UserError if it cannot be read.

    The map is read-only: unlike a private writable map, it may be larger than the memory.
    """
    try:
        return np.memmap(tar, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{tar}: cannot be read ({error}); give ILSVRC2012_img_train.tar") from None


def _class_tars(tar: Path, data: np.ndarray) -> list[tuple[str, int, int]]:
    """Return (WordNet id, start, size) of each class, in the tar's order. Raises UserError for another tar."""
    found: dict[str, tuple[str, int, int]] = {}
    for name, start, size in tar_members(tar, data):
        match = re.fullmatch(r"(?:.*/)?(n\d{8})\.tar", name)
        if match is None or match[1] in found:
            wrong = "is there twice" if match else "is no class's tar, such as n01440764.tar"
            raise UserError(f"{tar}: '{name}' before byte {start} {wrong}; give ILSVRC2012_img_train.tar as it came")
        found[match[1]] = (match[1], start, size)
    if not found:
        raise UserError(f"{tar}: is empty; give ILSVRC2012_img_train.tar as it came")
    return list(found.values())


def _images(tar: Path, data: np.ndarray, class_tars: list[tuple[str, int, int]]) -> Iterator[_Image]:
    """Yield the images in the tar's order, reading headers only. Raises UserError for another tar."""
    for wnid, start, size in class_tars:
        path, seen = Path(f"{tar}: {wnid}.tar from byte {start}"), set()
        for name, offset, length in tar_members(path, data[start : start + size]):
            match = re.fullmatch(rf"(?:.*/)?({wnid}_\d+)\.(jpe?g)", name, re.IGNORECASE)
            if match is None or match[1] in seen:
                wrong = "is there twice" if match else f"is no image of that class, such as {wnid}_1.JPEG"
                raise UserError(f"{path}: '{name}' {wrong}; give ILSVRC2012_img_train.tar as it came")
            seen.add(match[1])
            yield _Image(match[1], match[2].lower(), wnid, start + offset, length)


def _samples(data: np.ndarray, images: list[_Image], labels: Mapping[str, int]) -> Iterator[Sample]:
    """Yield `images` as the samples of a shard."""
    for image in images:
        content = data[image.start : image.start + image.size].tobytes()
        yield image.key, {image.extension: content, "cls": str(labels[image.wnid]).encode()}


def _is_finished(out: Path, settings: dict) -> bool:
    """Return whether `out` is complete, and begin the work if it is not begun.

    Raises UserError if `out` holds other shards, or work with other settings.
    """
    if (out / MANIFEST).is_file():
        check_same(out / MANIFEST, settings)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        return True
    begun = out / UNFINISHED / "settings.json"
    if begun.is_file():
        check_same(begun, settings)
        return False
    if any(out.glob("*.tar")):
        raise UserError(f"--out {out}: holds other shards; choose another folder")
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_json(begun, settings)
    return False
