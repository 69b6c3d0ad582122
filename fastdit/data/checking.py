"""Verifying a source: all that is wrong with it, a line each, and what could be verified.

shards     tar structure, one image or latent and one label a sample, unique keys -> shards.py
manifest   shards, checksums and counts are as their maker left them
content    images decode, latents hold what they should -> check_content.py
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastdit.data.check_content import check_images, check_latents
from fastdit.data.folders import FolderSamples
from fastdit.data.manifest import MANIFEST, checksum, read_manifest
from fastdit.data.shards import Report, ShardSamples
from fastdit.data.sources import Source, check_finished, check_labels, classes_needed, locate, read_class_names
from fastdit.errors import UserError


class Problems:
    """Collects what is wrong: `lines`, and which `files` they name first."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.files: set[str] = set()

    def __call__(self, error: UserError) -> None:
        self.lines.append(str(error))
        self.files.add(self.lines[-1].partition(": ")[0])


@dataclass(frozen=True)
class Findings:
    """`summary` is one line; `samples` are those that can be read, of `classes` classes."""

    problems: Problems
    summary: str
    samples: ShardSamples | FolderSamples
    classes: int


def place_of_manifest(path: str) -> Path:
    """Where one is missing for the shards that `path` means. Raises UserError where there is no such place."""
    if path.partition(":")[0] == "synthetic" or isinstance(shards := locate(path), Path):
        raise UserError(f"{path}: holds no shards; a manifest is for shards")
    place = shards[0].parent / MANIFEST
    if place.exists():
        raise UserError(f"{place}: is there already; remove it first if the shards were changed on purpose")
    if set(shards) != set(place.parent.glob("*.tar")):
        raise UserError(f"{path}: is not all of its folder, which a manifest stands for; check {place.parent}")
    return place


def check(path: str, *, classes: int | None = None, decode: bool = True, threads: int = 2) -> Findings:
    """All that is wrong with a source, as `open_source` takes it. Progress goes to stderr where that is a terminal.

    classes: their number; default: that of `classes.json`, else of the manifest, else as many as the labels need.
    decode: images are decoded on the CPU (a GPU leaves to it what it cannot decode itself), by `threads` threads.
    Raises UserError where there is nothing to check.
    """
    if path.partition(":")[0] == "synthetic":
        raise UserError(f"{path}: synthetic images are made up as they are read; there is nothing to check")
    problems, found = Problems(), locate(path)
    if isinstance(found, Path):
        samples, paths = FolderSamples(found), []
        names, kept = samples.class_names, "class folders have no manifest: pixels are as the files say"
    else:
        samples, names, kept = _shards(found, problems)
        paths = found
    classes = classes or len(names) or classes_needed(samples)
    check_labels(samples, classes, problems)
    if samples.is_latent:
        content = check_latents(samples, problems)
    elif decode:
        content = check_images(Source(path, "image", samples, ()), threads, problems)
    else:
        content = "images not decoded"
    empty = classes - len(np.unique(samples.labels[(samples.labels >= 0) & (samples.labels < classes)]))
    parts = [
        f"{len(samples.labels)} samples",
        f"{classes} classes" + (f" ({empty} without samples)" if empty else ""),
        *([f"{len(paths)} shards", _bytes(sum(p.stat().st_size for p in paths))] if paths else []),
    ]
    return Findings(problems, f"{path}: {', '.join(parts)}; {content}; {kept}", samples, classes)


def _shards(paths: list[Path], report: Report) -> tuple[ShardSamples, tuple[str, ...], str]:
    """Samples, names of the classes (numbers, where only the manifest tells how many), and what verified them."""
    folder = paths[0].parent
    check_finished(folder, report)
    names, manifest = (), None
    try:
        names = read_class_names(folder)
    except UserError as error:
        report(error)
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        report(error)
    samples = ShardSamples(tqdm(paths, desc="structure", unit="shard", disable=None), report)
    if manifest is not None:
        _compare(samples, manifest, folder, report)
    _unique_keys(samples, report)
    if manifest is None:
        return samples, names, "no manifest: labels and pixels are as the files say, not as they were written"
    counts = _counts(manifest)
    return samples, names or tuple(map(str, range(len(counts)))), f"shards, checksums and counts are {MANIFEST}'s"


def _unique_keys(samples: ShardSamples, report: Report) -> None:
    """A line for each two shards that share keys; within a shard that is settled already."""
    _, first, which = np.unique(samples.keys, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(which)))
    pairs = Counter(zip(samples.shard[again].tolist(), samples.shard[first[which[again]]].tolist()))
    for i in again:
        pair = samples.shard[i], samples.shard[first[which[i]]]
        if shared := pairs.pop(pair, 0):
            what = (
                f"{samples.paths[pair[1]].name} has a sample of that key too ({shared} such keys); keys must be unique"
            )
            report(UserError(f"{samples.where(i)}: {what}, remove one shard or rename"))


def _compare(samples: ShardSamples, manifest: dict, folder: Path, report: Report) -> None:
    """The shards with what the manifest of `folder` says of them."""
    whole = set(samples.paths) == set(folder.glob("*.tar"))  # else a choice of the folder's shards was asked for
    listed = manifest["shards"]
    if whole:
        for name in sorted(listed.keys() - {path.name for path in samples.paths}):
            report(UserError(f"{folder / name}: the shard is missing; copy it from where the others came from"))
    held = np.bincount(samples.shard, minlength=len(samples.paths)).tolist()
    for path, n in zip(tqdm(samples.paths, desc="checksums", unit="shard", disable=None), held):
        if path.name not in listed:
            report(UserError(f"{path}: is not in {MANIFEST}; remove it, or make a manifest anew"))
            continue
        wanted = listed[path.name]
        try:
            differs = checksum(path) != wanted["sha256"]
        except OSError as error:
            report(UserError(f"{path}: cannot be read ({error.strerror})"))
            continue
        if differs:
            report(UserError(f"{path}: its bytes are not those that {MANIFEST} has the checksum of; copy it again"))
        if n != wanted["samples"]:
            report(UserError(f"{path}: {n} samples can be read, {MANIFEST} says {wanted['samples']}; copy it again"))
    counts = _counts(manifest)
    if whole and counts:
        found = Counter(samples.labels.tolist())
        wrong = [f"{label}: {found[label]}, not {n}" for label, n in enumerate(counts) if found[label] != n]
        if wrong:
            more = ", ..." if len(wrong) > 5 else ""
            what = f"samples of a class are not as many as it says ({', '.join(wrong[:5])}{more})"
            report(UserError(f"{folder / MANIFEST}: {what}; see which shards have changed"))


def _counts(manifest: dict) -> list[int]:
    counts = manifest.get("counts")
    return counts if isinstance(counts, list) else []


def _bytes(n: int) -> str:
    power = min(max(0, len(str(n)) - 1) // 3, 4)
    return f"{n / 1000**power:.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"
