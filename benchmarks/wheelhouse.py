"""Collect, in one folder, what fastdit needs on a machine that has PyTorch and no network: `make wheelhouse`.

The folder holds wheels for the other machine's Python and processor, the file `commit`, `install.sh` and a MANIFEST
with the SHA-256 sum of each file. docs/offline.md tells how to use it. The collecting machine needs git and a Python
3.11 with pip; torch is not needed.

Nothing here lists fastdit's dependencies. The wheels are what pyproject.toml requires and what these packages require
in turn, without what a PyTorch image has (IMAGE). constraints.txt sets the versions.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path
from typing import NamedTuple, NoReturn

try:
    from packaging.markers import default_environment
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ModuleNotFoundError:  # pip has a copy; importing pip makes distutils the standard library's, which breaks others
    from pip._vendor.packaging.markers import default_environment
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # fastdit itself need not be installed here
from fastdit.errors import UserError, run_command  # noqa: E402
from fastdit.rundir.commit import commit_file, find_commit  # noqa: E402

# What a usual PyTorch image has, with what these packages bring. Its typing_extensions does not count: pydantic needs a
# recent one.
IMAGE = (
    "torch", "triton", "numpy", "scipy", "scikit-learn", "pillow", "matplotlib", "tensorboard", "jinja2", "pyyaml",
    "safetensors", "psutil", "tqdm", "einops", "msgpack", "ninja", "packaging", "py-cpuinfo", "six", "setuptools",
    "pybind11", "pytest", "pytest-xdist", "hypothesis",
)  # fmt: skip
# DALI and its decoder are 270 MB, and optional: without them a torch DataLoader reads the data, at a higher cost.
DALI = ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13")
SOURCE_ONLY = ("deepspeed",)  # publishes no wheels; its source makes one without compiled files, for any machine
PLOTLY = ("plotly",)  # without it the report shows its curves as a picture
SETS = ("eval", "dali", "plotly")
PLATFORMS = {"linux-x86_64": "x86_64", "linux-aarch64": "aarch64"}
NEWEST_GLIBC = 28  # torch's own wheels need glibc 2.28
MANIFEST = "MANIFEST"


class Target(NamedTuple):
    """The Python and the processor that the wheels are for."""

    machine: str
    python: str

    def pip_flags(self) -> list[str]:
        tags = [f"manylinux_2_{minor}_{self.machine}" for minor in range(NEWEST_GLIBC, 4, -1)]
        tags += [f"{name}_{self.machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
        flags = ["--python-version", self.python, "--implementation", "cp"]
        return flags + [word for tag in tags for word in ("--platform", tag)]

    def markers(self) -> dict[str, str]:
        """Return the environment in which the wheels' requirements are evaluated."""
        return default_environment() | {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_version": f"{self.python}.0",
            "platform_machine": self.machine,
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
        }


def main(argv: list[str] | None = None) -> NoReturn:
    """Leave the process: 0, or 2 after one line that says what is wrong and what to do."""
    run_command(_main, argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def _main(argv: list[str]) -> None:
    parser = _Parser(prog="wheelhouse.py", description="Collect what fastdit needs on a machine without network.")
    parser.add_argument("--platform", default="linux-x86_64", help=" or ".join(PLATFORMS))
    parser.add_argument("--python-version", default="3.12", help="of the machine without network")
    parser.add_argument("--with", dest="sets", default="", help=f"more than the core: {', '.join(SETS)}")
    parser.add_argument("--piece-mb", default="", help="cut larger files into pieces of so many MB")
    parser.add_argument("--out", default="wheelhouse", help="the folder; an earlier wheelhouse is replaced")
    parser.add_argument("--list-image", action="store_true", help="only print what the other machine must have")
    args = parser.parse_args(argv)
    if args.list_image:
        return print("\n".join(IMAGE))

    # Check every setting before anything is downloaded.
    target, sets, piece, out = _target(args), _sets(args.sets), _piece(args.piece_mb), Path(args.out)
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is no wheelhouse; name another folder with WHEELHOUSE=")

    # Collect beside the final place, so that an interrupted run leaves the earlier wheelhouse whole.
    place = out.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".wheelhouse-") as name:
        folder = Path(name) / "wheelhouse"
        folder.mkdir()
        collect(requirements(sets), target, folder)
        finish(folder, target, sets, piece)
        if place.exists():
            shutil.rmtree(place)
        folder.rename(place)
    files = [path for path in sorted(out.iterdir()) if path.name != MANIFEST]
    for path in files:
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.name}")
    size = sum(path.stat().st_size for path in files) / 1e6
    print(
        f"{out}: {size:.1f} MB for Python {target.python} on {args.platform}, "
        f"commit {find_commit(ROOT)}. There, in the checkout's root: bash {out.name}/install.sh"
    )


def _target(args: argparse.Namespace) -> Target:
    if args.platform not in PLATFORMS:
        raise UserError(f"PLATFORM={args.platform}: is not known; choose {' or '.join(PLATFORMS)}")
    found = re.fullmatch(r"3\.(\d+)", args.python_version)
    if not found or int(found[1]) < 11:
        raise UserError(f"PYTHON_VERSION={args.python_version}: give a version from 3.11 on, such as 3.12")
    return Target(PLATFORMS[args.platform], args.python_version)


def _sets(text: str) -> list[str]:
    sets = text.replace(",", " ").split()
    if unknown := [name for name in sets if name not in SETS]:
        raise UserError(f"WITH={text}: {unknown[0]} is not known; choose from {', '.join(SETS)}")
    return ["core", *dict.fromkeys(sets)]


def _piece(text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"PIECE_MB={text}: give a whole number of MB, such as 55")
    return int(text) * 10**6


def requirements(sets: list[str]) -> list[Requirement]:
    """Return what pyproject.toml requires for the named sets. What IMAGE has is left in; `collect` passes over it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = [Requirement(text) for text in project["dependencies"]]
    left_out = {name for kind, names in (("dali", DALI), ("plotly", PLOTLY)) if kind not in sets for name in names}
    found = [requirement for requirement in own if requirement.name not in left_out]
    for name in set(sets) & set(project["optional-dependencies"]):
        found += map(Requirement, project["optional-dependencies"][name])
    return found


def collect(wanted: list[Requirement], target: Target, folder: Path) -> None:
    """Download the wheels of `wanted` and of all that they require, without what IMAGE has."""
    environment = target.markers()
    wheels: dict[str, Path] = {}
    followed: set[tuple[str, str]] = set()
    while wanted := [requirement for requirement in wanted if canonicalize_name(requirement.name) not in IMAGE]:
        download(
            [requirement for requirement in wanted if canonicalize_name(requirement.name) not in wheels], target, folder
        )
        wheels |= {canonicalize_name(path.name.partition("-")[0]): path for path in folder.glob("*.whl")}
        needed = []
        for name, extra in dict.fromkeys(
            (canonicalize_name(requirement.name), extra)
            for requirement in wanted
            for extra in ("", *requirement.extras)
        ):
            if (name, extra) in followed:
                continue
            followed.add((name, extra))
            for requirement in wheel_requirements(wheels[name]):
                if requirement.marker is None or requirement.marker.evaluate(environment | {"extra": extra}):
                    needed.append(requirement)
        wanted = needed


def wheel_requirements(wheel: Path) -> list[Requirement]:
    """Return what a wheel's metadata requires."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def download(wanted: list[Requirement], target: Target, folder: Path) -> None:
    """Download the wheels of these requirements alone; of a package without wheels build one."""
    source = [str(_plain(requirement)) for requirement in wanted if requirement.name in SOURCE_ONLY]
    binary = [str(_plain(requirement)) for requirement in wanted if requirement.name not in SOURCE_ONLY]
    if source:
        _pip("wheel", "--wheel-dir", str(folder), *source)
    if binary:
        _pip("download", "--only-binary", ":all:", *target.pip_flags(), "--dest", str(folder), *binary)
    for path in folder.glob("*.whl"):
        if path.name.lower().startswith(SOURCE_ONLY) and not path.name.endswith("-none-any.whl"):
            raise UserError(f"{path.name}: was built for this machine alone; unset DeepSpeed's DS_BUILD_ variables")


def _plain(requirement: Requirement) -> Requirement:
    """Return a requirement without extras and marker, which pip would evaluate for the Python that it runs in."""
    plain = Requirement(str(requirement))
    plain.extras, plain.marker = set(), None
    return plain


def _pip(command: str, *words: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        command,
        "--quiet",
        "--no-deps",
        "-c",
        str(ROOT / "constraints.txt"),
        *words,
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or ended.stderr.splitlines()
        problem = said[0].removeprefix("ERROR: ") if said else f"code {ended.returncode}"
        raise UserError(f"pip {command[3]} failed: {problem}; check the network, and the versions in constraints.txt")


def finish(folder: Path, target: Target, sets: list[str], piece: int | None = None) -> None:
    """Add install.sh, the commit and the MANIFEST to a folder of wheels. Files larger than `piece` bytes are cut."""
    for path in sorted(folder.glob("*.whl")):
        if piece and path.stat().st_size > piece:
            _cut(path, piece)
    shutil.copy(ROOT / "benchmarks" / "wheelhouse_install.sh", folder / "install.sh")
    (folder / "commit").write_text(commit_file(ROOT), encoding="utf-8")
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    head = {"python": target.python, "machine": target.machine, "sets": " ".join(sets), "files": len(files)}
    lines = [f"# {name} {value}" for name, value in head.items()]
    lines += [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]  # sha256sum's format
    (folder / MANIFEST).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cut(path: Path, piece: int) -> None:
    """Replace a file by pieces of it: NAME.part00, NAME.part01, and so on."""
    with path.open("rb") as file:
        for index, data in enumerate(iter(lambda: file.read(piece), b"")):
            path.with_name(f"{path.name}.part{index:02d}").write_bytes(data)
    path.unlink()


if __name__ == "__main__":
    main()
