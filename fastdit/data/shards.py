"""Find WebDataset tar shards, index them, read samples from memory maps, and write shards.

A sample is the set of files of one shard that share a key, which is the path up to the first dot of its last part. It
has one image (`.png`, `.jpg` or another of IMAGE_EXTENSIONS) or one latent (`.npy`, see latents.py), and one label:
`.cls`, an integer in ASCII, or `.json` with the integer field `label` or `cls`. Other files are ignored.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from fastdit.data.tar_archives import ANY_NAME, Report, refuse, tar_members
from fastdit.errors import UserError
from fastdit.files import printable, write_atomically

# Every image format that DALI or Pillow decodes without another program.
IMAGE_EXTENSIONS = (
    *("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "avif", "bmp", "dib", "tif", "tiff"),
    *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm"),
)
LATENT_EXTENSION = "npy"
UNFINISHED = ".unfinished"  # a folder beside shards that are still being written
Sample = tuple[str, Mapping[str, bytes]]  # its key, and its files by extension
# Folders and files that macOS, Windows and Synology leave behind, in lower case.
_LEFTOVERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"}
_PACKED_FILES = (".gz", ".bz2", ".xz", ".zst", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# Words of splits in the names of shards.
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLIT_WORDS |= {"test": "test", "testing": "test"}
_NUMBER = re.compile(rb"\s*-?[0-9]{1,18}\s*")


def map_file(path: str | os.PathLike) -> np.ndarray:
    """Return the bytes of a file, uint8 (size,), as a private memory map whose pages are read when first touched.

    torch closes the file after mapping it, so thousands of shards hold no open files. As with every memory map, a file
    that is cut while in use kills the process that reads beyond its new end (SIGBUS).

    Raises UserError if the file cannot be read.
    """
    try:
        size = os.stat(path).st_size
        if size == 0:
            return np.empty(0, dtype=np.uint8)
        with _utf8_path(path) as readable:
            return torch.from_file(readable, shared=False, size=size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{printable(str(path))}: cannot be read ({str(error).splitlines()[0]})") from error


@contextmanager
def _utf8_path(path: str | os.PathLike) -> Iterator[str]:
    """Yield a path of a file that torch takes: its own, or one of the open file where its own is not UTF-8."""
    name = os.fspath(path)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        with open(name, "rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield name


def find_shards(path: str) -> list[Path]:
    """Return the tar files that `path` names: one `.tar`, a folder of them, `a-{000..099}.tar` or `a-*.tar`.

    Raises UserError if there is none, or if one of a range's files is missing.
    """
    if "*" in path and not Path(path).exists():
        if not (found := matching(path)):
            raise UserError(f"{path}: no file has such a name; a * stands for characters of the last part only")
        return found
    if (braces := re.search(r"\{(\d+)\.\.(\d+)\}", path)) is not None:
        first, last = braces.groups()
        numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
        found = [p for i in numbers for p in find_shards(path[: braces.start()] + i + path[braces.end() :])]
        if not found:
            raise UserError(f"{path}: the range {braces.group()} is empty; write the smaller number first")
        return found
    if Path(path).is_dir():
        found = shards_in(Path(path))
        if not found:
            raise UserError(f"{path}: the folder holds no .tar shards")
        return found
    if not Path(path).is_file():
        raise UserError(f"{path}: no such shard; check the path or the range of the pattern")
    return [Path(path)]


def by_split(shards: list[Path]) -> dict[str, list[Path]]:
    """Return the shards whose names have the word of a split, such as val-000.tar, by that word, train first."""
    sets: dict[str, list[Path]] = {}
    for path in shards:
        words = [SPLIT_WORDS[word] for word in re.split(r"[-_.]", path.stem.lower()) if word in SPLIT_WORDS]
        if len(set(words)) == 1:
            sets.setdefault(words[0], []).append(path)
    return dict(sorted(sets.items(), key=lambda item: item[0] != "train"))


def shared_pattern(paths: list[Path]) -> str:
    """Return the pattern in quotes that names files of one folder by the start of their names, or the only file."""
    if len(paths) == 1:
        return str(paths[0])
    first, last = (choose(path.stem for path in paths) for choose in (min, max))
    same = next((k for k, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return f"'{paths[0].parent}/{first[:same].rstrip('0123456789')}*{paths[0].suffix}'"


def matching(path: str) -> list[Path]:
    """Return the files that a pattern names, sorted, where `*` in the last part stands for any characters."""
    folder, pattern = Path(path).parent, re.compile(".*".join(map(re.escape, Path(path).name.split("*"))))
    return sorted(p for p in folder.glob("*") if p.is_file() and pattern.fullmatch(p.name) and p.name[0] != ".")


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


@lru_cache(maxsize=1024)
def _in_leftovers(folder: str) -> bool:
    """Return whether the path of a folder in an archive leads through one that a system has left behind."""
    return any(part.lower() in _LEFTOVERS for part in folder.split("/"))


def nested_shards(folder: Path) -> Path | None:
    """Return a shard that lies deeper in a folder, or None. The search ends at the first one."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_leftover(name))
        if Path(parent) != folder and (found := sorted(name for name in files if name.endswith(".tar"))):
            return Path(parent, found[0])
    return None


def shards_in(folder: Path) -> list[Path]:
    """Return the tar files in a folder, sorted, without hidden ones, such as those that macOS adds (`._a.tar`)."""
    return sorted(path for path in folder.glob("*.tar") if path.name[0] != ".")


class ShardSamples:
    """Number the samples of some shards in the order of the shards and of each shard's members.

    Attributes:
        paths: the shards.
        is_latent: whether the samples are `.npy` latents instead of images.
        labels: class labels, (n,) int64.
        sizes: sizes of the images or latents in bytes, (n,) int64.
        keys: keys of the samples, (n,) bytes.
        shard: for each sample, the index of its shard in `paths`, (n,) int32.
    """

    def __init__(self, paths: Iterable[Path], report: Report = refuse):
        """Read every header and label. Raises (or reports) UserErrors that name the shard, the byte and the key."""
        # Collect the samples of each shard.
        self.paths: list[Path] = []
        self._maps: dict[int, np.ndarray] = {}
        shard, offset, size, labels, keys, latent = [], [], [], [], [], []
        for s, path in enumerate(paths):
            self.paths.append(path)
            try:
                data = map_file(path)
            except UserError as error:
                report(error)
                continue
            for key, members in _grouped(path, data, report).items():
                payload, label = _payload(path, key, members, report), _label(path, key, members, data, report)
                if payload is None or label is None:
                    continue
                extension, (start, length) = payload
                labels.append(label)
                shard.append(s)
                offset.append(start)
                size.append(length)
                keys.append(key.encode(**ANY_NAME))
                latent.append(extension == LATENT_EXTENSION)

        # Keep them in arrays, which take less memory than lists.
        self.labels = np.array(labels, dtype=np.int64)
        self.shard = np.array(shard, dtype=np.int32)
        self.sizes = np.array(size, dtype=np.int64)
        self.keys = np.array(keys, dtype=bytes)
        self._offset = np.array(offset, dtype=np.int64)

        # Report an empty source and mixed kinds.
        self.is_latent = 2 * sum(latent) > len(latent)
        if not keys:
            first = self.paths[0]
            report(UserError(f"{first}: holds no samples; a sample is an image (or .npy) and a .cls of one name"))
        for i in (odd := np.flatnonzero(np.array(latent, dtype=bool) != self.is_latent)):
            report(UserError(f"{self.where(i)}: mixes images and latents; separate them"))
        if len(odd):
            self._select(np.setdiff1d(np.arange(len(keys)), odd))

    def subset(self, ids: np.ndarray) -> "ShardSamples":
        """Return the samples `ids` (k,) alone, numbered anew."""
        part = copy(self)
        part._select(ids)
        return part

    def _select(self, ids: np.ndarray) -> None:
        """Drop all samples but `ids` (k,)."""
        for name in ("labels", "shard", "sizes", "keys", "_offset"):
            setattr(self, name, getattr(self, name)[ids])

    def read(self, i: int) -> np.ndarray:
        """Return the encoded bytes of sample `i`, uint8 (size,), as a view of the mapped shard."""
        s, start = int(self.shard[i]), int(self._offset[i])
        if s not in self._maps:
            self._maps[s] = map_file(self.paths[s])
        return self._maps[s][start : start + int(self.sizes[i])]

    def where(self, i: int) -> str:
        """Return the name of sample `i` for error messages: shard, byte and key."""
        return f"{self.paths[self.shard[i]]}: byte {self._offset[i]}: {self.keys[i].decode(**ANY_NAME)!r}"


def _grouped(path: Path, data: np.ndarray, report: Report) -> dict[str, dict[str, tuple[int, int]]]:
    """Return {key: {extension: (offset, size)}} of one shard, in order of first appearance."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in tar_members(path, data, report):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or _in_leftovers(folder):  # hidden files, such as the ones macOS adds
            continue
        key = f"{folder}/{stem}" if folder else stem
        members = samples.setdefault(key, {})
        if extension.lower() in members:
            problem = f"{key!r} has two files {'.' + extension!r}; keys must be unique in a shard"
            report(UserError(f"{path}: byte {offset}: {problem}"))
        else:
            members[extension.lower()] = (offset, size)
    return samples


def _payload(
    path: Path, key: str, members: Mapping[str, tuple[int, int]], report: Report
) -> tuple[str, tuple[int, int]] | None:
    """Return the extension, offset and size of a sample's image or latent, or report an error and return None."""
    found = [e for e in (*IMAGE_EXTENSIONS, LATENT_EXTENSION) if e in members]
    if len(found) == 1:
        return found[0], members[found[0]]
    if found:
        problem = f"has {len(found)} images or latents ({', '.join(found)}); keep one" + _rule(members)
    elif packed := [e for e in members if e.endswith(_PACKED_FILES)]:
        problem = f"has no image but a compressed one ('.{packed[0]}'); unpack it, and make the archive again"
    else:
        listed = ", ".join(map(repr, sorted(members)))
        problem = f"has no image or .npy (its files: {listed}); add it or remove them" + _rule(members)
    report(UserError(f"{path}: byte {_first(members)}: {key!r} {problem}"))
    return None


def _label(
    path: Path, key: str, members: Mapping[str, tuple[int, int]], data: np.ndarray, report: Report
) -> int | None:
    """Return a sample's class label, or report an error and return None."""
    # Find the file.
    for extension in ("cls", "json"):
        if extension in members:
            offset, size = members[extension]
            text = data[offset : offset + size].tobytes()
            break
    else:
        problem = f"has no label; add '.cls' with the class number{_rule(members)}"
        report(UserError(f"{path}: byte {_first(members)}: {key!r} {problem}"))
        return None

    # Parse it.
    try:
        if extension == "cls":
            if not _NUMBER.fullmatch(text):  # int() takes more, such as 1_0
                raise ValueError("not an integer")
            return int(text)
        fields = json.loads(text)
        label = fields["label"] if "label" in fields else fields["cls"]
        if type(label) is not int or abs(label) >= 10**18:
            raise TypeError("not an integer of 64 bits")
        return label
    except (ValueError, KeyError, TypeError, RecursionError):
        name = f"{key}.{extension}"
        problem = f"{name!r} holds no class number (it reads {text[:20]!r}); write it anew"
        report(UserError(f"{path}: byte {offset}: {problem}"))
        return None


def _rule(members: Mapping[str, tuple[int, int]]) -> str:
    """Return the rule of keys, if dots in the names of a sample's files may be what is wrong with it."""
    if not any("." in extension for extension in members):
        return ""
    return ". A key ends at the first dot of a file name: write 22_05.png, not 22.05.png"


def _first(members: Mapping[str, tuple[int, int]]) -> int:
    """Return the offset of a sample's first file."""
    return min(offset for offset, _ in members.values())


def write_shards(pattern: str | os.PathLike, samples: Iterable[Sample], per_shard: int) -> list[Path]:
    """Write samples to shards named by `pattern`, such as `a-%03d.tar`, and return the shards' paths.

    samples: `(key, {extension: bytes})` of each. per_shard: samples in a shard; the last one may have fewer.
    """
    paths, samples = [], iter(samples)
    while part := list(islice(samples, per_shard)):
        paths.append(Path(str(pattern) % len(paths)))
        write_shard(paths[-1], part)
    return paths


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples `(key, {extension: bytes})`, in their order, to one USTAR shard.

    The bytes depend on the samples alone, not on times, owners or modes of this machine. The shard has a hidden name
    until it is whole.
    """
    with write_atomically(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples:
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
