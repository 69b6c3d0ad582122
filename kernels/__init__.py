"""Operations of a diffusion transformer's step. Knows nothing of the rest of fastdit."""

from .adaln import gate_residual, gate_residual_modulate, modulate
from .adamw_ema import AdamWEMA
from .attention import attention, attention_backends, describe_attention

__all__ = [
    "AdamWEMA",
    "attention",
    "attention_backends",
    "describe_attention",
    "gate_residual",
    "gate_residual_modulate",
    "modulate",
]
