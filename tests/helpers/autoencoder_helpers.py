"""Write small autoencoders with random weights as files: diffusers' folders and taef2's pair."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from fastdit.models import taef2

KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
    "latent_channels": 5,
    "scaling_factor": 0.9,
}


def diffusers_model(kind: str, **changes) -> torch.nn.Module:
    """Return an AutoencoderKL (4x smaller) or AutoencoderTiny (2x smaller) with random weights, always the same."""
    import diffusers

    sizes = {"AutoencoderKL": KL, "AutoencoderTiny": TINY}[kind] | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(diffusers, kind)(**sizes).eval()
        for parameter in model.parameters():  # norms and biases as they are after training
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.requires_grad_(False)


def random_taef2(folder: Path, name: str = "taef2") -> Path:
    """Write taef2's pair of files with random fp16 weights, and return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for part, network in (("encoder", taef2.encoder()), ("decoder", taef2.decoder())):
            torch.save(network.half().state_dict(), folder / f"{name}_{part}.pth")
    return folder


def rewrite(file: Path, change) -> None:
    """Write a .pth or .safetensors file again, its state dict changed in place by `change`."""
    if file.suffix == ".pth":
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)
    else:
        from safetensors.torch import load

        state = load(file.read_bytes())
        change(state)
        save_file(state, file)
