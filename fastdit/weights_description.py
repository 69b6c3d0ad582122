"""Describe exported weights in their file, and compare the description with the run that starts from them.

The tensors of a network do not tell for which noise process it was trained, nor how its latents were scaled. Exports
therefore carry a description: JSON under the key `fastdit` of the safetensors metadata.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from fastdit.config import Config
from fastdit.errors import UserError, a_few
from fastdit.methods.denoising import Shape
from fastdit.models import read_metadata
from fastdit.noise import PROCESSES, NoiseProcess

KEY = "fastdit"  # in the metadata
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"  # weights in a folder of diffusers
FORMAT = 1  # version of the description


def describe(config: Config, shape: Shape, class_names: Sequence[str] = ()) -> dict[str, str]:
    """Return the metadata of a run's exported weights.

    It holds the noise process with its settings, scale and shift of latents, the size of samples, the network's sizes
    that tensors do not tell, and the number of classes. Names of classes are left out if they are not one for each.
    """
    description = {
        "format": FORMAT,
        "noise": {"name": config.noise.name, **asdict(config.noise.process)},
        "latent_scale": config.data.latent_scale,
        "latent_shift": config.data.latent_shift,
        "channels": shape.channels,
        "size": [shape.height, shape.width],
        "model": {"patch": config.model.patch, **config.model.dims()},
        "classes": shape.classes,
    }
    if len(class_names) == shape.classes:
        description["class_names"] = list(class_names)
    return {KEY: json.dumps(description)}


def read_description(path: str | Path) -> dict | None:
    """Return the description in a file of weights, or in those of a folder of diffusers, or None if there is none.

    Raises UserError if it cannot be understood, or was written by a later version of fastdit.
    """
    file = Path(path)
    if file.is_dir():
        transformer = file / "transformer"
        file = (transformer if transformer.is_dir() else file) / DIFFUSERS_FILE
    text = read_metadata(file).get(KEY)
    if text is None:
        return None
    try:
        description = dict(json.loads(text))
        version = int(description["format"])
        kinds = {"noise": dict, "model": dict, "classes": int}
        understood = version > FORMAT or all(isinstance(description[key], kind) for key, kind in kinds.items())
    except (KeyError, TypeError, ValueError, RecursionError):
        understood = False
    if not understood:
        raise UserError(f"{path}: its metadata is not what fastdit writes; export it again")
    if version > FORMAT:
        raise UserError(f"{path}: a later version of fastdit wrote it (format {version}); update fastdit")
    return description


def process_flags(name: str, settings: dict) -> str:
    """Return the flags that choose the noise process `name` with those of its settings that weights depend on.

    settings: the process's settings, by name. Those that are left out, or are the defaults, need no flag.
    """
    flags = [f"--noise.name {name}"]
    if kind := PROCESSES.get(str(name)):
        default = kind()
        chosen = {field: settings.get(field, getattr(default, field)) for field in kind.network_settings}
        flags += [f"--noise.{name}.{k} {v}" for k, v in chosen.items() if v != getattr(default, k)]
    return " ".join(flags)


def check_process(process: NoiseProcess, trained: dict, path: str | Path) -> None:
    """Raise UserError, naming the flags that fit, if the weights in `path` were trained for another noise process.

    trained: the process's name and settings. Of a setting that it lacks, because an earlier version of fastdit wrote
    it, the default is taken.
    """
    name = trained.get("name", process.name)
    if name != process.name:
        raise UserError(
            f"{path}: its weights were trained with the noise process {name}, this run has {process.name}; "
            f"take {process_flags(name, trained)}"
        )
    for field in process.network_settings:
        value, before = getattr(process, field), trained.get(field, getattr(type(process)(), field))
        if before != value:
            flag = f"noise.{name}.{field}"
            raise UserError(
                f"{path}: its weights were trained with {flag} {before}, this run has {value}; take --{flag} {before}"
            )


def check_class_names(path: str | Path, class_names: Sequence[str]) -> None:
    """Raise UserError if the weights in `path` were trained on classes of other names than those of the data.

    Names that are only numbers are none.
    """
    before = (read_description(path) or {}).get("class_names", [])
    if differ(before, class_names):
        raise UserError(
            f"{path}: its weights were trained on the classes {a_few(before)}, and the data has "
            f"{a_few(class_names)}; take --finetune all, which trains a new label table"
        )


def differ(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two lists of class names differ. A list that is empty, or of numbers only, agrees with any."""
    return named(names) and named(others) and list(names) != list(others)


def named(names: Sequence[str]) -> bool:
    """Return whether class names are more than numbers."""
    return any(not name.isdecimal() for name in names)


def check_description(config: Config, path: str | Path, say: Callable[[str], None]) -> int | None:
    """Return the number of classes that a file of weights was trained for, or None if it has no description.

    Raises UserError, naming the flag that fits, if the weights were trained for another network or noise process.
    Another scale or shift of latents is no fault, since the weights can be trained further. `say` is called with a
    line about it.
    """
    if (description := read_description(path)) is None:
        return None
    check_process(config.noise.process, description["noise"], path)

    # Compare the number of heads, which no tensor tells, unless the width differs as well.
    sizes, dims = description["model"], config.model.dims()
    heads = sizes.get("heads", dims["heads"])
    if heads != dims["heads"] and sizes.get("width") == dims["width"]:
        raise UserError(
            f"{path}: its network has {heads} attention heads, this run's has {dims['heads']}; "
            f"take --model.heads {heads}"
        )
    for name in ("latent_scale", "latent_shift"):
        value = getattr(config.data, name)
        before, now = (tuple(x) if isinstance(x, list | tuple) else x for x in (description.get(name, value), value))
        if before != now:
            say(f"{path}: its weights were trained with data.{name} {before}, this run has {now}")
    return description["classes"]
