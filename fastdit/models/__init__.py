"""Define the networks, and read and write their checkpoints. Noise, data and training are unknown here."""

from .alignment import AlignedDiT, TokenTargets
from .autoencoders import Autoencoder, open_autoencoder
from .diffusers_layout import FREQ_SHIFT, NULL_LABEL, to_diffusers, transformer_config
from .diffusers_vae import pipeline_vae
from .dit import SIZES, DiT, Encoder, check_head_dim, check_heads, encoder_products, flops_per_image
from .encoder_decoder import EncoderDecoder, HiddenTokens, decoder_products
from .finetune import add_block_scales, fold_block_scales, freeze_for_diffit
from .fp8 import check_fp8_width, use_fp8
from .image_resnet import ImageResNet
from .latent_decoder import LatentDecoder
from .official_layout import check_official
from .pretrained import load_checkpoint, open_network, save_official
from .sd_dit import Student, Target, Teacher, head_products
from .split_dit import SplitDiT, split_products
from .streams import GradientRatio
from .structure_encoders import LatentResNet, load_structure_encoder
from .weight_files import read_metadata

__all__ = [
    "FREQ_SHIFT",
    "NULL_LABEL",
    "SIZES",
    "AlignedDiT",
    "Autoencoder",
    "DiT",
    "Encoder",
    "EncoderDecoder",
    "GradientRatio",
    "HiddenTokens",
    "ImageResNet",
    "LatentDecoder",
    "LatentResNet",
    "SplitDiT",
    "Student",
    "Target",
    "Teacher",
    "TokenTargets",
    "add_block_scales",
    "check_fp8_width",
    "check_head_dim",
    "check_heads",
    "check_official",
    "decoder_products",
    "encoder_products",
    "flops_per_image",
    "fold_block_scales",
    "freeze_for_diffit",
    "head_products",
    "load_checkpoint",
    "load_structure_encoder",
    "open_autoencoder",
    "open_network",
    "pipeline_vae",
    "read_metadata",
    "save_official",
    "split_products",
    "to_diffusers",
    "transformer_config",
    "use_fp8",
]
