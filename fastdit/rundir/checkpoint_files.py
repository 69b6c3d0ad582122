"""Keep checkpoints as files that survive a crash at any moment.

A checkpoint is written into a hidden folder, hashed, flushed to disk and only then renamed to `step-NNNNNNNN`. A folder
of that name was therefore complete once, and its hashes tell whether it still is.

    shards/KIND-RANK-of-RANKS.safetensors   what a rank holds of the weights, moments and EMAs (rundir/shards.py)
    method.safetensors                      the method's state, such as SD-DiT's centers or SADM's structure encoder
    progress.json                           each rank's position in the data and running means
    manifest.json                           the step, the run's signature, and the SHA-256 of each file and of itself

Nothing of it is a pickle, so that a folder from somebody else can be read. Older versions wrote DeepSpeed's pickles
into `deepspeed/`, `rank-N.pt` and `method.pt`, and the EMA weights into `ema.safetensors`.

All ranks must see one file system.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastdit.errors import UserError
from fastdit.files import sha256_of
from fastdit.methods.registry import METHODS
from fastdit.rundir.run_files import CHECKPOINTS, METRICS
from fastdit.rundir.shards import PieceReader

FORMAT = 2  # version of the files in a checkpoint; manifests of the first version do not name theirs
SHARDS = "shards"  # folder of the ranks' pieces
METHOD_FILE = "method.safetensors"
PROGRESS = "progress.json"
MANIFEST = "manifest.json"
OLDER_EMA_FILE = "ema.safetensors"  # of the first version
# Kinds of pieces. Moments and EMAs have their names in the optimizer's state.
WEIGHTS, BUFFERS, STEP, SAMPLED_EMA = "weights", "buffers", "step", "ema"
_NO_EMA = {WEIGHTS, BUFFERS, STEP, "exp_avg", "exp_avg_sq"}
RAW = "raw"  # stands for the weights that are trained, where an EMA could be named

NAME = r"step-\d{8,}"
LARGEST_MANIFEST = 2**26  # bytes; a checkpoint of a thousand ranks has about a megabyte
# Values that manifests without these fields stand for.
OLDER_SIGNATURE = {"model.qk_norm": "none", "model.rope": False, "noise.flow.convention": "own"}


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in `folder`, newest step first. Other names are ignored."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(NAME, path.name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a manifest and every file in it. `damage` also reads the files."""
    try:
        return all(_is_file(checkpoint / name) for name in _read_manifest(checkpoint)["sha256"])
    except (OSError, ValueError):
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


def seal(folder: Path, meta: dict, hashes: dict[str, str] | None = None) -> None:
    """Flush files to disk, and write a manifest with `meta`, the hashes of all files and one of itself.

    hashes: the SHA-256 of files that were flushed already, by name.
    """
    hashes = dict(hashes or {})
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name not in hashes and name != MANIFEST:
            sync(path)
            hashes[name] = sha256_of(path)
    content = {**meta, "sha256": hashes}
    (folder / MANIFEST).write_text(json.dumps({**content, "seal": _checksum(content)}, indent=1))
    for path in (folder / MANIFEST, *(path for path in folder.iterdir() if path.is_dir()), folder):
        sync(path)


def _checksum(content: dict) -> str:
    """Return the SHA-256 of a manifest without its seal, whatever its layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
    """Return a description of the first damaged file of a checkpoint, or None if every file is as it was written.

    It opens nothing outside the folder and nothing but regular files.
    """
    # Check the manifest: its seal, and that it belongs to a folder of this name.
    try:
        content = _read_manifest(folder)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    if "seal" in content and content.pop("seal") != _checksum(content):
        return f"{MANIFEST} is not what was written"
    if re.fullmatch(NAME, folder.name) and content["step"] != step_of(folder):
        return f"{MANIFEST} is of step {content['step']}"
    for name in _required(content):
        if name not in content["sha256"]:
            return f"{MANIFEST} does not list {name}"

    # Check the files.
    for name, expected in content["sha256"].items():
        path = folder / name
        try:
            if not _is_file(path):
                return f"{name} is no regular file" if os.path.lexists(path) else f"{name} is missing"
            if sha256_of(path) != expected:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _read_manifest(checkpoint: Path) -> dict:
    """Return the content of a manifest. Raises OSError, or ValueError for anything that `seal` does not write."""
    path = checkpoint / MANIFEST
    if not _is_file(path) or path.stat().st_size > LARGEST_MANIFEST:
        raise ValueError("no regular file, or a huge one")
    try:
        content = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("nested too deep") from None
    hashes = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(hashes, dict) or not isinstance(content.get("step"), int):
        raise ValueError("no manifest")
    for name in hashes:
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} is outside the folder")
    if "format" in content and ("seal" not in content or not isinstance(content.get("world"), int)):
        raise ValueError("no seal, or no number of ranks")
    return content


def _required(content: dict) -> list[str]:
    """Return names of files without which a checkpoint with this manifest is not whole."""
    ranks = range(min(content.get("world", 0), len(content["sha256"]) + 1))
    if "format" not in content:
        return [f"rank-{rank}.pt" for rank in ranks]
    shards = [f"{SHARDS}/{WEIGHTS}-{rank:05d}-of-{content['world']:05d}.safetensors" for rank in ranks]
    return [METHOD_FILE, PROGRESS, *shards]


def _is_file(path: Path) -> bool:
    """Return whether a path is a regular file, and no link. Raises OSError if it cannot be examined."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


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
    written = OLDER_SIGNATURE | _read_manifest(checkpoint)
    for name in written.get("method", "").split("+"):
        if name in METHODS:
            written = METHODS[name].older_signature | written
    return written


def first_difference(checkpoint: Path, signature: dict) -> tuple[str, object, object] | None:
    """Return (field, value in the manifest, value in `signature`) of the first field in which both differ, or None.

    Older manifests hold no settings of EDM and DDPM; these are not compared then.
    """
    written = manifest(checkpoint)
    for field, value in signature.items():
        before = written.get(field, value if field.startswith(("noise.edm.", "noise.ddpm.")) else None)
        if before != value:
            return field, before, value
    return None


def sampled_weights(checkpoint: Path, kind: str = SAMPLED_EMA) -> dict[str, torch.Tensor]:
    """Return the sampled network's state dict, on the CPU.

    Weights are fp32, and buffers are as they were. Before the first update, and for frozen parameters, the EMA weights
    are the weights themselves.

    kind: the EMA, by its name in the checkpoint, or RAW for the weights that are trained.

    Raises UserError if they cannot be read, or if the checkpoint has no EMA of that name that covers the network.
    """
    written = manifest(checkpoint)
    if "format" not in written:
        if kind != SAMPLED_EMA:
            raise UserError(f"{checkpoint}: is of an older version, of which only the EMA weights can be sampled")
        path = checkpoint / OLDER_EMA_FILE
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); use another checkpoint") from None
    reader, prefix = PieceReader(checkpoint / SHARDS), written["sampled"]
    averaged = {} if kind == RAW else reader.shapes(kind)
    sampled = [name for name in reader.shapes(SAMPLED_EMA) if name.startswith(prefix)]
    if kind not in (RAW, SAMPLED_EMA) and (kind in _NO_EMA or not averaged or any(x not in averaged for x in sampled)):
        whole = [x for x in reader.kinds if x not in _NO_EMA and all(name in reader.shapes(x) for name in sampled)]
        raise UserError(f"{checkpoint}: has no EMA {kind!r} of the sampled network; take {', '.join([*whole, RAW])}")
    state = {
        name: reader.read_whole(kind if name in averaged else WEIGHTS, name).float() for name in reader.shapes(WEIGHTS)
    }
    state |= {name: reader.read_whole(BUFFERS, name) for name in reader.shapes(BUFFERS)}
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


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
