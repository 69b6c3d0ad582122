"""Write images to shards, for `fastdit-data convert` and `convert-set`. The bytes of the images stay as they are.

out/images-00000.tar ...           each appears when it is whole
out/.unfinished/settings.json      until all are there
out/manifest.json, classes.json    at the end
"""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from fastdit.data.manifest import MANIFEST, build_manifest, check_same, read_manifest, write_json
from fastdit.data.shards import IMAGE_EXTENSIONS, UNFINISHED, Sample, ShardSamples, write_shard
from fastdit.data.sources import Source
from fastdit.errors import UserError


def convert(source: Source, out: Path, settings: dict, per_shard: int, progress: Callable[[int], object]) -> dict:
    """Write the samples of a source as `write_folder` does, and return the manifest.

    settings: fields of the manifest that tell what the source was.
    """
    settings = settings | {"samples": source.n, "per_shard": per_shard}
    return write_folder(out, settings, source.class_names, source.classes, partial(_samples, source), progress)


def write_folder(
    out: Path,
    settings: dict,
    class_names: Sequence[str],
    classes: int,
    samples: Callable[[range], Iterable[Sample]],
    progress: Callable[[int], object],
) -> dict:
    """Write the shards that `out` still lacks, and the manifest, and return the manifest.

    class_names: empty if the classes have no names.
    settings: fields of the manifest; they must be those that an earlier call had. `samples` is the number of samples,
        and `per_shard` that of a shard.
    samples: returns the samples with the given numbers. The ranges come in rising order, not all of them after an
        interruption.
    progress: called with the number of samples that were done since the last call.

    Raises UserError if `out` holds other shards.
    """
    # Check that the work can begin or continue.
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
    paths, n, per_shard = [], settings["samples"], settings["per_shard"]
    for start in range(0, n, per_shard):
        ids = range(start, min(start + per_shard, n))
        paths.append(out / f"images-{start // per_shard:05d}.tar")
        if not paths[-1].is_file():
            write_shard(paths[-1], samples(ids))
        progress(len(ids))
    manifest = settings | build_manifest(ShardSamples(paths), classes)
    if class_names:
        write_json(out / "classes.json", class_names)
    write_json(out / MANIFEST, manifest)
    shutil.rmtree(begun.parent)
    return manifest


def _samples(source: Source, ids: range) -> Iterator[Sample]:
    """Yield key and files of each sample: its image, and its label."""
    for i in ids:
        image = source.read(i).tobytes()
        yield f"{i:09d}", {extension(image): image, "cls": str(int(source.labels[i])).encode()}


def extension(image: bytes) -> str:
    """Return an extension for the kind of an image, which its header tells; readers go by the header too."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            kind = (opened.format or "").lower()
    except Exception:  # a damaged file makes Pillow's parsers fail in many ways; `check` and training name it
        kind = ""
    return kind if kind in IMAGE_EXTENSIONS else "jpg"
