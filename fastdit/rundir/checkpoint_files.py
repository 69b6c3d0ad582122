"""A checkpoint as files that survive a crash at any moment.

It is written into a hidden folder, hashed, flushed to disk and only then renamed to `step-NNNNNNNN`; so a folder of
that name is whole or damaged by something else, and the hashes tell which. Inside: DeepSpeed's own files (weights,
ZeRO-sharded optimizer and EMA), `ema.safetensors` (the sampled weights, whole), `rank-N.pt` (that rank's generators
and place in the data), `method.pt` (what the method keeps: centres, second player) and `manifest.json`. All ranks must
see one file system.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastdit.errors import UserError
from fastdit.methods.registry import METHODS
from fastdit.rundir.run_files import CHECKPOINTS, METRICS

EMA_FILE = "ema.safetensors"
MANIFEST = "manifest.json"


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, newest step first."""
    return sorted(folder.glob("step-????????"), reverse=True)


def seal(folder: Path, meta: dict) -> None:
    """Flush every file to disk and write the manifest: `meta` and the files' hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    hashes = {str(path.relative_to(folder)): _sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({**meta, "sha256": hashes}, indent=1))
    for path in (folder / MANIFEST, folder / "deepspeed", folder):
        sync(path)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def holds_run(run: Path) -> bool:
    """Whether a folder has results to lose: a line of metrics or a checkpoint."""
    metrics = run / METRICS
    return bool(checkpoints(run / CHECKPOINTS)) or (metrics.exists() and metrics.stat().st_size > 0)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when every file is as it was written."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in hashes:
        try:
            if _sha256(folder / name) != expected:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} is missing"
    return None


def newest_good(folder: Path, say=print) -> Path | None:
    """The newest undamaged checkpoint; damaged newer ones are named through `say`.

    Returns None when there is no checkpoint at all. Raises UserError when there are some but all are damaged.
    """
    found = checkpoints(folder)
    for path in found:
        fault = damage(path)
        if fault is None:
            return path
        say(f"{path}: {fault}; falling back to the checkpoint before it")
    if found:
        raise UserError(f"{folder}: all {len(found)} checkpoints are damaged; start a new run in another folder")
    return None


def manifest(checkpoint: Path) -> dict:
    """Return the step, number of ranks and network that a checkpoint belongs to."""
    written = json.loads((checkpoint / MANIFEST).read_text())
    for name in written.get("method", "").split("+"):
        if name in METHODS:
            written = METHODS[name].older_signature | written
    return written


def sampled_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole EMA (fp32, CPU) of a checkpoint. Raises UserError when it cannot be read."""
    try:
        return load_file(checkpoint / EMA_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint / EMA_FILE}: cannot be read ({error}); use another checkpoint") from None


def choose(run: Path, named: str | None) -> Path:
    """The checkpoint a command shall read: `named`, else the newest good one of `run`. Raises UserError if none."""
    if named is not None:
        if fault := damage(Path(named)):
            raise UserError(f"--checkpoint {named}: {fault}; give a folder like {run / CHECKPOINTS}/step-00001000")
        return Path(named)
    checkpoint = newest_good(run / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(f"{run}: holds no checkpoint yet; train it first")
    return checkpoint


def classes_of(checkpoint: Path) -> int:
    """Number of classes of the network in a checkpoint that `choose` gave."""
    return manifest(checkpoint)["classes"]
