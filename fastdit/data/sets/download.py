"""Download one file. A cut download continues where it was, at once and when the command is repeated."""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 30  # seconds that a server may be silent
_TRIES = 3
_PAUSE = 1.0  # seconds before a cut download continues


class DownloadError(Exception):
    """Report in one line an address and the reason why nothing comes from it."""


def download(address: str, path: Path) -> None:
    """Download `address` to `path`. Raises DownloadError.

    `path` appears when the whole file is there. Until then the part that has arrived has a hidden name, which stays
    after an interruption, so that the next call continues it.
    """
    part = path.with_name(f".{path.name}.partial")
    for attempt in range(_TRIES):
        try:
            _continue(address, part)
            break
        except urllib.error.URLError as error:  # refused, or no such server or file
            reason = error if isinstance(error, urllib.error.HTTPError) else error.reason
            raise DownloadError(f"{address}: {reason}") from None
        except (OSError, http.client.HTTPException) as error:
            if attempt + 1 == _TRIES:
                raise DownloadError(f"{address}: {error or type(error).__name__}; repeated, it goes on") from None
            time.sleep(_PAUSE)
    part.replace(path)


def _continue(address: str, part: Path) -> None:
    """Append the missing rest of the file to `part`. Raises OSError or HTTPException if the connection is cut."""
    # Ask for the rest.
    begun = part.stat().st_size if part.is_file() else 0
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
        bar = tqdm(total=total, initial=begun, desc=address.rpartition("/")[2], unit="B", unit_scale=True)
        with bar, part.open("ab" if begun else "wb") as out:
            while block := answer.read(1 << 18):
                out.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise http.client.HTTPException(f"cut after {part.stat().st_size} of {total} bytes")
