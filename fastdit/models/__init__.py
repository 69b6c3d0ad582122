"""Networks and the checkpoints they read and write. Knows nothing of noise, data or training."""

from .dit import SIZES, DiT, flops_per_image
from .pretrained import load_checkpoint, save_official

__all__ = ["SIZES", "DiT", "flops_per_image", "load_checkpoint", "save_official"]
