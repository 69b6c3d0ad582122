"""Download one file. A cut download continues where it was, at once and when the command is repeated."""

import http.client
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from fastdit.errors import explain
from fastdit.files import describe_bytes, stand_in

TIMEOUT = 30  # seconds that a server may be silent
_TRIES = 3
_PAUSE = 1.0  # seconds before a cut download continues
_BLOCK = 1 << 18  # bytes that are read at once


class DownloadError(Exception):
    """Report in one line an address and the reason why nothing comes from it."""


def download(address: str, path: Path, size: int | None = None) -> None:
    """Download `address` to `path`. Raises DownloadError, before anything is written if the disk is too small.

    `path` appears when the whole file is there. Until then the part that has arrived has a hidden name, which stays
    after an interruption, so that the next call continues it.

    size: bytes of the whole file, if that is known before the server tells it.
    """
    part = path.with_name(f".{path.name}.partial")
    _check_room(address, part, size)
    for attempt in range(_TRIES):
        try:
            _continue(address, part)
            break
        except urllib.error.URLError as error:  # refused, or no such server or file
            reason = error if isinstance(error, urllib.error.HTTPError) else error.reason
            raise DownloadError(f"{address}: {reason}") from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and (explained := explain(error, part)):  # a full disk, say
                raise DownloadError(f"{address}: {explained}") from None
            if attempt + 1 == _TRIES:
                raise DownloadError(f"{address}: {error or type(error).__name__}; repeated, it goes on") from None
            time.sleep(_PAUSE)
    part.replace(path)


def _check_room(address: str, part: Path, size: int | None) -> None:
    """Raise DownloadError if the rest of a file of `size` bytes does not fit onto the disk."""
    free = shutil.disk_usage(part.parent).free
    if size is not None and (rest := size - _bytes_in(part)) > free:
        raise DownloadError(
            f"{address}: {describe_bytes(rest)} are to come, and {part.parent} has {describe_bytes(free)} free; free "
            "some space, or choose another place with --out"
        )


def _bytes_in(part: Path) -> int:
    """Return the number of bytes that have arrived."""
    return part.stat().st_size if part.is_file() else 0


def _continue(address: str, part: Path) -> None:
    """Append the missing rest of the file to `part`.

    Raises OSError or HTTPException if the connection is cut, and DownloadError if the answer is not the file.
    """
    # Ask for the rest.
    begun = _bytes_in(part)
    headers = {"User-Agent": "fastdit"} | ({"Range": f"bytes={begun}-"} if begun else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send
            raise
        return

    # Append it; a server that ignores the range sends the whole file.
    with answer:
        begun = begun if answer.status == 206 else 0
        size = answer.headers.get("Content-Length")
        total = begun + int(size) if size else None
        _check_room(address, part, total)
        block = answer.read(_BLOCK)
        if not begun and (fault := stand_in(block[:512])):
            raise DownloadError(f"{address}: the answer {fault}")
        name = part.name.removeprefix(".").removesuffix(".partial")
        bar = tqdm(total=total, initial=begun, desc=name, unit="B", unit_scale=True)
        with bar, part.open("ab" if begun else "wb") as out:
            while block:
                out.write(block)
                bar.update(len(block))
                block = answer.read(_BLOCK)
    if total is not None and part.stat().st_size != total:
        raise http.client.HTTPException(f"cut after {part.stat().st_size} of {total} bytes")
