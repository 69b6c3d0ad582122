"""Read settings: from a command line, a preset, and the config.yaml of a run; and write that file.

A preset (`fastdit/presets/NAME.yaml`, or a path) differs from the defaults only where it must. Parsing, type checks and
conversion are jsonargparse's.
"""

import os
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import yaml
from jsonargparse import Namespace

from fastdit.command_line import OneLineParser, preset_of
from fastdit.config import CONFIG_FILE, Config
from fastdit.data.folders import FOLDERS
from fastdit.errors import UserError
from fastdit.models import SIZES
from fastdit.other_trainers import check_model, ours
from fastdit.settings_help import asked_group, help_text

PRESETS = Path(__file__).parent / "presets"
# Presets that were a size each: what stands for them now.
RENAMED_PRESETS = {
    "cifar10_s2": ["cifar10"],
    **{f"imagenet256_{size.lower()}2": ["imagenet256", "--model.size", size] for size in SIZES},
    **{f"imagenet256_sd_dit_{size.lower()}2": ["imagenet256_sd_dit", "--model.size", size] for size in SIZES},
}
# Settings that may be paths, and their values that are names of something shipped.
PATHS = (
    "init_from",
    "ds_config",
    "data.source",
    "data.labels",
    "data.autoencoder",
    "sadm.psi_weights",
    "psi_align.psi_weights",
)
NAMES = (
    "fashion_mnist",
    "identity",
    *FOLDERS,
    *(path.stem for path in (Path(__file__).parent / "ds_configs").glob("*.json")),
)
# Older names of settings, each in the section of the current one.
RENAMED_SETTINGS = {"data.standardise": "data.standardize", "sadm.normalise": "sadm.normalize"}


def _parser() -> OneLineParser:
    parser = OneLineParser(RENAMED_SETTINGS, ours, prog="fastdit-train", description="Train a diffusion transformer.")
    parser.add_argument("--preset", type=str, help="named settings (or a path): " + ", ".join(presets()))
    parser.add_class_arguments(Config, as_group=False)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser


def presets() -> list[str]:
    """Return the names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _preset_path(name: str) -> str:
    if name in presets():
        return str(PRESETS / f"{name}.yaml")
    if not os.path.isfile(name):
        raise UserError(f"--preset {name}: no such preset; known are {', '.join(presets())}, or give a YAML file")
    return name


def _with_bases(path: str, seen: tuple[str, ...] = ()) -> list[str]:
    """Return a file of settings after those that it builds on by `preset: NAME`, the first first. Raises UserError.

    A path in a file is relative to the file.
    """
    if path in seen:
        raise UserError(f"{path}: its preset builds on itself; remove the line `preset:` from one of the files")
    base = preset_of(path)
    if base is None:
        return [path]
    beside = Path(path).parent / base
    base = str(beside) if base not in presets() and beside.is_file() else _preset_path(base)
    return [*_with_bases(base, (*seen, path)), path]


def parse(argv: list[str]) -> Config:
    """Return the `Config` of a command line. A preset is read first wherever it stands; flags override it.

    `--help` shows settings and exits. Raises UserError for an unknown field, a wrong type or an impossible value.
    """
    if (group := asked_group(argv)) is not None:
        print(help_text(_parser(), group, "deepspeed fastdit/train.py"))
        raise SystemExit(0)
    check_model(argv)
    shows = "--print_config" in argv
    argv = [word for word in argv if word != "--print_config"]
    args = []
    for arg, after in zip(argv, [*argv[1:], None]):
        if arg in ("--resume", "--trust", "--dry_run") and after not in ("true", "false"):
            args += [arg, "true"]
        else:
            args += arg.split("=", 1) if arg.startswith(("--preset=", "--out=", "--resume=")) else [arg]
    files = _saved_settings(args)
    given = dict(pairwise(args))
    names_data = any(word.partition("=")[0] in ("--preset", "--data.source") for word in args)
    if not files and given.get("--resume") == "true" and not names_data:
        raise UserError(
            f"--out {given.get('--out', Config.out)}: holds no run to resume; name the folder of one, or begin one by "
            "--preset or --data.source"
        )
    while "--preset" in args:
        at = args.index("--preset")
        if at + 1 >= len(args):
            raise UserError(f"--preset: name one of {', '.join(presets())}, or a YAML file")
        name, *flags = RENAMED_PRESETS.get(args[at + 1], [args[at + 1]])
        if name != args[at + 1]:
            print(f"note: --preset {args[at + 1]} is now --preset {' '.join([name, *flags])}", file=sys.stderr)
        files += _with_bases(_preset_path(name))
        args[:] = [*flags, *args[:at], *args[at + 2 :]]  # flags that follow rule
    parser, base = _parser(), None
    for file in files:
        base = parser.read(file, base)
        base.trust = False  # the file may come with the checkpoints that are not to be trusted
        if base.dry_run:
            raise UserError(f"{file}: dry_run: is no setting of a run; remove it, and give --dry_run to the command")
    config = _config(parser.parse(args, base))
    if shows:
        if config.dry_run:
            raise UserError("--dry_run: --print_config shows the settings and ends; give one of the two")
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def preset_names(argv: list[str]) -> list[str]:
    """Return the presets that a command line names, each a shipped one's name or the absolute path of a file."""
    words = [word for arg in argv for word in (arg.split("=", 1) if arg.startswith("--preset=") else [arg])]
    names = [name for flag, name in pairwise(words) if flag == "--preset"]
    return [os.path.abspath(name) if name not in presets() and os.path.isfile(name) else name for name in names]


def flat_settings(config: Config) -> dict[str, object]:
    """Return the settings that config.yaml has, by flag, such as `model.depth`."""
    return flatten(yaml.safe_load(dump(config)))


def flatten(settings: dict, prefix: str = "") -> dict[str, object]:
    """Return nested settings by flag."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _saved_settings(args: list[str]) -> list[str]:
    """Return the config.yaml of a run that is resumed without a preset: `--resume --out DIR` is enough for it."""
    given = dict(pairwise(args))
    path = Path(given.get("--out", Config.out)) / CONFIG_FILE
    return [str(path)] if given.get("--resume") == "true" and "--preset" not in args and path.is_file() else []


def load(path: str | Path) -> Config:
    """Read a `config.yaml` that a run wrote. Raises UserError when it is missing or not one."""
    parser = _parser()
    return _config(parser.parse([], parser.read(path)))


def _config(values: Namespace) -> Config:
    return Config(**{key: value for key, value in vars(values).items() if key in Config.__dataclass_fields__})


def _from_anywhere(value: str) -> str:
    """Return the relative path of something that exists as an absolute path, and anything else unchanged.

    So a run can be resumed and sampled from any directory. The last part of a path may be a pattern, such as
    `shards-{000..099}.tar` or `train-*.parquet`.
    """
    path = Path(value)
    found = path.exists() or (any(sign in path.name for sign in "{*") and path.parent.is_dir())
    return os.path.abspath(value) if found and value not in NAMES else value


def dump(config: Config) -> str:
    """Return `config` as YAML text that `load` reads back to an equal one. Relative paths become absolute."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    settings = plain(asdict(config))
    del settings["trust"], settings["dry_run"]  # they are for one command line
    for path in PATHS:
        *sections, name = path.split(".")
        inner = settings
        for section in sections:
            inner = inner[section]
        if isinstance(inner[name], str):
            inner[name] = _from_anywhere(inner[name])
    return yaml.safe_dump(settings, sort_keys=False)
