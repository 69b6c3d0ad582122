"""Let one run at a time write into a run's folder.

The lock is `flock` on the file `.lock`, which the system releases when the process ends, however it ends. The file
names the process, for the message to another one.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from fastdit.errors import UserError
from fastdit.files import prepare_folder, refuse_file_in_the_way
from fastdit.rundir.run_files import CHECKPOINTS, LOCK

PATIENCE = 5.0  # seconds that a lock without a living owner is waited for


class RunLock:
    """Lock a run's folder until `release` or the end of the process. Only rank 0 takes it."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK
        self.made_folder = self.made_file = False
        self.handle: int | None = None

    def check_place(self) -> None:
        """Raise UserError if a file is in the way of the folder, as `acquire` would, and write nothing."""
        for folder in (self.folder, self.folder / CHECKPOINTS):
            refuse_file_in_the_way(folder, f"--out {self.folder}")

    def acquire(self) -> None:
        """Make the folder if it is missing, and lock it.

        Raises UserError if the folder cannot be written, or if another run holds the lock. The lock of a process that
        has ended is taken over. Children that it leaves may hold it for a moment longer, so it is waited for.
        """
        # Check the folders that the run writes into.
        self.made_folder, self.made_file = not self.folder.exists(), not self.path.exists()
        for folder in (self.folder, self.folder / CHECKPOINTS):
            if folder == self.folder or folder.exists():
                prepare_folder(folder, f"--out {self.folder}")

        # Take the lock, and say whose it is. A file that its owner has removed meanwhile is no lock.
        end = time.monotonic() + PATIENCE
        self._open()
        while True:
            if self._try():
                if self._is_there():
                    break
                os.close(self.handle)
                self._open()
                continue
            owner = self._owner()
            if _lives(owner) or time.monotonic() > end:
                os.close(self.handle)
                self.handle = None
                who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
                raise UserError(
                    f"--out {self.folder}: {who} is training into it; wait for it, stop it, or choose another folder"
                )
            time.sleep(0.1)
        self._write(json.dumps(_this_process()).encode())

    def release(self) -> None:
        """Unlock the folder."""
        if self.handle is not None:
            self._write(b"")
            os.close(self.handle)
            self.handle = None

    def withdraw(self) -> None:
        """Leave no trace of a start that was refused: unlock, and remove file and folder if this lock made them."""
        if self.handle is not None and self.made_file:
            self.path.unlink(missing_ok=True)
            if self.made_folder:
                with suppress(OSError):  # it holds something
                    self.folder.rmdir()
        self.release()

    def _open(self) -> None:
        """Open the file, and make it if it is missing. Raises UserError."""
        try:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened ({error.strerror}); remove it") from None

    def _is_there(self) -> bool:
        """Return whether the open file is still the one in the folder."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.handle))
        except FileNotFoundError:
            return False

    def _try(self) -> bool:
        """Return whether the lock could be taken. Where a file system has no `flock`, the owner's life decides."""
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # ENOLCK or EOPNOTSUPP, as on some network file systems
            return not _lives(self._owner())
        return True

    def _owner(self) -> dict | None:
        """Return host, pid and start time of the process that the file names, or None."""
        return _read_owner(lambda: os.pread(self.handle, 4096, 0))

    def _write(self, content: bytes) -> None:
        """Replace the file's content."""
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, content, 0)


def trains(folder: Path) -> bool:
    """Return whether a process trains into a run's folder, as far as this host can know. Nothing is locked."""
    return _lives(_read_owner((folder / LOCK).read_bytes))


def _read_owner(read: Callable[[], bytes]) -> dict | None:
    """Return host, pid and start time of the process that a lock's content names, or None."""
    try:
        owner = json.loads(read())
        return owner if owner.keys() >= {"host", "pid", "started"} else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _this_process() -> dict:
    """Return what the file says of this process. The start time tells it from a later process with its pid."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _lives(owner: dict | None) -> bool:
    """Return whether a process lives, as far as this host can know: one on another host counts as living."""
    if owner is None:
        return False
    if owner["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(owner["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 1
    except psutil.NoSuchProcess:
        return False
