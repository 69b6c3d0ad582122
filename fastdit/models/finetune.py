"""Choose the weights that fine-tuning trains: all, or DiffFit's small subset (Xie et al., arXiv 2304.06648).

DiffFit trains biases, norms (only those of `qk_norm` have weights here), the label table, and a new factor on what each
block adds to the residual stream (`BlockScale`, whose factor for each channel is ours). For DiT-XL/2 this is 0.2 % of
the weights.
Parts that a plain DiT does not have, such as a decoder or a class token, are new, so all of their weights are trained.
"""

import torch
from torch import Tensor, nn

from .dit import BlockScale, DiT, Encoder
from .encoder_decoder import EncoderDecoder


def add_block_scales(network: DiT | EncoderDecoder) -> None:
    """Give the encoder a `BlockScale` of ones, which leaves the network's output as it is."""
    encoder = _encoder(network)
    encoder.gains = BlockScale(encoder.depth, encoder.width)


def freeze_for_diffit(network: DiT | EncoderDecoder) -> None:
    """Freeze all weights of the encoder except DiffFit's subset. Call `add_block_scales` first."""
    for name, parameter in _encoder(network).named_parameters():
        trained = name.endswith(("bias", "q_norm", "k_norm")) or name.startswith(
            ("label_embed", "gains", "class_token")
        )
        parameter.requires_grad_(trained)


def fold_block_scales(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a network without `BlockScale`: its factors are multiplied into `adaln`'s gate rows.

    A state dict without factors is returned as it is.
    """
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
    """Return the encoder of an `EncoderDecoder`, or the DiT itself."""
    return network.encoder if isinstance(network, EncoderDecoder) else network
