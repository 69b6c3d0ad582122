"""Choose fp8 products for the blocks of a network: see `fastdit.kernels.fp8`."""

from torch import nn

from fastdit.errors import UserError

from .dit import Block

MULTIPLE = 16  # of which widths must be multiples, for fp8 products


def use_fp8(network: nn.Module) -> None:
    """Let the linear layers of all blocks use fp8 products. Their weights must be bf16 when they run.

    Teachers are built by `copy_blocks`, which does not copy this choice.
    """
    for block in network.modules():
        if isinstance(block, Block):
            for layer in (block.qkv, block.proj, block.fc1, block.fc2):
                layer.fp8 = True


def check_fp8_width(setting: str, width: int) -> None:
    """Raise UserError unless fp8 products take this width; `setting` names it in the message."""
    if width % MULTIPLE:
        raise UserError(
            f"{setting}: {width} is not a multiple of {MULTIPLE}, as fp8 products need; change it, or take "
            "--precision bf16"
        )
