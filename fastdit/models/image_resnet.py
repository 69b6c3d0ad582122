"""Compute features of pixels by a pretrained ResNet-18 (He et al., arXiv 1512.03385) without its classifier.

Names and sizes are those of torchvision's `resnet18`, so that its files load as they are. Norms always use the file's
statistics, also in training mode, so a sample's features depend on that sample alone.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.errors import UserError

from .weight_files import read_tensors
from .weight_fit import misfit

SMALLEST = 32  # rows or columns
WIDTHS = (64, 128, 256, 512)
# Mean and deviation of ImageNet's colors, as fractions of white, with which the published weights were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_UNUSED = ("fc.", "num_batches_tracked")


class ImageResNet(nn.Module):
    """Map each image to 512 features.

    Args:
        path: a state dict of torchvision's `resnet18`, .pth or .safetensors; its classifier `fc` is not read.

    Raises UserError if the file is missing, cannot be read or holds another network.
    """

    features = WIDTHS[-1]

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        # Build the layers without weights.
        with torch.device("meta"):
            self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, stride=2, padding=3, bias=False)
            self.bn1 = FrozenNorm(WIDTHS[0])
            for i, (before, after) in enumerate(zip((WIDTHS[0], *WIDTHS), WIDTHS), start=1):
                layer = nn.Sequential(BasicBlock(before, after), BasicBlock(after, after))
                self.add_module(f"layer{i}", layer)

        # Fill them from the file, and fold the normalization of colors into one scale and shift.
        state = _read(Path(path))
        if fault := misfit(self, state):
            raise UserError(f"{path}: {fault}; give the weights of torchvision's resnet18")
        self.load_state_dict(state, assign=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, 512) float32 of x (B, 1 or 3, H, W) in [-1, 1], of at least 32 rows and columns.

        A single channel is taken for gray. Raises ValueError for other shapes.
        """
        if x.dim() != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < SMALLEST:
            expected = f"(B, 1 or 3, at least {SMALLEST}, at least {SMALLEST})"
            raise ValueError(f"x must be {expected}, got {tuple(x.shape)}")
        x = x.float() * self.scale + self.shift  # gray becomes three channels here
        x = F.relu(self.bn1(self.conv1(x.to(self.conv1.weight.dtype))))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3), dtype=torch.float32)


class BasicBlock(nn.Module):
    """Add two 3x3 convolutions to x. If the width grows, the grid is halved."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1, self.bn1 = Conv3x3(before, after, stride), FrozenNorm(after)
        self.conv2, self.bn2 = Conv3x3(after, after), FrozenNorm(after)
        self.downsample = None
        if stride == 2:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), FrozenNorm(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Conv3x3(nn.Conv2d):
    """Convolve with a 3x3 kernel and padding 1, correctly even if the output is one column wide.

    oneDNN 3.12, the CPU library of PyTorch 2.13, reads uninitialized memory in a bf16 convolution on CPUs with AMX when
    the stride is above 1 and the output has one column and several rows (https://github.com/pytorch/pytorch/pull/188426
    reports the same of conv3d). Images with 32 columns and more rows have such a grid in the last layer.
    """

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__(before, after, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride[0]
        if stride > 1 and x.shape[3] <= stride and x.shape[2] > stride:
            # More zeros on the right give the output a second column and leave the first one as it was.
            return super().forward(F.pad(x, (0, stride)))[..., :1]
        return super().forward(x)


class FrozenNorm(nn.Module):
    """Apply batch norm with stored statistics. Its scale and shift are still parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def _read(path: Path) -> dict[str, Tensor]:
    """Return fp32 copies of the file's tensors, without those of the classifier. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the weights of torchvision's resnet18, .pth or .safetensors")
    try:
        state = read_tensors(path, "model")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    # Tensors of safetensors are the mapped file itself, which may be overwritten later. So copy them.
    return {
        name: value.to(torch.float32, copy=True)
        for name, value in state.items()
        if not any(part in name for part in _UNUSED)
    }
