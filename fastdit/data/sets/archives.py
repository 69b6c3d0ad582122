"""Read the files of a download one after the other, without unpacking it: tar, .tar.gz, .tgz, zip, or a folder.

A .tar.gz inside a zip is read too, as Caltech-101 comes. A file that is no archive, such as a list, is itself.
"""

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

from fastdit.data.shards import is_leftover
from fastdit.errors import UserError
from fastdit.files import stand_in

Read = Callable[[], bytes]
_GZIP = b"\x1f\x8b"  # browsers unpack some downloads and keep the name
_PACKED = (".tar.gz", ".tgz")
_BLOCK = 1 << 20
_FAULTS = (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
_FAULTS += (RuntimeError,)  # of zipfile: a password is needed, or the kind of compression is not known


def files_in(path: Path) -> Iterator[tuple[str, Read]]:
    """Yield each file's name and a function that reads it, which works until the next file is asked for.

    The names in a folder begin with the folder's own name, as in the archive that it was unpacked from. What systems
    leave behind (`__MACOSX`, `._*`) is no file. Raises UserError, also while a file is read, if the archive is damaged.
    """
    with _readable(path):
        for stored, read in _files(path):
            name = stored.removeprefix("./").lstrip("/")
            if not _is_leftover(name):
                yield name, _guarded(path, read)


def _files(path: Path) -> Iterator[tuple[str, Read]]:
    """Yield the files of `path`, whatever it is."""
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            yield file.relative_to(path.parent).as_posix(), file.read_bytes
        return
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if fault := stand_in(head):
            raise UserError(f"{path}: {fault}")
        if path.name.endswith((".tar", *_PACKED)):
            with tqdm.wrapattr(file, "read", path.stat().st_size, desc=path.name, leave=False, disable=None) as counted:
                yield from _in_tar(counted, packed=head.startswith(_GZIP))
        elif path.suffix == ".zip":
            yield from _in_zip(file)
        else:
            yield path.name, file.read


def _in_tar(stream: IO[bytes], packed: bool) -> Iterator[tuple[str, Read]]:
    """Yield the files of a tar that is read from its start to its end. Raises EOFError if it was cut."""
    content = _Tail(gzip.GzipFile(fileobj=stream) if packed else stream)
    with tarfile.open(fileobj=content, mode="r|") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, tar.extractfile(member).read
    if content.last.strip(b"\0"):  # `tarfile` takes a cut between two members for the end
        raise EOFError("it was cut")
    while content.read(_BLOCK):  # gzip compares its checksum at its own end
        pass


class _Tail:
    """Read a stream, and remember the last block that was read: zeros, at the end of a whole tar."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.last = stream, b"x"

    def read(self, size: int) -> bytes:
        """Return the next bytes of the stream."""
        content = self.stream.read(size)
        self.last = content[-tarfile.BLOCKSIZE :] or self.last
        return content


def _in_zip(file: IO[bytes]) -> Iterator[tuple[str, Read]]:
    """Yield the files of a zip, and those of the .tar.gz in it."""
    with zipfile.ZipFile(file) as opened:
        for info in opened.infolist():
            if info.filename.endswith(_PACKED) and not _is_leftover(info.filename):
                with opened.open(info) as inner:
                    yield from _in_tar(inner, packed=True)
            elif not info.is_dir():
                yield info.filename, lambda info=info: opened.read(info)


def _is_leftover(name: str) -> bool:
    """Return whether a part of a file's name is one that a system leaves behind."""
    return any(map(is_leftover, name.split("/")))


def _guarded(path: Path, read: Read) -> Read:
    """Return `read` with the errors of a damaged archive as UserErrors."""

    def guarded() -> bytes:
        with _readable(path):
            return read()

    return guarded


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise the errors of a damaged archive as a UserError that names it."""
    try:
        yield
    except _FAULTS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); download it again") from None
