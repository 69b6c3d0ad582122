"""Read and write `manifest.json` beside shards, which lists their numbers of samples and their checksums.

shards                       {file name: {samples, sha256}}
counts                       number of samples of each class
channel_mean, channel_std    for latents: statistics of samples of the posteriors, one number per channel

The program that makes shards may add fields of its own.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fastdit.data.shards import ShardSamples
from fastdit.errors import UserError
from fastdit.files import sha256_of, write_atomically

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict | None:
    """Return the manifest of a folder, or None if there is none. Raises UserError if it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not all({"samples", "sha256"} <= shard.keys() for shard in manifest["shards"].values()):
            raise TypeError("shards")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: is no manifest of shards; copy it again from where the shards came from") from None
    return manifest


def build_manifest(samples: ShardSamples, classes: int) -> dict:
    """Return a manifest of the shards of `samples` as they are now."""
    sample_counts = np.bincount(samples.shard, minlength=len(samples.paths)).tolist()
    return {
        "counts": np.bincount(samples.labels, minlength=classes).tolist(),
        "shards": {
            path.name: {"samples": n, "sha256": sha256_of(path)} for path, n in zip(samples.paths, sample_counts)
        },
    }


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON. The file is whole whenever it is there, even if several processes write it."""
    with write_atomically(path, many_writers=True) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def check_same(path: Path, settings: dict, older: dict | None = None) -> None:
    """Raise UserError unless the JSON file at `path`, of work begun earlier, has every field of `settings`.

    older: values of the fields that older versions did not write.
    """
    try:
        earlier = (older or {}) | json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: cannot be read; delete its folder and run the command again") from None
    for field, value in settings.items():
        if earlier.get(field) != value:
            raise UserError(
                f"{path}: was begun with {field} {earlier.get(field)}, now it is {value}; repeat the command as it "
                "was, or choose another --out"
            )
