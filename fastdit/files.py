"""Write files that are whole whenever they are there, compute checksums, and check that files can be written."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastdit.errors import REMEDIES, UserError, explain

# Messages of torch and safetensors when a file cannot be written; only the latter's has an error number.
_FAILED_WRITE = re.compile(
    r"os error (\d+)|PytorchStreamWriter failed|inline_container|Parent directory .* does not exist|unexpected pos"
)
_PROBE = 1 << 20  # bytes that are written to learn why a file could not be
_PAGE = re.compile(rb"\s*(<!doctype html|<html|<head|<\?xml)", re.IGNORECASE)


def stand_in(head: bytes) -> str | None:
    """Return what a file with the first bytes `head` is, and what to do, if it stands in for the one that was meant."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch the file with: git lfs pull"
    if _PAGE.match(head):
        return "is an HTML page; download the file itself (its raw link, not the page that shows it)"
    return None


def printable(name: str) -> str:
    """Return the name of a file or folder, in which bytes that are not UTF-8 are written as `\\xe9`."""
    named = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:x}", name)
    return named.encode("utf-8", errors="backslashreplace").decode("utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a UserError that names `path`, or the file in it, if the block fails because the system refuses to write.

    Other errors, which may be mistakes in the code, pass unchanged.
    """
    try:
        yield
    except OSError as error:
        if explained := explain(error, path) or _explain_missing(error, path):
            raise explained from None
        raise
    except (RuntimeError, SafetensorError) as error:
        if (found := _FAILED_WRITE.search(str(error))) is None:
            raise
        if missing := _explain_missing(OSError(errno.ENOENT, ""), path):
            raise missing from None
        raise explain(OSError(_error_number(path, found[1]), "", str(path))) from None


def _explain_missing(error: OSError, path: Path) -> UserError | None:
    """Return an error of a folder that is no longer there as a UserError, or None if `error` is another one."""
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR) and not Path(path).parent.is_dir()
    return UserError(f"{path}: its folder was removed; make it again, or choose another place") if missing else None


def _error_number(path: Path, told: str | None) -> int:
    """Return the number of the system's error that kept `path` from being written; `told` is the message's own."""
    if told and int(told) in REMEDIES:
        return int(told)
    folder = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    probe = folder / f".{uuid.uuid4().hex}.probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in REMEDIES else errno.EIO
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return errno.EIO


@contextmanager
def write_atomically(path: Path, *, many_writers: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends.

    A reader of `path` finds the old file, the new one, or none, and never a part of one. If the block raises, the
    temporary file is removed and `path` stays as it was. A process that is killed leaves the temporary file behind.
    Raises UserError if the system refuses to write.

    many_writers: several processes may write `path` at the same time, so each needs a temporary name of its own.
        Otherwise the name is always the same, so that the next attempt replaces what a killed process left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex if many_writers else 'partial'}")
    with writing(path):
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Yield a path of `folder` without the characters []*?, which other libraries take for patterns of names."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fastdit-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder.absolute())
        yield link


def write_text(path: Path, text: str) -> None:
    """Write a text file, which is whole whenever it is there. Raises UserError if the system refuses."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, remedy: str) -> object:
    """Return what a JSON file holds. Raises UserError with `remedy` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from None


def describe_bytes(n: int) -> str:
    """Return a number of bytes in words, such as 23.2 MB."""
    power = min(max(0, len(str(n)) - 1) // 3, 4)
    return f"{n / 1000**power:.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def sha256_of(*paths: str | os.PathLike) -> str:
    """Return the SHA-256 of the bytes of `paths`, one after the other, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with the mode that the user's umask gives. The file appears once complete."""
    with write_atomically(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata=metadata)  # replaces the file by one of mode 0600
        temporary.chmod(mode)


def prepare_folder(folder: Path, flag: str) -> None:
    """Make a folder for results, and check that files can be written into it. Raises UserError.

    flag: the flag that names the folder or a file in it, with its value, for the message.
    """
    probe = folder / f".{uuid.uuid4().hex}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag}: cannot write into {folder} ({error.strerror}); choose another place") from None


def refuse_file_in_the_way(folder: Path, flag: str) -> None:
    """Raise UserError, as `prepare_folder` does, if a file is in the place of a folder or of one above it."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        reason = os.strerror(errno.EEXIST if place == folder.absolute() else errno.ENOTDIR)
        raise UserError(f"{flag}: cannot write into {folder} ({reason}); choose another place")


def prepare_new_folder(folder: Path, flag: str) -> None:
    """Check that `write_new_folder` can write `folder`, which must not exist or be empty. Raises UserError.

    flag: as in `prepare_folder`.
    """
    refuse_file_in_the_way(folder, flag)
    prepare_folder(folder.absolute().parent, flag)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{flag}: is not empty; name a new folder")


@contextmanager
def write_new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`, and rename it to `folder` when the block ends.

    If the block raises, the temporary folder is removed. A process that is killed leaves it behind, and the next one
    replaces it. Raises UserError if the system refuses to write, or if `folder` holds something by then.
    """
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            try:
                temporary.replace(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise UserError(f"{folder}: something was written into it meanwhile; name a new folder") from None
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def prepare_file(path: Path, flag: str) -> None:
    """Make the folder of a result file, and check that the file can be written there. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{flag}: is a folder; name a file")
    prepare_folder(path.parent, flag)
