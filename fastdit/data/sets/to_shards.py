"""Write the images of any source to shards, for `fastdit-data convert`. The bytes of the images stay as they are.

out/images-00000.tar ...           each appears when it is whole
out/.unfinished/settings.json      until all are there
out/manifest.json, classes.json    at the end
"""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from fastdit.data.manifest import MANIFEST, build_manifest, check_same, read_manifest, write_json
from fastdit.data.shards import IMAGE_EXTENSIONS, UNFINISHED, Sample, ShardSamples, write_shard
from fastdit.data.sources import Source
from fastdit.errors import UserError


def convert(source: Source, out: Path, settings: dict, per_shard: int, progress: Callable[[int], object]) -> dict:
    """Write the shards that `out` still lacks, and the manifest, and return the manifest.

    settings: fields of the manifest that tell what the source was; they must be those that an earlier call had.
    progress: called with the number of samples that were written since the last call.

    Raises UserError if `out` holds other shards, or if an image cannot be read.
    """
    # Check that the work can begin or continue.
    settings = settings | {"samples": source.n, "per_shard": per_shard}
    begun = out / UNFINISHED / "settings.json"
    if (out / MANIFEST).is_file():
        check_same(out / MANIFEST, settings)
        return read_manifest(out)
    if begun.is_file():
        check_same(begun, settings)
    elif any(out.glob("*.tar")):
        raise UserError(f"--out {out}: holds other shards; choose another folder")
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_json(begun, settings)

    # Write each shard that is not there, and then what lists them.
    paths = []
    for start in range(0, source.n, per_shard):
        ids = range(start, min(start + per_shard, source.n))
        paths.append(out / f"images-{start // per_shard:05d}.tar")
        if not paths[-1].is_file():
            write_shard(paths[-1], _samples(source, ids))
        progress(len(ids))
    manifest = settings | build_manifest(ShardSamples(paths), source.classes)
    write_json(out / "classes.json", source.class_names)
    write_json(out / MANIFEST, manifest)
    shutil.rmtree(begun.parent)
    return manifest


def _samples(source: Source, ids: range) -> Iterator[Sample]:
    """Yield key and files of each sample: its image, and its label."""
    for i in ids:
        image = source.read(i).tobytes()
        yield f"{i:09d}", {_extension(image): image, "cls": str(int(source.labels[i])).encode()}


def _extension(image: bytes) -> str:
    """Return an extension for the kind of an image, which its header tells; readers go by the header too."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            kind = (opened.format or "").lower()
    except Exception:  # a damaged file makes Pillow's parsers fail in many ways; `check` and training name it
        kind = ""
    return kind if kind in IMAGE_EXTENSIONS else "jpg"
