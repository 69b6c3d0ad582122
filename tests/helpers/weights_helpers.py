"""Write small files in the layouts of published weights, and replace the published ones by them in the known list."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from test_pretrained import make_official

from fastdit.models import known_weights, weight_content
from fastdit.models.known_weights import KNOWN

DIMS = {"depth": 2, "width": 48, "heads": 4}
CASE = {"input_size": 32, "patch": 2, "channels": 4, "classes": 1000, **DIMS}
# config.json of sd-vae-ft-ema and sd-vae-ft-mse, byte for byte: its SHA-256 is the published one.
SD_VAE_CONFIG = """{
  "_class_name": "AutoencoderKL",
  "_diffusers_version": "0.4.2",
  "act_fn": "silu",
  "block_out_channels": [
    128,
    256,
    512,
    512
  ],
  "down_block_types": [
    "DownEncoderBlock2D",
    "DownEncoderBlock2D",
    "DownEncoderBlock2D",
    "DownEncoderBlock2D"
  ],
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "out_channels": 3,
  "sample_size": 256,
  "up_block_types": [
    "UpDecoderBlock2D",
    "UpDecoderBlock2D",
    "UpDecoderBlock2D",
    "UpDecoderBlock2D"
  ]
}
"""


def small_networks(monkeypatch) -> None:
    """Give the networks of all sizes 2 blocks of width 48."""
    monkeypatch.setattr(weight_content, "SIZES", dict.fromkeys(weight_content.SIZES, DIMS))


def saved(content) -> bytes:
    """Return what torch.save writes for `content`."""
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def dit(latents: int = 32, **changes) -> dict:
    """Return the original layout of a small DiT with a learned variance."""
    return make_official(CASE | {"input_size": latents, "out_channels": 8} | changes)


def sit() -> dict:
    """Return the same of SiT, the second half of whose outputs is zero."""
    state = dit()
    for leaf in ("weight", "bias"):
        state[f"final_layer.linear.{leaf}"].unflatten(0, (4, 2, 4))[:, 1] = 0
    return state


def repa() -> dict:
    """Return the same of REPA, with a projector and single outputs."""
    return make_official(CASE) | {"projectors.0.0.weight": torch.zeros(3, 3)}


def diffusers_folder(folder: Path, latents: int = 32) -> Path:
    """Write a small DiT of diffusers, as a .bin with its config.json, and return the folder."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=latents,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    shared = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    model.save_pretrained(folder, safe_serialization=False)
    return folder


def reference_batch(**changes) -> bytes:
    """Return an .npz file with statistics as ADM's evaluator writes them; changes: arrays that replace them."""
    out = io.BytesIO()
    np.savez(out, **({"mu": np.zeros(2048), "sigma": np.eye(2048, dtype=np.float32)} | changes))
    return out.getvalue()


def inception() -> dict:
    """Return two layers of the Inception network of 2015."""
    return {
        "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3),
        "fc.weight": torch.zeros(1008, 2048),
        "fc.bias": torch.zeros(1008),
    }


def publish(monkeypatch, server, name: str, contents: dict[str, bytes], summed: bool = True) -> None:
    """Let the server publish known weights with other contents, by file name; summed: whether sums are published."""
    server.files |= contents
    files = tuple(
        replace(
            file,
            addresses=(f"{server.address}/x/{file.name}",),
            size=len(contents[file.name]) if summed else None,
            sha256=hashlib.sha256(contents[file.name]).hexdigest() if summed else None,
            about=None,
        )
        for file in KNOWN[name].files
    )
    monkeypatch.setitem(known_weights.KNOWN, name, replace(KNOWN[name], files=files))
