"""Write files that are whole whenever they are there, compute checksums, and check that files can be written."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastdit.errors import UserError


@contextmanager
def write_atomically(path: Path, *, many_writers: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends.

    A reader of `path` finds the old file, the new one, or none, and never a part of one. If the block raises, the
    temporary file is removed and `path` stays as it was. A process that is killed leaves the temporary file behind.

    many_writers: several processes may write `path` at the same time, so each needs a temporary name of its own.
        Otherwise the name is always the same, so that the next attempt replaces what a killed process left.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex if many_writers else 'partial'}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


def prepare_file(path: Path, flag: str) -> None:
    """Make the folder of a result file, and check that the file can be written there. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{flag}: is a folder; name a file")
    prepare_folder(path.parent, flag)
