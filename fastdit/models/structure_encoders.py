"""Define SADM's structure encoder Psi (arXiv 2402.17563): a small ResNet from samples to feature vectors (ours).

It takes latents or small images. It starts from random weights, or warm as a classifier (fastdit-warm-start). A
pretrained encoder for pixels is in image_resnet.py. The features of a sample depend on that sample alone, because
otherwise Psi could win SADM's game through the statistics of the batch.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastdit.errors import UserError
from fastdit.files import save_tensors

from .weight_fit import misfit

NORM_GROUP = 16  # channels that share statistics
STAGES = 4  # number of blocks of a LatentResNet


def check_width(width: int, field: str) -> None:
    """Raise UserError, which names `field`, unless a LatentResNet may have this width."""
    if width % NORM_GROUP:
        raise UserError(f"{field}: {width} must be a multiple of {NORM_GROUP}; change it")


class LatentResNet(nn.Module):
    """Apply a pre-activation ResNet (He et al., arXiv 1603.05027): a stem, and four blocks with w, 2w, 4w, 4w channels.

    Before each block the grid is halved by averaging if its shorter side is above 4. A grid that is still larger after
    the last block passes it again until its shorter side is at most 4, so every height and width is accepted.

    All products for one 4x32x32 latent at the default width cost 0.31 GFLOP forward, 0.62 forward and backward to the
    input, and 0.92 forward and backward to the weights. A step of the game needs features of x0 with gradients in the
    weights, and features of the x0 prediction with gradients in both. It costs 1.86 GFLOP, 0.3 % of the 712 of a
    DiT-XL/2 step. There are 5.6 M parameters.

    Args:
        channels: channels of the samples.
        features: dimension of the output.
        width: channels of the first block, a multiple of 16. Cost and number of parameters grow with its square.
        spectral_norm: whether to divide each weight, as a matrix (out, the rest), by its largest singular value (Miyato
            et al., arXiv 1802.05957). In training mode every forward pass improves the estimate of that value by one
            power iteration; in evaluation mode none does. The estimates are buffers of the state dict.
        seed: seed of the initial weights (normal, He et al., arXiv 1502.01852). The global random state is neither read
            nor advanced.

    Raises UserError if sizes do not fit together.
    """

    def __init__(
        self, *, channels: int, features: int = 512, width: int = 96, spectral_norm: bool = False, seed: int = 0
    ) -> None:
        # Check the sizes.
        super().__init__()
        for field, value in {"channels": channels, "features": features, "width": width}.items():
            if value < 1:
                raise UserError(f"{field}: {value} must be at least 1")
        check_width(width, "width")
        self.channels, self.features, self.width, self.spectral_norm = channels, features, width, spectral_norm

        # Build the layers. Torch's modules and its spectral norm draw from the global generator, which is put back.
        widths = (width, 2 * width, 4 * width, 4 * width)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            self.stem = Conv(channels, width, 3)
            self.blocks = nn.ModuleList(Block(*pair) for pair in zip((width, *widths), widths))
            self.norm = NormSiLU(widths[-1])
            self.head = Linear(widths[-1], features)
            products = [module for module in self.modules() if isinstance(module, Conv | Linear)]
            generator = torch.Generator().manual_seed(seed)
            for module in products:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if spectral_norm:
                    parametrizations.spectral_norm(module)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, features) float32 of x (B, channels, H, W). Raises ValueError for other shapes.

        Under autocast, activations have its dtype; statistics, the average over positions and the head are fp32.
        """
        return self.head(self.feature_map(x).mean((2, 3), dtype=torch.float32))

    def feature_map(self, x: Tensor, stage: int = STAGES) -> Tensor:
        """Return the map (B, c, h, w) of x (B, channels, H, W) after block `stage`, from 1 to 4, its norm and its SiLU.

        The features are the average over the map of stage 4, with 4 x width channels and a shorter side of at most 4.
        The map of an earlier stage is normalized by the norm of the next block, on its own, finer grid. Raises
        ValueError for other shapes.
        """
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (B, {self.channels}, H, W), got {tuple(x.shape)}")
        x = self.stem(x.to(self.norm.weight.dtype))
        for block in list(self.blocks)[:stage]:
            x = block(_halved(x))
        if stage < STAGES:
            return self.blocks[stage].norm1(x)
        while min(x.shape[2:]) > 4:
            x = self.blocks[-1](_halved(x))
        return self.norm(x)

    def channels_of(self, stage: int) -> int:
        """Return the number of channels of `feature_map` at `stage`."""
        return self.width * min(2 ** (stage - 1), 4)

    def settings(self) -> dict[str, str]:
        """Return the settings, as strings, that a file of weights must share with this network."""
        return {field: str(getattr(self, field)) for field in ("channels", "features", "width", "spectral_norm")}


class Block(nn.Module):
    """Return x + conv(act(conv(act(x)))), with a 1x1 convolution on x if the width changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = NormSiLU(before), Conv(before, after, 3)
        self.norm2, self.conv2 = NormSiLU(after), Conv(after, after, 3)
        self.skip = nn.Identity() if before == after else Conv(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class NormSiLU(nn.GroupNorm):
    """Apply silu(GroupNorm(x)) in x's dtype, with fp32 statistics. Autocast would keep both results in fp32."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels // NORM_GROUP, channels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.silu(F.group_norm(x, self.num_groups, weight, bias, self.eps))


# A spectral norm is computed when its weight is read. Autocast would lower some of torch's operations for it to bf16,
# which others do not accept, so it is off there. There are no biases: after a convolution the norms have them, and the
# head's would cancel in every difference of features.


class Conv(nn.Conv2d):
    """Convolve without changing height and width."""

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__(before, after, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight
        return F.conv2d(x, weight, padding=self.padding)


class Linear(nn.Linear):
    """Multiply in fp32, because small differences of features matter."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


def _halved(x: Tensor) -> Tensor:
    """Return means over 2x2, and over fewer at odd edges; x itself if its shorter side is at most 4."""
    return F.avg_pool2d(x, 2, ceil_mode=True) if min(x.shape[2:]) > 4 else x


def save_structure_encoder(module: LatentResNet, path: str | Path) -> None:
    """Write the weights as safetensors, with `module.settings()` in the header. The file appears once complete."""
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_tensors(state, Path(path), metadata=module.settings())


def load_structure_encoder(module: LatentResNet, path: str | Path) -> None:
    """Fill `module` from a file of `save_structure_encoder`. Raises UserError if it cannot be read or does not fit."""
    try:
        with safe_open(path, "pt") as file:
            settings, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a file that fastdit-warm-start wrote") from None
    for field, needed in module.settings().items():
        if field not in settings:
            raise UserError(f"{path}: does not name its {field}; give a file that fastdit-warm-start wrote")
        if settings[field] != needed:
            raise UserError(f"{path}: {field} is {settings[field]} in this file, {needed} in this run; make them equal")
    if fault := misfit(module, state):
        raise UserError(f"{path}: {fault}; write it again with fastdit-warm-start")
    module.load_state_dict(state)
