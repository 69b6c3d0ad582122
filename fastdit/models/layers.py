"""Define the linear layers of a block, each with the kernel that makes its input.

Each module calls its kernel from its own forward, because ZeRO-3 gathers a module's weights there. With `passes_on`, a
module adds its bias, but computes no gradient for it. The caller then passes the bias to the operation that reads the
module's output: see `fastdit.kernels.linear`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.kernels import fp8_linear, gelu_linear, modulated_linear


class Linear(nn.Linear):
    """Apply a linear layer, with fp8 products if `fastdit.models.use_fp8` chose them."""

    fp8 = False

    def forward(self, x: Tensor, passes_on: bool = False) -> Tensor:
        """Return linear(x)."""
        return (fp8_linear if self.fp8 else F.linear)(x, self.weight, _bias_of(self, passes_on))


class ModulatedLinear(Linear):
    """Apply a linear layer to a modulated LayerNorm: see `fastdit.kernels.modulated_linear`."""

    def __init__(self, *sizes: int, keep_x: bool = False) -> None:
        super().__init__(*sizes)
        self.keep_x = keep_x

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        y_bias: Tensor | None = None,
        passes_on: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return (x + gate * y, linear(LN(x + gate * y) * (1 + scale) + shift)).

        x and y are (B, N, width), and the vectors (B, width). y and gate are None for no branch. y_bias gets its
        gradient here: see `fastdit.kernels.modulated_linear`.
        """
        bias, options = _bias_of(self, passes_on), {"keep_x": self.keep_x, "y_bias": y_bias, "fp8": self.fp8}
        return modulated_linear(x, y, gate, scale, shift, self.weight, bias, **options)


class GeluLinear(Linear):
    """Apply a linear layer to a GELU: see `fastdit.kernels.gelu_linear`."""

    def forward(self, u: Tensor, input_bias: Tensor | None = None, passes_on: bool = False) -> Tensor:
        """Return linear(gelu(u)), with the tanh form of GELU.

        input_bias gets its gradient here: see `fastdit.kernels.gelu_linear`.
        """
        return gelu_linear(u, self.weight, _bias_of(self, passes_on), input_bias=input_bias, fp8=self.fp8)


def _bias_of(layer: nn.Linear, passes_on: bool) -> Tensor:
    """Return the layer's bias, detached if its gradient is computed elsewhere."""
    return layer.bias.detach() if passes_on else layer.bias


def uninitialized(kind: type[nn.Module], *sizes: int, **options: bool) -> nn.Module:
    """Build a module without initial values, which would take time and global random numbers; see `init_weights`.

    `nn.utils.skip_init` does so too, but imports torch's compiler (see kernels/_operator.py).
    """

    class Uninitialized(kind):
        def reset_parameters(self) -> None:
            """Leave the memory as it is."""

    module = Uninitialized(*sizes, **options)
    module.__class__ = kind
    return module
