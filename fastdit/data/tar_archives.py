"""Index the members of tar archives: USTAR, GNU and pax.

The headers are parsed here, because `tarfile` builds an object for every member and takes several times as long.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import numpy as np

from fastdit.errors import UserError
from fastdit.files import stand_in

Report = Callable[[UserError], None]  # called for each bad sample; if it returns, the reader leaves the sample out
# First bytes of compressed files, and the commands that unpack them.
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ZIP = b"PK\x03\x04"
ANY_NAME = {"encoding": "utf-8", "errors": "surrogateescape"}  # names in an archive may have any bytes
_BLOCK = 512
_END = bytes(_BLOCK)
_FILES, _HARD_LINK, _LINKS = (b"0", b"\0"), b"1", (b"1", b"2")  # kinds of members
_LONGEST = 1 << 16  # the most bytes of a long name or a pax header


def refuse(error: UserError) -> NoReturn:
    """Raise `error`: the `Report` of a reader that stops at the first problem."""
    raise error


def tar_members(path: Path, data: np.ndarray, report: Report = refuse) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the regular files of a USTAR, GNU or pax archive, and of hard links to them.

    A file that is no tar archive, a damaged header, a member cut short, an end without the end-of-archive block, data
    after that block, a symbolic link, and a hard link to nothing are reported as UserErrors. If `report` returns,
    reading goes on at the next whole header.

    data: the archive's bytes, uint8 (size,). path: the archive's name in errors.
    """
    view, position, extended = memoryview(data), 0, {}
    places: dict[str, tuple[int, int]] = {}  # of the files so far, for hard links
    if problem := _no_archive(path, bytes(view[:1024])):
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
            if kind in _LINKS:  # without content, whatever the field says
                size = 0
            if size < 0 or (size > _LONGEST and kind in (b"L", b"K", b"x")):
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
            extended["path"] = bytes(view[offset : offset + size]).rstrip(b"\0").decode(**ANY_NAME)
        elif kind == b"K":  # GNU: the next member's long target
            extended["linkpath"] = bytes(view[offset : offset + size]).rstrip(b"\0").decode(**ANY_NAME)
        elif kind == b"x":  # pax: the next member's fields
            try:
                extended |= _pax(bytes(view[offset : offset + size]))
            except ValueError:
                report(UserError(f"{path}: byte {position}: damaged pax header; copy or make it again"))
        else:
            if kind in _LINKS:
                target = extended.get("linkpath") or header[157:257].partition(b"\0")[0].decode(**ANY_NAME)
                if kind == _HARD_LINK and target in places:
                    yield name, *places[target]
                else:
                    report(UserError(f"{path}: byte {position}: {_unfollowed(kind, name, target)}"))
            elif kind in _FILES:
                places[name] = offset, size
                yield name, offset, size
            extended = {}
        position = offset + -(-size // _BLOCK) * _BLOCK


def _no_archive(path: Path, head: bytes) -> str | None:
    """Return why a file with the first bytes `head` is no tar archive, and what to do, or None if it may be one."""
    for start, command in _PACKED.items():
        if head.startswith(start):
            new = path.with_name(path.name.split(".")[0] + "-unpacked.tar")
            return f"is compressed, and shards are read in place; unpack it: {command} -dc {path} > {new}"
    if head.startswith(_ZIP):
        return "is a zip archive, and shards are tar archives; unpack it with: unzip"
    return stand_in(head)


def _unfollowed(kind: bytes, name: str, target: str) -> str:
    """Return the problem with a link that leads to no file of the archive."""
    if kind == _HARD_LINK:
        return f"{name!r} is a hard link to {target!r}, which no earlier member is; make the archive again"
    return f"{name!r} is a symbolic link to {target!r}; make the archive again with: tar --dereference"


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
    return (prefix + b"/" + name if prefix else name).decode(**ANY_NAME)


def _pax(records: bytes) -> dict[str, str | int]:
    """Return `path`, `linkpath` and `size` of a pax header, if it has them. Raises ValueError if it is damaged.

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
        if key in (b"path", b"linkpath"):
            fields[key.decode()] = value.decode(**ANY_NAME)
        elif key == b"size":
            fields["size"] = int(value)
        start = end
    return fields
