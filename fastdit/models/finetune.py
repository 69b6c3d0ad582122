"""Which weights a fine-tuning trains: all, or the small subset of DiffFit (Xie et al., ICCV 2023, arXiv 2304.06648).

DiffFit: biases, norms (a DiT's have no weights), the label table, and a new factor on what each block adds to the
residual stream (`BlockScale`; a vector, ours). For DiT-XL/2 0.2 % of the weights. What a DiT does not have, a decoder
or a class token, is new and trained whole.
"""

import torch
from torch import Tensor, nn

from .dit import BlockScale, DiT, Encoder
from .encoder_decoder import EncoderDecoder


def add_block_scales(network: DiT | EncoderDecoder) -> None:
    """Give the encoder its `BlockScale`; the network's output stays the same."""
    encoder = _encoder(network)
    encoder.gains = BlockScale(encoder.depth, encoder.width)


def freeze_for_diffit(network: DiT | EncoderDecoder) -> None:
    """Leave a gradient to DiffFit's subset alone. The network has its gains."""
    for name, parameter in _encoder(network).named_parameters():
        trained = name.endswith("bias") or name.startswith(("label_embed", "gains", "class_token"))
        parameter.requires_grad_(trained)


def fold_block_scales(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with its gains, if any, multiplied into the gates' rows of `adaln`: an ordinary network's."""
    state = dict(state)
    key = next((key for key in state if key.endswith("gains.weight")), None)
    if key is None:
        return state
    gains, prefix = state.pop(key), key.removesuffix("gains.weight")
    depth, _, width = gains.shape
    factors = torch.ones(depth, 6, width, dtype=gains.dtype)
    factors[:, 2], factors[:, 5] = gains.unbind(1)
    factors = torch.cat([factors.flatten(), torch.ones(2 * width)])
    state[f"{prefix}adaln.weight"] = state[f"{prefix}adaln.weight"] * factors[:, None]
    state[f"{prefix}adaln.bias"] = state[f"{prefix}adaln.bias"] * factors
    return state


def _encoder(network: nn.Module) -> Encoder:
    return network.encoder if isinstance(network, EncoderDecoder) else network
