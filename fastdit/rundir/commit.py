"""Name the commit that the code comes from, with or without a `.git` folder.

In a copy without a `.git` folder, the file COMMIT in the checkout's root replaces it. It holds the commit, its full
hash, and the checksum of each code file, so that an edit made after the copy still shows. `make wheelhouse` writes that
file, and the wheelhouse's install.sh puts it in place.

This module needs only the standard library, because `benchmarks/wheelhouse.py` runs where torch is not installed.
"""

import os
import subprocess
from pathlib import Path

from fastdit.files import sha256_of

COMMIT_FILE = "COMMIT"
CODE = (".", ":!benchmarks/records", ":!*.md")  # benchmarks write records and pages, which are no change of the code


def find_commit(root: Path) -> str:
    """Return the commit of the checkout at `root`, with "-dirty" when its code was changed since.

    The first of these that exists decides: the `.git` folder, the variable FASTDIT_COMMIT, the file COMMIT. Without any
    of them, as for an installed wheel, the commit is "unknown". FASTDIT_COMMIT is not checked. Only the other two can
    tell that files were changed.
    """
    return _from_git(root) or os.environ.get("FASTDIT_COMMIT", "").strip() or _from_file(root) or "unknown"


def commit_file(root: Path) -> str:
    """Return the text of a COMMIT file for the checkout at `root`, which has a `.git` folder or such a file itself."""
    if not _from_git(root):
        path = root / COMMIT_FILE
        return path.read_text(encoding="utf-8") if path.is_file() else find_commit(root) + "\n"
    names = [name for name in _git(root, "ls-files", "-z", "--", *CODE).split("\0") if (root / name).is_file()]
    lines = [
        find_commit(root),
        _git(root, "rev-parse", "HEAD"),
        *(f"{_checksum(root / name)}  {name}" for name in names),
    ]
    return "\n".join(lines) + "\n"


def _from_git(root: Path) -> str:
    """Return the commit that git names, with "-dirty" if its code was changed, or "" without a `.git` folder."""
    if not (root / ".git").exists():
        return ""
    commit = _git(root, "describe", "--always")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return f"{commit}-dirty" if commit and changed else commit


def _git(root: Path, *words: str) -> str:
    """Return the output of a git command, or "" if it fails or git is not installed."""
    # Without the ceiling, git would describe a repository around `root` when root's own .git is broken.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    try:
        ended = subprocess.run(["git", *words], cwd=root, env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ended.stdout.strip()


def _from_file(root: Path) -> str:
    """Return the commit that the file COMMIT names, with "-dirty" if a checksum differs, or "" without such a file."""
    # Beside an installed wheel, a file of this name would belong to another program.
    if not (root / "pyproject.toml").is_file():
        return ""
    try:
        commit, *lines = (root / COMMIT_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    checksums = [line.split("  ", 1) for line in lines if "  " in line]
    changed = any(_checksum(root / name) != checksum for checksum, name in checksums)
    return f"{commit}-dirty" if changed and not commit.endswith("-dirty") else commit.strip()


def _checksum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, or "missing"."""
    try:
        return sha256_of(path)
    except OSError:
        return "missing"
