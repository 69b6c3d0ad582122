"""Wrap frozen autoencoders in one interface, from pictures to latents and back. `open_autoencoder` lists them."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.errors import UserError
from fastdit.files import sha256_of

from . import taef2
from .weight_files import read_tensors
from .weight_fit import misfit

CHOICES = "identity, space_to_depth:K, a folder that diffusers saved, or taef2's pair of files"
# Names of attention's projections in old files of diffusers, such as those of the SD VAE's fine-tuned variants.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Autoencoder(nn.Module):
    """Define the interface of all autoencoders. Parameters are fp32 and frozen; gradients reach the arguments only.

    Args:
        name: the argument of `open_autoencoder`.
        channels, factor: pictures (B, 3, H, W) have latents (B, channels, H/factor, W/factor).
        scale, shift: the autoencoder's makers train diffusion models on (z - shift) * scale.
    """

    def __init__(self, name: str, *, channels: int, factor: int, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.name, self.channels, self.factor, self.scale, self.shift = name, channels, factor, scale, shift
        self.files: Sequence[Path] = ()  # the files that it was read from

    @cached_property
    def hash(self) -> str | None:
        """Return the SHA-256 of the bytes of all `files`, one after the other; None without files."""
        return sha256_of(*self.files) if self.files else None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of the posterior, (B, channels, H/factor, W/factor) each, of x (B, 3, H, W) in [-1, 1].

        std is zero if the autoencoder has no posterior. Raises ValueError for other shapes.
        """
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x must be (B, 3, H, W) with H and W multiples of {self.factor}, got {tuple(x.shape)}")
        return self._encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return pictures (B, 3, factor * h, factor * w), about in [-1, 1] and not clamped, of z (B, channels, h, w).

        z is neither scaled nor shifted.
        Raises ValueError for other shapes.
        """
        if z.dim() != 4 or z.shape[1] != self.channels:
            raise ValueError(f"z must be (B, {self.channels}, h, w), got {tuple(z.shape)}")
        return self._decode(z)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode x, whose shape `encode` has checked."""
        raise NotImplementedError

    def _decode(self, z: Tensor) -> Tensor:
        """Decode z, whose shape `decode` has checked."""
        raise NotImplementedError

    def _freeze(self) -> None:
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Autoencoder":
        """Stay in evaluation mode, whatever the mode."""
        return super().train(False)


class SpaceToDepth(Autoencoder):
    """Turn squares of `side` x `side` pixels into the channels of one cell. Values stay as they are."""

    def __init__(self, name: str, side: int) -> None:
        super().__init__(name, channels=3 * side**2, factor=side)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.pixel_unshuffle(x, self.factor)
        return z, torch.zeros_like(z)

    def _decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, self.factor)


class TAEF2(Autoencoder):
    """Hold the networks of taef2.py. Raises UserError if a file is missing, cannot be read or holds another network."""

    def __init__(self, name: str, files: tuple[Path, Path]) -> None:
        super().__init__(name, channels=taef2.CHANNELS, factor=taef2.FACTOR)
        self.files = files
        with torch.device("meta"):  # the files hold the weights
            self.encoder, self.decoder = taef2.encoder(), taef2.decoder()
        for network, file in zip((self.encoder, self.decoder), files):
            _fill(network, _tensors(file), file, "give taef2's files")
        self._freeze()

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder((x + 1) / 2)
        return z, torch.zeros_like(z)

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(z) * 2 - 1


class Diffusers(Autoencoder):
    """Hold an AutoencoderKL or AutoencoderTiny from a folder that diffusers' `save_pretrained` wrote.

    Nothing is downloaded. Raises UserError if the folder is incomplete or holds something else, or if diffusers is not
    installed.
    """

    def __init__(self, name: str, folder: Path) -> None:
        # Build the model without weights, as its config.json describes it.
        config_file = folder / "config.json"
        config = _settings(config_file)
        kind, blocks = config["_class_name"], "encoder_block_out_channels"
        model = _empty(kind, config, config_file)
        settings = model.config
        stages = settings[blocks] if kind == "AutoencoderTiny" else settings["block_out_channels"]
        super().__init__(
            name,
            channels=settings["latent_channels"],
            factor=2 ** (len(stages) - 1),
            scale=float(settings["scaling_factor"]),
            shift=float(settings.get("shift_factor") or 0.0),
        )

        # Read the weights.
        weights = [folder / f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
        file = next((file for file in weights if file.is_file()), None)
        if file is None:
            raise UserError(f"{folder}: it has neither {weights[0].name} nor {weights[1].name}; copy the whole folder")
        self.files = (config_file, file)
        state = {_present_name(key): value for key, value in _tensors(file).items()}
        _fill(model, state, file, f"config.json describes another {kind}")
        self.model = model
        self._freeze()

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.model.encode(x)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean, encoded.latent_dist.std
        return encoded.latents, torch.zeros_like(encoded.latents)

    def _decode(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample


def open_autoencoder(name: str) -> Autoencoder:
    """Return the autoencoder that `name` stands for, on the CPU. Raises UserError if there is none or it is unreadable.

    - `identity` keeps the pixels, and `space_to_depth:K` turns squares of K x K pixels into channels.
    - A folder that diffusers saved has a config.json that names AutoencoderKL (SD, SD3, FLUX) or AutoencoderTiny
      (TAESD).
    - A folder with one pair `*_encoder.pth`, `*_decoder.pth` holds taef2, as does the path of one of the two files.
    """
    # Rearranged pixels have no files.
    kind, _, side = name.partition(":")
    if name == "identity":
        return SpaceToDepth(name, 1)
    if kind == "space_to_depth":
        if not re.fullmatch("[1-9][0-9]*", side):
            raise UserError(f"{name}: {side!r} is no number of pixels; write space_to_depth:2, say")
        return SpaceToDepth(name, int(side))

    # A folder of diffusers has a config.json.
    path = Path(name)
    if (path / "config.json").is_file():
        return Diffusers(name, path)

    # Otherwise look for one pair of taef2's files.
    if match := re.fullmatch(r"(.*)_(en|de)coder\.pth", path.name):
        stems = [match[1]]
        path = path.parent
    else:
        stems = sorted({file.name.removesuffix("_encoder.pth") for file in path.glob("*_encoder.pth")})
    if len(stems) > 1:
        raise UserError(f"{name}: holds several autoencoders ({', '.join(stems)}); give the path of one *_encoder.pth")
    if not stems:
        fault = "holds no autoencoder" if path.is_dir() else "no such autoencoder"
        raise UserError(f"{name}: {fault}; give {CHOICES}")
    return TAEF2(name, (path / f"{stems[0]}_encoder.pth", path / f"{stems[0]}_decoder.pth"))


def _settings(file: Path) -> dict:
    """Return the settings in a config.json of diffusers. Raises UserError for another model's."""
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy the whole folder again") from None
    known = ("AutoencoderKL", "AutoencoderTiny")
    if config.get("_class_name") not in known:
        raise UserError(
            f"{file}: describes {config.get('_class_name')}; autoencoders read here are {' and '.join(known)}"
        )
    if config.get("in_channels", 3) != 3 or config.get("out_channels", 3) != 3:
        raise UserError(
            f"{file}: its pictures have {config['in_channels']} channels; give an autoencoder of color pictures"
        )
    return config


def _empty(kind: str, config: dict, file: Path) -> nn.Module:
    """Return diffusers' model of this kind, without weights. Raises UserError if it cannot be built."""
    try:
        import diffusers
    except ImportError:
        raise UserError(
            f"{file}: diffusers reads it, which is not installed; pip install 'fastdit[autoencoder]'"
        ) from None
    try:
        with torch.device("meta"):
            return getattr(diffusers, kind).from_config(config)
    except Exception as error:  # impossible settings can fail anywhere in diffusers
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file}: diffusers cannot build it ({reason}); copy the whole folder again") from None


def _present_name(key: str) -> str:
    """Return the name that diffusers gives a tensor today."""
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_RENAMED[m[2]]}.", key)


def _tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file, by name. Raises UserError if it cannot be read."""
    try:
        return read_tensors(file, "model")
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def _fill(network: nn.Module, state: dict[str, Tensor], file: Path, remedy: str) -> None:
    """Replace the weights by fp32 copies of `state`. Raises UserError, with the remedy, if they do not fit."""
    if fault := misfit(network, state):
        raise UserError(f"{file}: {fault}; {remedy}")
    # Tensors of safetensors are the mapped file itself, which may be overwritten later. So copy them.
    network.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in state.items()}, assign=True)
