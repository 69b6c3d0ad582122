"""WebDataset tar shards: find them, index them, read samples out of memory maps, write them.

A sample is the set of files of one shard that share a key (the path up to the first dot of its last part):
one image (`.png .jpg .jpeg .webp`) or one latent (`.npy`, see latents.py), and its label: `.cls` (an integer
in ASCII) or `.json` with the integer field `label` or `cls`. Other files are ignored.

The tar headers are walked here: `tarfile` builds an object for every member and takes several times as long.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from fastdit.errors import UserError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
LATENT_EXTENSION = "npy"
UNFINISHED = ".unfinished"  # a folder beside shards that are still being written
Sample = tuple[str, Mapping[str, bytes]]  # its key, and its files by extension
_BLOCK = 512
_END = bytes(_BLOCK)


def map_file(path: str | os.PathLike) -> np.ndarray:
    """The bytes of a file as a uint8 array backed by a private memory map; pages are read when first touched.

    torch closes the file after mapping it, so thousands of shards hold no open files. As with every memory
    map, a file cut while in use kills the process that reads beyond its new end (SIGBUS).
    """
    try:
        size = os.stat(path).st_size
        if size == 0:
            return np.empty(0, dtype=np.uint8)
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def find_shards(path: str) -> list[Path]:
    """The tar files a user means by `path`: one `.tar`, a folder of them, or a pattern `a-{000..099}.tar`."""
    if (braces := re.search(r"\{(\d+)\.\.(\d+)\}", path)) is not None:
        first, last = braces.groups()
        numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
        found = [p for i in numbers for p in find_shards(path[: braces.start()] + i + path[braces.end() :])]
        if not found:
            raise UserError(f"{path}: the range {braces.group()} is empty; write the smaller number first")
        return found
    if Path(path).is_dir():
        found = sorted(Path(path).glob("*.tar"))
        if not found:
            raise UserError(f"{path}: the folder holds no .tar shards")
        return found
    if not Path(path).is_file():
        raise UserError(f"{path}: no such shard; check the path or the range of the pattern")
    return [Path(path)]


class ShardSamples:
    """The samples of some shards, numbered in the order of the shards and of each shard's members.

    `is_latent` tells `.npy` latents from images; `labels` is (n,) int64, `sizes` (n,) int64 in bytes.
    """

    def __init__(self, paths: list[Path]):
        """Reads every header and label. Raises UserError that names the shard and the key or byte."""
        self.paths = paths
        self._maps: dict[int, np.ndarray] = {}
        shard, offset, size, labels, keys, latent = [], [], [], [], [], []
        for s, path in enumerate(paths):
            data = map_file(path)
            for key, members in _grouped(path, data).items():
                extension, (start, length) = _payload(path, key, members)
                labels.append(_label(path, key, members, data))
                shard.append(s)
                offset.append(start)
                size.append(length)
                keys.append(key.encode())
                latent.append(extension == LATENT_EXTENSION)
        if not keys:
            raise UserError(f"{paths[0]}: holds no samples; a sample is an image (or .npy) and a .cls of one name")
        if any(latent) != all(latent):
            odd = latent.index(not latent[0])
            raise UserError(f"{paths[shard[odd]]}: '{keys[odd].decode()}' mixes images and latents; separate them")
        self.is_latent = latent[0]
        self.labels = np.array(labels, dtype=np.int64)
        self._shard = np.array(shard, dtype=np.int32)
        self._offset = np.array(offset, dtype=np.int64)
        self.sizes = np.array(size, dtype=np.int64)
        self._keys = np.array(keys)

    def read(self, i: int) -> np.ndarray:
        """The encoded bytes of sample `i`: uint8 (size,), a view of the mapped shard."""
        s, start = int(self._shard[i]), int(self._offset[i])
        if s not in self._maps:
            self._maps[s] = map_file(self.paths[s])
        return self._maps[s][start : start + int(self.sizes[i])]

    def where(self, i: int) -> str:
        """How an error names sample `i`."""
        return f"{self.paths[self._shard[i]]}: '{self._keys[i].decode()}'"


def _grouped(path: Path, data: np.ndarray) -> dict[str, dict[str, tuple[int, int]]]:
    """{key: {extension: (offset, size)}} of one shard, in order of first appearance."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in tar_members(path, data):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem:  # hidden files, such as the ones macOS adds
            continue
        key = f"{folder}/{stem}" if folder else stem
        members = samples.setdefault(key, {})
        if extension.lower() in members:
            raise UserError(f"{path}: '{key}' has two files .{extension}; keys must be unique in a shard")
        members[extension.lower()] = (offset, size)
    return samples


def _payload(path: Path, key: str, members: Mapping[str, tuple[int, int]]) -> tuple[str, tuple[int, int]]:
    found = [e for e in (*IMAGE_EXTENSIONS, LATENT_EXTENSION) if e in members]
    if not found:
        raise UserError(f"{path}: '{key}' has no image or .npy (its files: {', '.join(sorted(members))})")
    if len(found) > 1:
        raise UserError(f"{path}: '{key}' has {len(found)} images or latents ({', '.join(found)}); keep one")
    return found[0], members[found[0]]


def _label(path: Path, key: str, members: Mapping[str, tuple[int, int]], data: np.ndarray) -> int:
    for extension in ("cls", "json"):
        if extension in members:
            offset, size = members[extension]
            text = data[offset : offset + size].tobytes()
            break
    else:
        raise UserError(f"{path}: '{key}' has no label; add '{key}.cls' with the class number")
    try:
        if extension == "cls":
            return int(text)
        fields = json.loads(text)
        label = fields["label"] if "label" in fields else fields["cls"]
        if type(label) is not int:
            raise TypeError("not an integer")
        return label
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: '{key}.{extension}' holds no class number (it reads {text[:20]!r})") from error


def tar_members(path: Path, data: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files of a USTAR, GNU or pax archive held in `data`.

    Raises UserError at a damaged header, a member cut short, or an end without the end-of-archive block.
    """
    view, position, extended = memoryview(data), 0, {}
    while True:
        header = bytes(view[position : position + _BLOCK])
        if len(header) < _BLOCK:
            raise UserError(f"{path}: truncated at byte {len(data)} (no end of archive); copy or make it again")
        if header == _END:
            if data[position:].any():
                raise UserError(f"{path}: more data after the end of archive at byte {position}; write one archive")
            return
        try:
            if int(header[148:156].strip(b"\0 ") or b"x", 8) != sum(header) - sum(header[148:156]) + 8 * 32:
                raise ValueError("checksum")
            size = extended.get("size") or _number(header[124:136])
            if size < 0:
                raise ValueError("size")
        except ValueError as error:
            raise UserError(f"{path}: damaged tar header at byte {position}; copy or make it again") from error
        name = extended.get("path") or _name(header)
        offset = position + _BLOCK
        if offset + size > len(data):
            raise UserError(
                f"{path}: truncated: '{name}' at byte {position} ends at byte {offset + size}, the file at "
                f"{len(data)}; copy or make it again"
            )
        kind = header[156:157]
        if kind == b"L":  # GNU: the next member's long name
            extended["path"] = bytes(view[offset : offset + size]).rstrip(b"\0").decode(errors="replace")
        elif kind == b"x":  # pax: the next member's fields
            try:
                extended |= _pax(bytes(view[offset : offset + size]))
            except ValueError as error:
                raise UserError(f"{path}: damaged pax header at byte {position}; make the shard again") from error
        else:
            extended = {}
            if kind in (b"0", b"\0"):
                yield name, offset, size
        position = offset + -(-size // _BLOCK) * _BLOCK


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256, for sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _pax(records: bytes) -> dict[str, str | int]:
    """`path` and `size` of a pax header: records "LENGTH KEY=VALUE\\n", LENGTH counting the whole record."""
    fields: dict[str, str | int] = {}
    while records:
        length = int(records.partition(b" ")[0])
        if length <= 0:
            raise ValueError("record length")
        key, _, value = records[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        if key == b"path":
            fields["path"] = value.decode(errors="replace")
        elif key == b"size":
            fields["size"] = int(value)
        records = records[length:]
    return fields


def write_shards(pattern: str | os.PathLike, samples: Iterable[Sample], per_shard: int) -> list[Path]:
    """Writes samples `(key, {extension: bytes})` to shards named by `pattern`, such as `a-%03d.tar`; see `write_shard`.

    Returns the shards' paths.
    """
    paths, samples = [], iter(samples)
    while part := list(islice(samples, per_shard)):
        paths.append(Path(str(pattern) % len(paths)))
        write_shard(paths[-1], part)
    return paths


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Writes samples, as they come, to one USTAR shard.

    The bytes depend on the samples alone (no times, owners or modes of this machine). The shard has a hidden name
    until it is whole.
    """
    partial = path.with_name(f".{path.name}.partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples:
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    partial.replace(path)
