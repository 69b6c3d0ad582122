"""One file from an address: a cut download goes on where it was, now and when the command is repeated."""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 30  # seconds that a server may be silent
_TRIES = 3
_PAUSE = 1.0  # seconds before a cut download goes on


class DownloadError(Exception):
    """The address and why nothing comes from it, in one line."""


def download(address: str, path: Path) -> None:
    """`path` appears when all of the file is there; until then its part has a hidden name. Raises DownloadError."""
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
    """What is still missing of the file. Raises OSError or HTTPException when cut."""
    begun = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "fastdit"} | ({"Range": f"bytes={begun}-"} if begun else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send
            raise
        return
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
