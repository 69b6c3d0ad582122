"""A benchmark's measurements as JSON lines, each in the file the moment it exists, so that a killed run loses nothing.

Imports only the standard library: `gpu_suite.py`, which has to keep its own time, reads journals without torch.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path


class Journal:
    """Holds lines and, if it has a file, appends each new one to it. What the file holds already comes first.

    A line is one `write` to a file opened for appending: it is whole or missing, also after SIGKILL, and several
    processes may share the file.

    Args:
        path: the file, created if needed; None keeps lines in memory only.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else None
        self.lines = read_journal(self.path) if self.path else []
        self._file = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644) if self.path else None

    def write(self, what: str, **fields) -> dict:
        """Append the line {"what": what, "at": seconds since 1970, **fields} and return it.

        Raises ValueError when a field is not JSON.
        """
        line = {"what": what, "at": round(time.time(), 3), **fields}
        text = json.dumps(line)
        self.lines.append(line)
        if self._file is not None:
            os.write(self._file, (text + "\n").encode())
        return line

    def done(self, what: str, key: str) -> set:
        """Return the values of field `key` in the lines of kind `what`: what need not run again."""
        return {line[key] for line in self.lines if line["what"] == what and key in line}


def read_journal(path: str | Path) -> list[dict]:
    """Return the lines of a journal in order. A line cut short by a full disk or a lost machine is left out."""
    return list(_whole_lines(Path(path))) if Path(path).exists() else []


def _whole_lines(path: Path) -> Iterator[dict]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "what" in line:
            yield line
