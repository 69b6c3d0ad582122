"""Make published weights ready to use: `fastdit-data weights NAME` finds or downloads them, and verifies them.

    models/NAME/FILE            the files, each of which appears when it is verified
    models/NAME/verified.json   what was verified, for `verified_weights`
    models/NAME/.unfinished/    downloads that are not complete; the next command continues them

Without a name, the command lists all weights that it knows.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdit.command_line import OneLineParser
from fastdit.commands.weights_uses import uses
from fastdit.data import UNFINISHED
from fastdit.data.sets.fetching import File, Missing, obtain_file
from fastdit.errors import UserError
from fastdit.files import describe_bytes, prepare_folder, sha256_of, stand_in
from fastdit.models.known_weights import (
    FOLDER,
    KNOWN,
    KnownWeights,
    WeightFile,
    find_known,
    record_verified,
)
from fastdit.models.weight_content import check_content

_ENDPOINT = "HF_ENDPOINT"  # variable that names a mirror of huggingface.co, as in Hugging Face's own programs


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(
        prog="fastdit-data weights",
        description="Find or download published weights, and verify them. Without a name: list all of them.",
    )
    parser.add_argument("name", type=str, help="one of " + ", ".join(KNOWN))
    parser.add_argument("--out", type=str | None, default=None, help=f"folder for the files; default: {FOLDER}/NAME")
    parser.add_argument("--from", type=str | None, default=None, help="file or folder to take instead of downloading")
    parser.add_argument(
        "--sha256", type=str | None, default=None, help="checksum that the file of weights must have, in hexadecimal"
    )
    return parser


def run(argv: list[str]) -> None:
    """Run the command. Raises UserError if the weights cannot be obtained, verified or written."""
    # Check the flags.
    if not argv:
        print(_list())
        return
    args = _parser().parse(argv)
    known, name = find_known(args.name), args.name
    pin = None if args.sha256 is None else args.sha256.lower()
    if pin is not None and not re.fullmatch("[0-9a-f]{64}", pin):
        raise UserError(f"--sha256 {args.sha256}: must be 64 hexadecimal digits, as sha256sum prints them")
    user_path = None if args["from"] is None else _user_path(Path(args["from"]), known)
    out = Path(args.out or f"{FOLDER}/{name}")
    prepare_folder(out, f"--out {out}")

    # Obtain and verify the files, and then put them into place.
    print(_describe(name, known), flush=True)
    with _staging(out) as staging:
        verifier = _Verifier(known, pin)
        paths = {file.name: _obtain(file, out, staging, user_path, verifier) for file in known.files}
        compared = _compare(name, known, paths, staging) if verifier.needs_content else None
        sums = {file: verifier.sum_of(path) for file, path in paths.items()}
        for file, path in paths.items():
            _place(path, out / file, staging)
    record_verified(name, out, sums)

    # Say what was verified, and what to do next.
    for file in known.files:
        print(f"{out / file.name}: {_verdict(file, sums[file.name], verifier)}")
    if compared:
        print(f"compared instead: {compared}")
    print(uses(name, known, out))


def _user_path(path: Path, known: KnownWeights) -> Path:
    """Return the user's file or the folder that holds the files. Raises UserError if there is none."""
    if not path.exists():
        raise UserError(f"--from {path}: no such file or folder")
    inside = path / known.subfolder if known.subfolder else path
    return inside if inside.is_dir() else path


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Yield the folder for downloads, which stays if the block fails. Raises UserError if another command uses it."""
    staging = out / UNFINISHED
    staging.mkdir(exist_ok=True)
    with (staging / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another fastdit-data is at work there; wait for it to end") from None
        except OSError:  # a file system without locks
            pass
        yield staging
        shutil.rmtree(staging, ignore_errors=True)


class _Verifier:
    """Compare files with the checksums that they must have: the pinned one, else the published one.

    Args:
        known: the weights.
        pin: SHA-256 that the user gives for the file of weights, or None.
    """

    def __init__(self, known: KnownWeights, pin: str | None) -> None:
        self.files = {file.name: file for file in known.files}
        self.pins = {} if pin is None else {known.files[0].name: pin}
        self.pinned = any(pin != self.files[name].sha256 for name, pin in self.pins.items())  # to another sum
        self._sums: dict[Path, str] = {}

    @property
    def needs_content(self) -> bool:
        """Return whether checksums do not tell that all files are the published ones."""
        return self.pinned or any(file.sha256 is None for file in self.files.values())

    def expected(self, name: str) -> str | None:
        """Return the SHA-256 that a file must have, or None. Beside a file that the user pins, no other is compared."""
        return self.pins.get(name) if self.pinned else self.files[name].sha256 or self.pins.get(name)

    def sum_of(self, path: Path) -> str:
        """Return the SHA-256 of a file, which is computed once."""
        if path not in self._sums:
            self._sums[path] = sha256_of(path)
        return self._sums[path]

    def wrong(self, file: File | WeightFile, path: Path) -> str | None:
        """Return what is wrong with the file at `path`, in words that follow its name; None if it may be right."""
        with path.open("rb") as opened:
            if fault := stand_in(opened.read(512)):
                return fault
        expected = self.expected(file.name)
        if expected is None or (found := self.sum_of(path)) == expected:
            return None
        self._sums.pop(path)
        if file.name in self.pins:
            return f"has sha256 {found}, --sha256 is {expected}"
        # A shorter file tells a copy that was cut short.
        known, size = self.files[file.name].size, path.stat().st_size
        sizes = f", and {size:,} bytes where {known:,} are expected" if known not in (None, size) else ""
        fault = f"has sha256 {found}, expected {expected}{sizes}; copy or download it again"
        if file.name != next(iter(self.files)):
            return fault
        return f"{fault}, or if you trust it, add --sha256 {found}, and its tensors are compared instead"


def _obtain(file: WeightFile, out: Path, staging: Path, user_path: Path | None, verifier: _Verifier) -> Path:
    """Return the path of a file whose checksum is right, or is not known: in `out`, the user's, or a download.

    Raises UserError that says which file to put where.
    """
    place = out / file.name
    if place.is_file():
        if fault := verifier.wrong(file, place):
            raise UserError(f"{place} {fault}; remove it, or choose another folder with --out")
        return place
    address, *mirrors = (_at_endpoint(address) for address in file.addresses)
    renamed = len(verifier.files) == 1
    wanted = File(file.name, (), address, mirrors=tuple(mirrors), size=file.bytes, renamed=renamed)
    try:
        return obtain_file(wanted, staging, user_path, lambda _, path: verifier.wrong(file, path))
    except Missing as missing:
        if user_path is not None:
            raise UserError(f"{file.name}: {missing}; the published file is {address}") from None
        raise UserError(
            f"{file.name}: {missing}; download {address} as {place} and run the command again, or add --from "
            "FILE_OR_FOLDER"
        ) from None


def _at_endpoint(address: str) -> str:
    """Return an address on the mirror of huggingface.co that the environment names, if it names one."""
    endpoint = os.environ.get(_ENDPOINT)
    official = "https://huggingface.co/"
    return address.replace(official, f"{endpoint.rstrip('/')}/", 1) if endpoint else address


def _compare(name: str, known: KnownWeights, paths: dict[str, Path], staging: Path) -> str:
    """Return in words what `check_content` compared. Raises UserError, and removes downloads, if they are wrong."""
    with tempfile.TemporaryDirectory(prefix="fastdit-") as folder:
        for file, path in paths.items():
            (Path(folder) / file).symlink_to(path.absolute())
        try:
            return check_content(known, Path(folder))
        except ValueError as error:
            fault = error
    for path in paths.values():
        if path.is_relative_to(staging):
            path.unlink()
    path, address = paths[known.files[0].name], _at_endpoint(known.files[0].addresses[0])
    if path.is_relative_to(staging):
        raise UserError(f"{address}: what came from there is not {name} ({fault}); see {known.home} for a new address")
    raise UserError(f"{path}: is not {name} ({fault}); take {address}")


def _place(path: Path, place: Path, staging: Path) -> None:
    """Put a verified file into its place: rename a download, link a user's file, or copy it to another disk."""
    if path == place:
        return
    if path.is_relative_to(staging):
        path.replace(place)
        return
    try:
        os.link(path.resolve(), place)
        return
    except OSError:  # another disk, or one without links
        pass
    size, free = path.stat().st_size, shutil.disk_usage(place.parent).free
    if size > free:
        raise UserError(
            f"{place}: a copy of {path} takes {describe_bytes(size)}, and {describe_bytes(free)} are free; free some "
            "space, or choose a folder on the file's own disk with --out"
        )
    part = staging / f".{place.name}.copy"
    shutil.copyfile(path, part)
    part.replace(place)


def _list() -> str:
    """Return a table of all known weights."""
    rows = [("name", "size", "license", "weights")]
    for name, known in KNOWN.items():
        rows.append((name, _size(known.bytes), known.license, known.title))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]) for row in rows]
    return "\n".join([*lines, "", f"fastdit-data weights NAME puts them into {FOLDER}/NAME and verifies them."])


def _size(size: int | None) -> str:
    """Return a number of bytes in words."""
    return "unknown" if size is None else describe_bytes(size)


def _describe(name: str, known: KnownWeights) -> str:
    """Return what the weights are, their license, and address, size and checksum of each file."""
    lines = [f"{name}: {known.title}", f"license: {known.license} ({known.home})"]
    for file in known.files:
        about = "" if file.size or not file.bytes else "about "
        lines.append(f"{file.name}: {about}{_size(file.bytes)}, sha256 {file.sha256 or 'not published'}")
        lines += [f"    {_at_endpoint(address)}" for address in file.addresses]
    return "\n".join(lines)


def _verdict(file: WeightFile, found: str, verifier: _Verifier) -> str:
    """Return what the checksum of a file tells."""
    if found == file.sha256:
        return f"verified, sha256 {found}"
    if file.name in verifier.pins:
        return f"has the sha256 that you gave, {found}" + (", not the published one" if file.sha256 else "")
    told = "another than the published one" if file.sha256 else "none is published to compare it with"
    pin = f"; pin it with --sha256 {found}" if file.name == next(iter(verifier.files)) else ""
    return f"sha256 {found}, {told}{pin}"
