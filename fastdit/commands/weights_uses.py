"""Write the commands with which known weights are used, so that they work when they are copied."""

import shlex
from pathlib import Path

from fastdit.errors import UserError
from fastdit.evaluation.next_commands import launched, program
from fastdit.models.known_weights import FOLDER, KNOWN, KnownWeights, verified_weights

VAE, INCEPTION = "sd-vae-ft-ema", "inception-2015"  # the names of what other weights need beside them


def uses(name: str, known: KnownWeights, folder: Path) -> str:
    """Return the next commands for weights that are in `folder`, one on each line, below a line that says what for."""
    path = shlex.quote(str(known.path_in(folder)))
    if known.kind == "network":
        return _fine_tune(name, known, path)
    if known.kind == "autoencoder":
        return "\n".join(["encode your images with it:", f"  {_encode(path, 256)}"])
    if known.kind == "inception":
        line = f"{_evaluate()} --weights {path}"
    else:
        line = f"{_evaluate()} --weights {_place(INCEPTION)} --data {path}"
    lines = ["evaluate a run with it (pip install 'fastdit[inception]'):", *_obtain(INCEPTION, known), f"  {line}"]
    return "\n".join(lines)


def _fine_tune(name: str, known: KnownWeights, path: str) -> str:
    """Return the commands that encode images and train on their latents, from a network's weights on."""
    vae, pixels = _place(VAE), 8 * known.network.latents
    train = (
        f"{launched('train')} {known.flags} --init_from {path} --finetune all --data.source data/latents "
        f"--data.autoencoder {vae} --out runs/from-{name}"
    )
    draw = f"{program('sample')} --weights {path} {_noise(known)}--autoencoder {vae} --guidance 4 --n 8 --out grid.png"
    lines = ["draw with them:", *_obtain(VAE, known), f"  {draw}"]
    lines += ["train them on your images (for ImageNet's own classes, leave --finetune all out):"]
    return "\n".join([*lines, f"  {_encode(vae, pixels)}", f"  {train}"])


def _noise(known: KnownWeights) -> str:
    """Return the flag of `sample.py` for the noise process of a network, which its file may not tell."""
    return f"--noise {known.network.outputs} "


def _obtain(name: str, known: KnownWeights) -> list[str]:
    """Return the line that obtains weights that are needed too, unless these are verified or are `known`."""
    if known.kind == "inception":
        return []
    try:
        verified_weights(name)
        return []
    except UserError:
        return [f"  fastdit-data weights {name}"]


def _place(name: str) -> str:
    """Return where other weights are by default, as an argument of a command."""
    return shlex.quote(str(KNOWN[name].path_in(Path(FOLDER) / name)))


def _encode(autoencoder: str, pixels: int) -> str:
    """Return the command that encodes images of `pixels` into latents."""
    return f"{program('encode')} --source data/train --size {pixels} --autoencoder {autoencoder} --out data/latents"


def _evaluate() -> str:
    """Return the command that computes FID, without the paths of the weights."""
    return f"{program('evaluate')} --run runs/mine --n 10000 --features inception"
