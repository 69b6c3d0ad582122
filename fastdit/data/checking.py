"""Verify a source: list every problem, a line each, and summarize which properties were verified.

shards     tar structure, one image or latent and one label per sample, unique keys -> shards.py
manifest   shards, checksums and counts are as their maker left them
content    images decode, latents have one form and finite values -> check_content.py
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastdit.data.check_content import check_images, check_latents
from fastdit.data.find_tables import is_table
from fastdit.data.folders import FolderSamples
from fastdit.data.manifest import MANIFEST, read_manifest
from fastdit.data.shards import ShardSamples, shards_in
from fastdit.data.sources import Source, check_finished, check_labels, classes_needed, locate, read_class_names
from fastdit.data.tables import TableSamples
from fastdit.data.tar_archives import Report
from fastdit.errors import UserError
from fastdit.files import describe_bytes, sha256_of


class Problems:
    """Collect reported errors: their texts in `lines`, and the files that these name in `files`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.files: set[str] = set()

    def __call__(self, error: UserError) -> None:
        self.lines.append(str(error))
        self.files.add(self.lines[-1].partition(": ")[0])


@dataclass(frozen=True)
class Findings:
    """Hold the result of `check`.

    Args:
        problems: the errors that were reported.
        summary: one line that says which properties were verified.
        samples: the samples that can be read.
        classes: the number of classes.
        notes: lines about files that are not taken.
    """

    problems: Problems
    summary: str
    samples: ShardSamples | FolderSamples | TableSamples
    classes: int
    notes: tuple[str, ...] = ()


def place_of_manifest(path: str) -> Path:
    """Return the path of the manifest that the shards at `path` still lack.

    Raises UserError if `path` is no folder of shards, is a part of a folder, or has a manifest already.
    """
    if path.partition(":")[0] == "synthetic" or isinstance(shards := locate(path), Path) or is_table(shards[0]):
        raise UserError(f"{path}: holds no shards; a manifest is for shards")
    place = shards[0].parent / MANIFEST
    if place.exists():
        raise UserError(f"{place}: is there already; remove it first if the shards were changed on purpose")
    if set(shards) != set(shards_in(place.parent)):
        raise UserError(f"{path}: is not all of its folder, and a manifest covers a folder; check {place.parent}")
    return place


def check(
    path: str,
    *,
    classes: int | None = None,
    labels: str = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    decode: bool = True,
    threads: int = 2,
) -> Findings:
    """Return every problem of a source, given as to `open_source`. Progress goes to stderr if that is a terminal.

    classes: the number of classes; by default that of `classes.json`, else of the manifest, else as many as the labels
        need.
    labels: the folders of a tree that are its classes, or a file of labels, as in `FolderSamples`.
    image_column, label_column: the columns of a Hugging Face data set, as in `TableSamples`.
    decode: whether to decode images. The CPU does that with `threads` threads, because a GPU leaves to the CPU what it
        cannot decode itself.

    Raises UserError if there is nothing to check.
    """
    if path.partition(":")[0] == "synthetic":
        raise UserError(f"{path}: synthetic images are made up as they are read; there is nothing to check")
    # Read the structure: names, sizes and labels.
    problems, location, manifest, notes = Problems(), locate(path), None, ()
    if isinstance(location, Path):
        samples, paths = FolderSamples(location, labels, flat=True), []
        notes = (f"{path}: not taken: {samples.left_out}",) if samples.left_out else ()
        names, integrity = samples.class_names, "class folders have no manifest: pixels are as the files say"
    elif is_table(location[0]):
        columns = {"image_column": image_column, "label_column": label_column}
        samples = TableSamples(path, location, **columns, unlabeled=True, report=problems, verify=True)
        paths, names, notes = [], samples.class_names, samples.notes
        integrity = f"{len(location)} tables, which have no manifest: pixels are as the files say"
    else:
        samples, names, integrity, manifest = _shards(location, problems)
        paths = location

    # Verify labels and content.
    classes = classes or len(names) or classes_needed(samples)
    check_labels(samples, classes, problems)
    if samples.is_latent:
        content = check_latents(samples, problems, manifest)
    elif decode:
        content = check_images(Source(path, "image", samples, ()), threads, problems)
    else:
        content = "images not decoded"

    # Summarize.
    empty = classes - len(np.unique(samples.labels[(samples.labels >= 0) & (samples.labels < classes)]))
    parts = [
        f"{len(samples.labels)} samples",
        f"{classes} classes" + (f" ({empty} without samples)" if empty else ""),
        *([f"{len(paths)} shards", describe_bytes(sum(p.stat().st_size for p in paths))] if paths else []),
    ]
    return Findings(problems, f"{path}: {', '.join(parts)}; {content}; {integrity}", samples, classes, notes)


def _shards(paths: list[Path], report: Report) -> tuple[ShardSamples, tuple[str, ...], str, dict | None]:
    """Return samples, class names, a phrase that says what the shards were verified with, and their manifest if any.

    The names are numbers if only the manifest tells how many classes there are.
    """
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
        return samples, names, "no manifest: labels and pixels are as the files say, not as they were written", None
    counts = _counts(manifest)
    phrase = f"shards, checksums and counts are {MANIFEST}'s"
    return samples, names or tuple(map(str, range(len(counts)))), phrase, manifest


def _unique_keys(samples: ShardSamples, report: Report) -> None:
    """Report each pair of shards that share keys. Keys within one shard are known to be unique."""
    _, first, which = np.unique(samples.keys, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(which)))
    pairs = Counter(zip(samples.shard[again].tolist(), samples.shard[first[which[again]]].tolist()))
    for i in again:
        pair = samples.shard[i], samples.shard[first[which[i]]]
        if shared := pairs.pop(pair, 0):
            other = samples.paths[pair[1]].name
            problem = f"{other} has a sample of that key too ({shared} such keys); keys must be unique"
            report(UserError(f"{samples.where(i)}: {problem}, remove one shard or rename"))


def _compare(samples: ShardSamples, manifest: dict, folder: Path, report: Report) -> None:
    """Report differences between the shards and the manifest of `folder`."""
    # Find missing shards, unless the user asked for a choice of the folder's shards.
    whole = set(samples.paths) == set(shards_in(folder))
    listed = manifest["shards"]
    if whole:
        for name in sorted(listed.keys() - {path.name for path in samples.paths}):
            report(UserError(f"{folder / name}: the shard is missing; copy it from where the others came from"))

    # Compare each shard's checksum and number of samples.
    sample_counts = np.bincount(samples.shard, minlength=len(samples.paths)).tolist()
    for path, n in zip(tqdm(samples.paths, desc="checksums", unit="shard", disable=None), sample_counts):
        if path.name not in listed:
            report(UserError(f"{path}: is not in {MANIFEST}; remove it, or make a manifest anew"))
            continue
        record = listed[path.name]
        try:
            differs = sha256_of(path) != record["sha256"]
        except OSError as error:
            report(UserError(f"{path}: cannot be read ({error.strerror})"))
            continue
        if differs:
            report(UserError(f"{path}: its checksum differs from that in {MANIFEST}; copy it again"))
        if n != record["samples"]:
            report(UserError(f"{path}: {n} samples can be read, {MANIFEST} says {record['samples']}; copy it again"))

    # Compare the number of samples of each class.
    counts = _counts(manifest)
    if whole and counts:
        found = Counter(samples.labels.tolist())
        wrong = [f"{label}: {found[label]}, not {n}" for label, n in enumerate(counts) if found[label] != n]
        if wrong:
            more = ", ..." if len(wrong) > 5 else ""
            problem = f"samples of a class are not as many as it says ({', '.join(wrong[:5])}{more})"
            report(UserError(f"{folder / MANIFEST}: {problem}; see which shards have changed"))


def _counts(manifest: dict) -> list[int]:
    """Return the number of samples of each class, or an empty list if the manifest has none."""
    counts = manifest.get("counts")
    return counts if isinstance(counts, list) else []
