"""The fused operations of a diffusion transformer's training step, independent of the rest of fastdit.

README.md here tells how to add one.
"""

from ._native import describe_native
from .adaln import gate_residual, gate_residual_modulate, modulate
from .adamw_ema import AdamWEMA, describe_optimizer
from .apex_adam import ApexAdamEMA
from .attention import attention, attention_backends, describe_attention
from .denoise import DenoiseCoefficients, affine_denoise_loss
from .linear import fp8_linear, gelu_linear, modulated_linear, sums_biases
from .packed import split_qkv
from .philox import philox_bits, philox_integers, philox_normal, philox_uniform
from .prototypes import PrototypeLoss, prototype_loss
from .rotary import norm_rotate, rope_table
from .sample_generator import AnyGenerator, SampleGenerator, draw_integers, draw_normal, draw_uniform
from .structure import StructureLoss, structure_loss
from .tokens import embed_tokens, scatter_tokens, split_tokens, visible_tokens

__all__ = [
    "AdamWEMA",
    "AnyGenerator",
    "ApexAdamEMA",
    "DenoiseCoefficients",
    "PrototypeLoss",
    "SampleGenerator",
    "StructureLoss",
    "affine_denoise_loss",
    "attention",
    "attention_backends",
    "describe_attention",
    "describe_native",
    "describe_optimizer",
    "draw_integers",
    "draw_normal",
    "draw_uniform",
    "embed_tokens",
    "fp8_linear",
    "gate_residual",
    "gate_residual_modulate",
    "gelu_linear",
    "modulate",
    "modulated_linear",
    "norm_rotate",
    "philox_bits",
    "philox_integers",
    "philox_normal",
    "philox_uniform",
    "prototype_loss",
    "rope_table",
    "scatter_tokens",
    "split_qkv",
    "split_tokens",
    "structure_loss",
    "sums_biases",
    "visible_tokens",
]
