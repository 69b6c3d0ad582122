"""Read the files that Weights & Biases keeps of a run on disk, in LevelDB's log format."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 32_768  # bytes: of the file and of each piece; of a block
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> list:
    """Return the records of a `.wandb` file, in the order in which they were written."""
    data, at, found, parts = path.read_bytes(), HEADER, [], []
    assert data.startswith(b":W&B")
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        at += HEADER
        parts.append(data[at : at + length])
        at += length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            found.append(record)
            parts = []
    return found


def sessions(folder: Path) -> list[list]:
    """Return the records of each start of a run that a run's folder holds, the oldest first."""
    paths = folder.glob("wandb/*run-*/run-*.wandb")
    return [records(path) for path in sorted(paths, key=lambda path: path.parent.name.removeprefix("offline-"))]


def history(found: list) -> list[dict]:
    """Return the lines of metrics among records."""
    lines = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in line.item} for line in lines
    ]


def run_of(found: list):
    """Return the record that describes the run."""
    return next(record.run for record in found if record.WhichOneof("record_type") == "run")
