"""A benchmark's measurements as JSON lines, each in the file the moment it exists, so that a killed run loses nothing.

Imports only the standard library: `gpu_suite.py`, which has to keep its own time, reads journals without torch.
"""

import json
import os
import time
from pathlib import Path

from fastdit.errors import UserError


class Journal:
    """Holds lines and, if it has a file, appends each new one to it. What the file holds already comes first.

    A line is one `write` to a file opened for appending, so it is whole or missing after SIGKILL, and several processes
    may share the file. A full disk or a lost machine may leave a torn last line; the next journal begins a new line
    after it, and readers pass over it.

    Args:
        path: the file, created if needed, its folder too; None keeps lines in memory only.

    Raises UserError when the file cannot be written.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path).resolve() if path else None
        self.lines: list[dict] = []
        self._file: int | None = None
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
            self.lines, torn = _split_lines(self.path)
            size = os.fstat(self._file).st_size
            if torn > max(1, len(self.lines)):  # a journal has a torn line for each time that its machine was lost
                raise UserError(f"--journal {path}: holds no measurements; give a new file, or a journal")
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                self._append(b"\n")
        except OSError as error:
            raise UserError(f"--journal {path}: cannot be written ({error.strerror}); give a file") from None

    def write(self, what: str, **fields) -> dict:
        """Append the line {"what": what, "at": seconds since 1970, **fields} and return it.

        Raises TypeError when a field is not JSON, and UserError when the disk is full.
        """
        line = {"what": what, "at": round(time.time(), 3), **fields}
        text = json.dumps(line)
        self.lines.append(line)
        if self._file is not None:
            try:
                self._append((text + "\n").encode())
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror}); make room, then run the same command again to "
                    "go on (gpu_suite.py: with --continue)"
                ) from None
        return line

    def _append(self, data: bytes) -> None:
        if os.write(self._file, data) < len(data):
            raise OSError(28, "No space left on device")  # a part of the line fitted

    def done(self, what: str, key: str) -> set:
        """Return the values of field `key` in the lines of kind `what`: what need not run again."""
        return {line[key] for line in self.lines if line["what"] == what and key in line}


def read_journal(path: str | Path) -> list[dict]:
    """Return the whole lines of a journal in order; an empty list where there is no file."""
    return _split_lines(path)[0]


def count_torn(path: str | Path) -> int:
    """Return how many lines of a journal cannot be read."""
    return _split_lines(path)[1]


def _split_lines(path: str | Path) -> tuple[list[dict], int]:
    """Return the whole lines, and the number of others."""
    if not Path(path).is_file():
        return [], 0
    lines, torn = [], 0
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("what"), str):
            lines.append(line)
        elif text.strip():
            torn += 1
    return lines, torn
