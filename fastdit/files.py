"""Write files that are whole whenever they are there, and compute their checksums."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
