"""Name the commit that the code comes from, with or without a `.git` folder.

Where files alone were copied, the file COMMIT in the checkout's root stands in for `.git`. It holds the commit, its
full hash, and the checksum of each file of code, so that an edit made after the copy still shows. `make wheelhouse`
writes that file, and the wheelhouse's install.sh puts it in place.

Imports only the standard library: `benchmarks/wheelhouse.py` runs where torch is not installed.
"""

import hashlib
import os
import subprocess
from pathlib import Path

COMMIT_FILE = "COMMIT"
CODE = (".", ":!benchmarks/records", ":!*.md")  # measuring writes records and pages, and must not make the code dirty


def find_commit(root: Path) -> str:
    """Return the commit of the checkout at `root`, with "-dirty" when its code was changed since.

    The first of these that is there decides: the `.git` folder, the variable FASTDIT_COMMIT, the file COMMIT. With none
    of them, as for an installed wheel, the commit is "unknown". FASTDIT_COMMIT is taken at its word; only the other two
    can tell that files were changed.
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
    if not (root / ".git").exists():
        return ""
    commit = _git(root, "describe", "--always")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return f"{commit}-dirty" if commit and changed else commit


def _git(root: Path, *words: str) -> str:
    """Return what a git command prints; nothing when it fails, or when there is no git."""
    # Without the ceiling, git would describe a repository around `root` when root's own .git is broken.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    try:
        ended = subprocess.run(["git", *words], cwd=root, env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ended.stdout.strip()


def _from_file(root: Path) -> str:
    # Beside an installed wheel's folder, a file of this name would be somebody else's.
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
    """Return the SHA-256 sum of a file, or "missing"."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"
