"""Keep checkpoints as files that survive a crash at any moment.

A checkpoint is written into a hidden folder, hashed, flushed to disk and only then renamed to `step-NNNNNNNN`. A folder
of that name was therefore complete once, and its hashes tell whether it still is.

    deepspeed/         DeepSpeed's files: weights, ZeRO-sharded optimizer states and EMAs
    ema.safetensors    the EMA weights that are sampled, unsharded, in fp32
    rank-N.pt          position in the data and running means of rank N
    method.pt          the method's state, such as SD-DiT's centers or SADM's structure encoder
    manifest.json      the step, the number of ranks, the run's signature, and the SHA-256 of each file

All ranks must see one file system.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastdit.errors import UserError
from fastdit.files import sha256_of
from fastdit.methods.registry import METHODS
from fastdit.rundir.run_files import CHECKPOINTS, METRICS

EMA_FILE = "ema.safetensors"
MANIFEST = "manifest.json"
NAME = r"step-\d{8,}"
OLDER_SIGNATURE = {"model.qk_norm": "none", "model.rope": False}  # of manifests that lack these fields


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in `folder`, newest step first. Other names are ignored."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(NAME, path.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a manifest and every file in it. `damage` also reads the files."""
    try:
        return all((checkpoint / name).is_file() for name in json.loads((checkpoint / MANIFEST).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def start_partial(partial: Path) -> None:
    """Make the hidden folder that a checkpoint is written into, and remove those that a crash left behind."""
    for unfinished in partial.parent.glob(".step-*.partial"):
        shutil.rmtree(unfinished)
    partial.mkdir(parents=True)


def publish(partial: Path, final: Path) -> None:
    """Give a sealed checkpoint its name. One that has this name is moved aside first, and removed afterwards."""
    replaced = _hide(final) if final.exists() else None
    partial.rename(final)
    sync(final.parent)
    if replaced:
        _remove(replaced)


def prune(newest: Path, keep: int) -> None:
    """Remove all but `keep` complete checkpoints: `newest`, which was just written, and those before it.

    What is not complete is neither counted nor removed. Later steps are left too: a resumed run passes over them only
    if they are damaged, and then writes them again.
    """
    earlier = [path for path in checkpoints(newest.parent) if step_of(path) < step_of(newest) and is_complete(path)]
    for path in earlier[keep - 1 :]:
        _remove(_hide(path))


def _hide(path: Path) -> Path:
    """Rename a checkpoint, so that a crash while it is removed leaves no half of it under its name."""
    return path.rename(path.with_name(f".{path.name}.replaced.partial"))


def _remove(path: Path) -> None:
    """Remove a folder, or a file that somebody put in its place."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def remedy(folder: Path, first_bad: int) -> str:
    """Return what to do when training step `first_bad`, counted from 1, was the first to go wrong.

    It recommends the newest undamaged checkpoint whose weights took one more step well, if there is one. The weights of
    step `first_bad` - 1 did not: with them, the loss or its gradients were not finite.
    """
    saved = checkpoints(folder)
    for path in saved:
        if step_of(path) + 1 < first_bad and damage(path) is None:
            later = "" if path == saved[0] else "remove those after it, then "
            return f"last good checkpoint: {path}; {later}go on with --resume and a lower --lr, or check the data"
    return "no checkpoint is from before; start a new run with a lower --lr, or check the data"


def seal(folder: Path, meta: dict) -> None:
    """Flush every file to disk, and write a manifest with `meta` and the hashes of the files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    hashes = {str(path.relative_to(folder)): sha256_of(path) for path in files}
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


def holds_run(run: Path) -> bool:
    """Return whether a folder holds results: a line of metrics or a checkpoint."""
    metrics = run / METRICS
    return bool(checkpoints(run / CHECKPOINTS)) or (metrics.exists() and metrics.stat().st_size > 0)


def damage(folder: Path) -> str | None:
    """Return a description of the first damaged file of a checkpoint, or None if every file is as it was written."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in hashes:
        try:
            if sha256_of(folder / name) != expected:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} is missing"
    return None


def newest_good(folder: Path, say=print) -> Path | None:
    """Return the newest undamaged checkpoint, or None if there is no checkpoint at all.

    Calls `say` with a line for each newer, damaged checkpoint. Raises UserError if all checkpoints are damaged.
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
    """Return the manifest of a checkpoint: step, number of ranks, signature, and hashes.

    Fields that older versions did not write get the values that they stood for.
    """
    written = OLDER_SIGNATURE | json.loads((checkpoint / MANIFEST).read_text())
    for name in written.get("method", "").split("+"):
        if name in METHODS:
            written = METHODS[name].older_signature | written
    return written


def sampled_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the EMA weights of a checkpoint, in fp32 on the CPU, by name. Raises UserError if they cannot be read."""
    try:
        return load_file(checkpoint / EMA_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint / EMA_FILE}: cannot be read ({error}); use another checkpoint") from None


def choose(run: Path, named: str | None) -> Path:
    """Return the checkpoint that a command reads: `named`, or the newest undamaged one of `run` if that is None.

    Raises UserError if `named` is damaged, or if the run has no undamaged checkpoint.
    """
    if named is not None:
        if fault := damage(Path(named)):
            raise UserError(f"--checkpoint {named}: {fault}; give a folder like {run / CHECKPOINTS}/step-00001000")
        return Path(named)
    checkpoint = newest_good(run / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(f"{run}: holds no checkpoint yet; train it first")
    return checkpoint


def classes_of(checkpoint: Path) -> int:
    """Return the number of classes of the network in a checkpoint that `choose` returned."""
    return manifest(checkpoint)["classes"]
