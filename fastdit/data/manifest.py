"""`manifest.json` beside shards: how many samples each holds, its checksum, and what else its maker tells.

shards          {file name: {samples, sha256}}
counts          samples of each class
channel_mean, channel_std    of latents: of draws from the posteriors, one number a channel
"""

import hashlib
import json
import uuid
from pathlib import Path

import numpy as np

from fastdit.data.shards import ShardSamples
from fastdit.errors import UserError

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict | None:
    """That of a folder; None where it has none. Raises UserError when it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not all({"samples", "sha256"} <= shard.keys() for shard in manifest["shards"].values()):
            raise TypeError("shards")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is no manifest of shards; copy it again from where the shards came from") from None
    return manifest


def describe(samples: ShardSamples, classes: int) -> dict:
    """A manifest of shards as they are."""
    held = np.bincount(samples.shard, minlength=len(samples.paths)).tolist()
    return {
        "counts": np.bincount(samples.labels, minlength=classes).tolist(),
        "shards": {path.name: {"samples": n, "sha256": checksum(path)} for path, n in zip(samples.paths, held)},
    }


def write_json(path: Path, value) -> None:
    """The file is whole whenever it is there, whoever else writes it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_same(path: Path, own: dict) -> None:
    """Raises UserError unless the JSON file at `path`, of work begun earlier, has every field as `own` has it."""
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: cannot be read; delete its folder and run the command again") from None
    for field, value in own.items():
        if theirs.get(field) != value:
            raise UserError(
                f"{path}: was begun with {field} {theirs.get(field)}, now it is {value}; repeat the command as it was, "
                "or choose another --out"
            )
