"""Verify files of weights by their content: whether their tensors are those of the network that they claim to be.

This is for files without a published checksum. It tells a file of another network, resolution or noise process, and a
damaged one. It cannot tell weights of the same network that were trained further. No code in a file is run.
"""

import importlib.util
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from fastdit.errors import UserError

from .autoencoders import open_autoencoder
from .dit import SIZES, DiT
from .known_weights import KnownWeights, Network
from .pretrained import read_weights
from .weight_files import read_tensors
from .weight_fit import check_finite, fit_outputs, fit_positions, misfit

CHANNELS, PATCH, CLASSES = 4, 2, 1000
# Settings of Stable Diffusion's autoencoder that its tensors and the scale of its latents depend on.
SD_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": CHANNELS}
SD_VAE |= {"scaling_factor": 0.18215, "in_channels": 3, "out_channels": 3}
_FEATURES = 2048  # of the Inception network of 2015
_INCEPTION = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "fc.weight": (1008, _FEATURES), "fc.bias": (1008,)}


def check_content(known: KnownWeights, folder: Path) -> str:
    """Return in words what was compared, for a folder that holds the files of known weights under their names.

    Raises ValueError with what is wrong, and UserError if a package that reads the files is not installed.
    """
    path = known.path_in(folder)
    if known.kind == "network":
        return _check_network(path, known.network)
    if known.kind == "autoencoder":
        return _check_autoencoder(path)
    return (_check_inception if known.kind == "inception" else _check_reference)(path)


def empty_network(network: Network) -> DiT:
    """Return the DiT that a file of weights fills, without memory for its weights."""
    with torch.device("meta"):
        return DiT(
            input_size=(network.latents, network.latents),
            patch=PATCH,
            channels=CHANNELS,
            out_channels=2 * CHANNELS if network.outputs == "ddpm" else CHANNELS,
            classes=CLASSES,
            **SIZES[network.size],
        )


def _check_network(path: Path, network: Network) -> str:
    """Compare the tensors of a DiT's file, or of diffusers' folder, with those of `network`."""
    model = empty_network(network)
    if network.layout == "diffusers":
        _check_sample_size(path / "config.json", network.latents)
    try:
        read = read_weights(path)
        tensors = len(read.state)
        fit_outputs(model, read.state, network.outputs == "sit", read.noise is not None)
    except KeyError as missing:
        raise ValueError(f"{missing.args[0]} is missing") from None
    convention = (read.noise or {}).get("convention")
    if convention != network.outputs and (convention or network.outputs == "repa"):
        raise ValueError(f"its weights are {convention.upper()}'s" if convention else "it has no projectors of REPA's")
    if fault := misfit(model, read.state):
        raise ValueError(fault)
    if read.positions is not None and (fault := fit_positions(model, read.positions)):
        raise ValueError(fault.partition(", and")[0])
    check_finite(read.state)
    return f"{tensors} tensors with the names and shapes of a DiT-{network.size}/{PATCH}, all finite"


def _check_sample_size(config: Path, latents: int) -> None:
    """Raise ValueError if diffusers' settings say another resolution, which no tensor tells."""
    try:
        size = dict(json.loads(config.read_text(encoding="utf-8"))).get("sample_size")
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config.json cannot be read ({error})") from None
    if size != latents:
        raise ValueError(f"sample_size is {size} in config.json, not {latents}")


def _check_autoencoder(folder: Path) -> str:
    """Open a folder of diffusers, which compares tensors with settings, and compare these with Stable Diffusion's."""
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("diffusers, which reads the autoencoder, is not installed; pip install 'fastdit[autoencoder]'")
    try:
        autoencoder = open_autoencoder(str(folder))
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{folder}/")) from None
    settings = getattr(autoencoder.model, "config", {})
    for name, value in SD_VAE.items():
        found = settings.get(name)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ValueError(f"{name} is {found} in config.json, not {value}")
    state = autoencoder.state_dict()
    check_finite(state)
    return f"{len(state)} tensors with the names and shapes of Stable Diffusion's AutoencoderKL, all finite"


def _check_inception(path: Path) -> str:
    """Look for the first and the last layer of the Inception network of 2015."""
    state = read_tensors(path, "model")
    for name, shape in _INCEPTION.items():
        if name not in state or tuple(state[name].shape) != shape:
            raise ValueError(f"it has no {name} of shape {shape}, as the Inception network of 2015 has")
    check_finite(state)
    return f"{len(state)} tensors, among them the first and last layer of the Inception network of 2015"


def _check_reference(path: Path) -> str:
    """Look for the statistics that ADM's evaluator reads. The images that may be beside them are not read."""
    shapes = {"mu": (_FEATURES,), "sigma": (_FEATURES, _FEATURES)}
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in shapes if name in archive}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        raise ValueError("it is no .npz file, or a damaged one; copy or download it again") from None
    for name, shape in shapes.items():
        if name not in found or found[name].shape != shape or not np.isfinite(found[name]).all():
            raise ValueError(f"it has no finite {name} of shape {shape}, as ADM's evaluator writes it")
    return "its statistics mu and sigma have the shapes that ADM's evaluator writes, and are finite"
