"""Find WebDataset tar shards, index them, read samples from memory maps, and write shards.

A sample is the set of files of one shard that share a key, which is the path up to the first dot of its last part. It
has one image (`.png`, `.jpg` or another of IMAGE_EXTENSIONS) or one latent (`.npy`, see latents.py), and one label:
`.cls`, an integer in ASCII, or `.json` with the integer field `label` or `cls`. Other files are ignored.

This module parses the tar headers itself, because `tarfile` builds an object for every member and takes several times
as long.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from fastdit.errors import UserError
from fastdit.files import write_atomically

# Every image format that DALI or Pillow decodes without another program.
IMAGE_EXTENSIONS = (
    *("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "avif", "bmp", "dib", "tif", "tiff"),
    *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm"),
)
LATENT_EXTENSION = "npy"
UNFINISHED = ".unfinished"  # a folder beside shards that are still being written
Sample = tuple[str, Mapping[str, bytes]]  # its key, and its files by extension
Report = Callable[[UserError], None]  # called for each bad sample; if it returns, the reader leaves the sample out
# Folders and files that macOS, Windows and Synology leave behind, in lower case.
_LEFTOVERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# First bytes of compressed files, and the commands that unpack them.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
_END = bytes(_BLOCK)
_NUMBER = re.compile(rb"\s*-?[0-9]{1,18}\s*")
_LONGEST = 1 << 16  # the most bytes of a long name or a pax header


def refuse(error: UserError) -> NoReturn:
    """Raise `error`: the `Report` of a reader that stops at the first problem."""
    raise error


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
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def find_shards(path: str) -> list[Path]:
    """Return the tar files that `path` names: one `.tar`, a folder of them, or a pattern `a-{000..099}.tar`.

    Raises UserError if there is none, or if one of a pattern's files is missing.
    """
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


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


@lru_cache(maxsize=1024)
def _in_leftovers(folder: str) -> bool:
    """Return whether the path of a folder in an archive leads through one that a system has left behind."""
    return any(part.lower() in _LEFTOVERS for part in folder.split("/"))


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
                keys.append(key.encode())
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
        return f"{self.paths[self.shard[i]]}: byte {self._offset[i]}: {self.keys[i].decode()!r}"


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
        problem = f"has {len(found)} images or latents ({', '.join(found)}); keep one"
    else:
        problem = f"has no image or .npy (its files: {', '.join(map(repr, sorted(members)))}); add it or remove them"
    report(UserError(f"{path}: byte {_first(members)}: {key!r} {problem}{_rule(members)}"))
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


def tar_members(path: Path, data: np.ndarray, report: Report = refuse) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the regular files of a USTAR, GNU or pax archive.

    A compressed archive, a damaged header, a member cut short, an end without the end-of-archive block, and data after
    that block are reported as UserErrors. If `report` returns, reading goes on at the next whole header.

    data: the archive's bytes, uint8 (size,). path: the archive's name in errors.
    """
    view, position, extended = memoryview(data), 0, {}
    for head, command in _PACKED.items():
        if bytes(view[: len(head)]) == head:
            new = path.with_name(path.name.split(".")[0] + "-unpacked.tar")
            problem = f"is compressed, and shards are read in place; unpack it: {command} -dc {path} > {new}"
            report(UserError(f"{path}: {problem}"))
            return
    while position is not None:
        # Find the end of the archive.
        header = bytes(view[position : position + _BLOCK])
        if len(header) < _BLOCK:
            report(UserError(f"{path}: byte {len(data)}: truncated (no end of archive); copy or make it again"))
            return
        if header == _END:
            if not data[position:].any():
                return
            problem = "more data after the end of archive; copy it again, or write one archive"
            report(UserError(f"{path}: byte {position}: {problem}"))
            position, extended = _next_header(data, position + _BLOCK), {}
            continue

        # Parse the header.
        kind = header[156:157]
        try:
            if not _checksum_matches(header):
                raise ValueError("checksum")
            size = extended.get("size") or _number(header[124:136])
            if size < 0 or (size > _LONGEST and kind in (b"L", b"x")):
                raise ValueError("size")
        except ValueError:
            report(UserError(f"{path}: byte {position}: damaged tar header; copy or make it again"))
            position, extended = _next_header(data, position + _BLOCK), {}
            continue
        name = extended.get("path") or _name(header)
        offset = position + _BLOCK
        if offset + size > len(data):
            problem = f"truncated: {name!r} ends at byte {offset + size}, the file at {len(data)}"
            report(UserError(f"{path}: byte {position}: {problem}; copy or make it again"))
            return

        # Yield a regular file, or keep the fields that describe the next member.
        if kind == b"L":  # GNU: the next member's long name
            extended["path"] = bytes(view[offset : offset + size]).rstrip(b"\0").decode(errors="replace")
        elif kind == b"x":  # pax: the next member's fields
            try:
                extended |= _pax(bytes(view[offset : offset + size]))
            except ValueError:
                report(UserError(f"{path}: byte {position}: damaged pax header; copy or make it again"))
        else:
            extended = {}
            if kind in (b"0", b"\0"):
                yield name, offset, size
        position = offset + -(-size // _BLOCK) * _BLOCK


def _checksum_matches(header: bytes) -> bool:
    """Return whether a header's checksum is right. Raises ValueError if it is no number."""
    return int(header[148:156].strip(b"\0 ") or b"x", 8) == sum(header) - sum(header[148:156]) + 8 * 32


def _next_header(data: np.ndarray, position: int) -> int | None:
    """Return the position of the first whole header at `position` or a number of blocks after it, or None."""
    blocks = data[position : position + (len(data) - position) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    for k in np.flatnonzero((blocks[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(1)):
        with suppress(ValueError):
            if _checksum_matches(blocks[k].tobytes()):
                return position + int(k) * _BLOCK
    return None


def _number(field: bytes) -> int:
    """Return the number in a header's field. Raises ValueError if it holds none."""
    if field[0] & 0x80:  # GNU: base 256, for sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    """Return the member's name in a header."""
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _pax(records: bytes) -> dict[str, str | int]:
    """Return `path` and `size` of a pax header, if it has them. Raises ValueError if it is damaged.

    The header consists of records "LENGTH KEY=VALUE\\n", where LENGTH counts the whole record.
    """
    fields: dict[str, str | int] = {}
    start = 0
    while start < len(records):
        space = records.index(b" ", start)
        end = start + int(records[start:space])
        if not space < end <= len(records) or records[end - 1 : end] != b"\n":
            raise ValueError("record length")
        key, _, value = records[space + 1 : end - 1].partition(b"=")
        if key == b"path":
            fields["path"] = value.decode(errors="replace")
        elif key == b"size":
            fields["size"] = int(value)
        start = end
    return fields


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
