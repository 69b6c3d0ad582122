"""The package from outside: what a wheel holds, what its names may not hide, and who imports whom."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FASTDIT, KERNELS = ROOT / "fastdit", ROOT / "kernels"
BUILT = ("*.so", "_native.json", "__pycache__", "*.pyc", "*.egg-info")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> tuple[Path, str]:
    """The wheel of this tree, and what building it said. No compiler: test_build.py has the compiled parts."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("fastdit", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    environment = os.environ | {"CC": "/bin/false", "CXX": "/bin/false", "FASTDIT_CUDA_ARCHS": "", "NO_COLOR": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (path,) = out.glob("*.whl")
    return path, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel[0]) as archive:
        return set(archive.namelist())


def test_building_warns_of_nothing(wheel):
    assert "Deprecat" not in wheel[1]
    assert "importable package" not in wheel[1]


def test_the_wheel_holds_every_module_and_nothing_else_importable(names):
    modules = {f"fastdit/{path.relative_to(FASTDIT)}" for path in FASTDIT.rglob("*.py")}
    modules |= {f"fastdit/kernels/{path.relative_to(KERNELS)}" for path in KERNELS.rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"fastdit"}


@pytest.mark.parametrize("pattern", ["presets/*.yaml", "ds_configs/*.json", "assets/*/*", "rundir/*.jinja"])
def test_the_wheel_holds_what_a_run_reads(names, pattern):
    wanted = {f"fastdit/{path.relative_to(FASTDIT)}" for path in FASTDIT.glob(pattern)}
    assert wanted
    assert wanted <= names


def test_the_wheel_holds_licences_and_commands(wheel, names):
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "fastdit/assets/fashion_mnist/LICENSE"}
    with zipfile.ZipFile(wheel[0]) as archive:
        folder = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        commands = archive.read(f"{folder}/entry_points.txt").decode().split("\n")
        metadata = archive.read(f"{folder}/METADATA").decode()
    assert "fastdit-train = fastdit.train:main" in commands
    assert "fastdit-sample = fastdit.sample:main" in commands
    assert "License-Expression: Apache-2.0" in metadata
    assert "/work" not in metadata


def test_installed_elsewhere_it_works_and_hides_no_other_kernels(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel[0]]
    subprocess.run(command, check=True, capture_output=True)
    code = """
import importlib.util
from fastdit import kernels
from fastdit.parser import parse, presets
from fastdit.data import open_source
from fastdit.training.deepspeed_config import make_deepspeed_config
assert kernels.__name__ == "fastdit.kernels", kernels
assert importlib.util.find_spec("kernels") is None
config = parse(["--preset", "quickstart"])
assert make_deepspeed_config(config, 1, False).stage == 1
assert open_source(config.data.source).n == 10_000
print(kernels.__file__, *presets())
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    where, *presets = ended.stdout.splitlines()[-1].split()  # DeepSpeed logs its own lines before
    assert Path(where).is_relative_to(site)
    assert presets == sorted(path.stem for path in (FASTDIT / "presets").glob("*.yaml"))


# -- names --

# `deepspeed fastdit/train.py` makes fastdit/ the first place that every import looks in.
TOP_LEVEL = sorted({path.stem for path in FASTDIT.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"})


@pytest.fixture(scope="module")
def installed() -> set[str]:
    """Names that installed packages, other than this one, can be imported by."""
    return {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if any(owner.lower() != "fastdit" for owner in owners)
    }


@pytest.mark.parametrize("name", [name for name in TOP_LEVEL if not name.startswith("__")])
def test_no_file_of_fastdit_hides_another_module(name, installed):
    assert name not in sys.stdlib_module_names
    assert name not in sys.builtin_module_names
    assert name not in installed


def test_the_list_of_hidden_names_is_not_empty(installed):
    """So that the test above cannot pass by finding nothing."""
    assert {"torch", "yaml", "deepspeed", "numpy"} <= installed
    assert {"config", "training", "data", "models", "noise", "train"} <= set(TOP_LEVEL)


# -- arrows --


def imports(path: Path, package: str) -> set[str]:
    """Modules that a file of `package` imports, wherever in it, by full name; names taken from a package too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


# Each package, and what it may import beside `errors` and `files`.
ROOMS = {
    "data": ("kernels",),
    "metrics": (),
    "noise": ("kernels",),
    "models": ("kernels",),
    "methods": ("noise", "models", "kernels"),
}
SETTINGS = (
    "command_line",
    "config",
    "distributed",
    "launchers",
    "other_trainers",
    "parser",
    "rendezvous",
    "sample_settings",
    "settings_help",
    "wandb_settings",
    "weights_description",
)
for name in ("run_parts", "rundir", "training", "evaluation", "commands"):  # each may import all those before it
    ROOMS[name] = (*ROOMS, *SETTINGS, "kernels")


def room_imports(room: Path, package: str) -> set[str]:
    files = room.rglob("*.py") if room.is_dir() else [room.with_suffix(".py")]
    found = {name for path in files for name in imports(path, package)}
    return {name for name in found if name.split(".")[0] in ("fastdit", "kernels")}


def test_kernels_know_nothing_of_the_rest():
    outside = {name for name in room_imports(KERNELS, "fastdit.kernels") if not name.startswith("fastdit.kernels")}
    assert {name for name in outside if not name.startswith(("fastdit._C", "fastdit._cuda"))} == set()
    assert room_imports(KERNELS, "fastdit.kernels"), "relative imports are seen"


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room):
    allowed = {room, "errors", "files", *ROOMS[room]}
    found = room_imports(FASTDIT / room, f"fastdit.{room}") - {"fastdit"}
    assert [name for name in found if name.split(".")[1] not in allowed] == []


def test_every_package_has_its_place():
    packages = {path.name for path in FASTDIT.iterdir() if (path / "__init__.py").exists()}
    assert packages == {room for room in ROOMS if room != "run_parts"}


# It imports nothing of fastdit, so that every module may import it.
INTERNALS = "fastdit.training.deepspeed_internals"


def test_settings_import_no_part_of_a_run():
    above = {"run_parts", "rundir", "evaluation", "training", "commands"}
    for name in (*SETTINGS, "errors", "files"):
        modules = {module for module in imports(FASTDIT / f"{name}.py", "fastdit") if "fastdit." in module}
        found = {module.split(".")[1] for module in modules if not module.startswith(INTERNALS)}
        assert found & above == set(), name


def test_the_module_with_deepspeeds_internals_imports_nothing_of_fastdit():
    """So that `distributed`, which is below it, may import it too."""
    found = imports(ROOT / f"{INTERNALS.replace('.', '/')}.py", "fastdit.training")
    assert {name for name in found if name.startswith("fastdit")} == set()
    assert "torch.distributed" in found


def test_only_one_module_uses_deepspeeds_internals():
    words = ("ds_id", "ds_numel", "fp16_groups", "bf16_groups", "fp32_groups", "_lazy_init", "__compatible_ops__")
    for path in (*FASTDIT.rglob("*.py"), *KERNELS.rglob("*.py")):
        if path != ROOT / f"{INTERNALS.replace('.', '/')}.py":
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            names |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            assert [name for name in names if name.startswith(words)] == [], path


def test_no_part_imports_a_command():
    commands = {path.stem for path in FASTDIT.glob("*.py")} - {"__init__", "run_parts", "errors", "files", *SETTINGS}
    assert commands == {"train", "sample", "evaluate", "encode", "export", "api"}
    for path in (path for room in FASTDIT.iterdir() if room.is_dir() for path in room.rglob("*.py")):
        found = {name.split(".")[1] for name in imports(path, "fastdit") if name.startswith("fastdit.")}
        assert found & commands == set(), path
