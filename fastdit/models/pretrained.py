"""Read DiT checkpoints of other projects, and write the original layout, bit for bit.

There are three layouts, all plain dicts of tensors:

    official    the original DiT's .pt: a state dict, or {"model", "ema", ...}; an adaLN Linear in every block
    diffusers   DiTTransformer2DModel: split q, k, v; the (t, y) embedder repeated in every block
    ours        `DiT.state_dict()`: all adaLN projections stacked in one Linear

Nothing is unpickled: tensors come through safetensors or torch's weights-only loader.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdit.errors import UserError

from .dit import DiT, Encoder
from .embeddings import sincos_positions
from .encoder_decoder import EncoderDecoder

State = dict[str, Tensor]

_OFFICIAL_TOP = {
    "patch_embed": "x_embedder.proj",
    "time_embed.fc1": "t_embedder.mlp.0",
    "time_embed.fc2": "t_embedder.mlp.2",
    "head": "final_layer.linear",
}
_OFFICIAL_BLOCK = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_OFFICIAL_LABELS = "y_embedder.embedding_table.weight"
_DIFFUSERS_EMBEDDER = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": _OFFICIAL_LABELS,
}
# Our key and dimension that tell each size of a model, and the name that users know it by.
_FIELDS = (
    ("patch_embed.weight", 0, "width"),
    ("patch_embed.weight", 1, "channels"),
    ("patch_embed.weight", 3, "patch"),
    ("blocks.0.fc1.weight", 0, "MLP width"),
    ("label_embed.weight", 0, "number of classes, the null class included,"),
    ("head.weight", 0, "number of outputs per token"),
)
# Our key that tells whether attention has an option of ours, and the setting.
_ATTENTION = {"blocks.0.q_norm": "model.qk_norm rms", "rope.theta": "model.rope true"}
# Settings of diffusers under which its block computes what ours does. Our norms have eps 1e-6 like the original's.
# Diffusers' default, 1e-5 in the norm before the MLP, changes outputs by a few 1e-6.
_DIFFUSERS_CONFIG = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5, 1e-6),
}


def load_checkpoint(model: DiT | EncoderDecoder, path: str | Path, *, new_labels: bool = False) -> None:
    """Fill `model` from a checkpoint in any of the three layouts, which is recognized by its content.

    A DiT's checkpoint fills the encoder of an `EncoderDecoder`, whose decoder stays as it is; the modulation of the
    DiT's last layer becomes the bridge's. Of a file that holds both, the EMA weights are read. Call it before the
    engine shards the weights.

    Args:
        model: the network, on any device.
        path: a .pt or .safetensors file, or the folder that diffusers' `save_pretrained` wrote.
        new_labels: whether the model keeps its label table, for other classes than the file's. The row of the null
            label, the last of both tables, is still taken from the file.

    Raises UserError, which names the file and the field, if it cannot be read or does not hold exactly this model.
    """
    path = Path(path)
    try:
        # Read the weights in our layout.
        encoder = model if isinstance(model, DiT) else model.encoder
        state, positions = (_read_folder(encoder, path), None) if path.is_dir() else _read_file(path)
        if encoder is model and "encoder.patch_embed.weight" in state:
            raise ValueError("it holds an extra decoder, no plain DiT; take --method sd_dit --sd_dit.decoder extra")

        # Complete them with those that the model keeps, and check that all fit.
        prefix = "" if "patch_embed.weight" in state or encoder is model else "encoder."
        if not prefix:
            model, state = encoder, _for_encoder(encoder, state)
        if new_labels:
            state = _with_labels(state, f"{prefix}label_embed.weight", encoder.label_embed.weight.detach())
        _check_fits(model, state)
        if positions is not None:
            _check_positions(encoder, positions)
    except KeyError as missing:
        raise UserError(f"{path}: {missing.args[0]} is missing; this is not a whole DiT checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    model.load_state_dict(state)


def save_official(state: State, path: str | Path, *, grid: tuple[int, int]) -> None:
    """Write a state dict in our layout as an original DiT's .pt file.

    grid: the model's `grid`, for its position table. Raises KeyError and UserError as `to_official` does.
    """
    torch.save(to_official(state, grid), path)


def from_official(state: State) -> State:
    """Convert official to ours, without the position table. Unknown keys are kept; a missing one raises KeyError."""
    state = {key: value for key, value in state.items() if key != "pos_embed"}
    depth = _depth(state, "blocks")
    ours = {key: state.pop(official) for key, official in _official_keys(depth)}
    for leaf in ("weight", "bias"):
        parts = [state.pop(f"{module}.{leaf}") for module in _official_adaln(depth)]
        ours[f"adaln.{leaf}"] = torch.cat(parts)
    return ours | {"time_embed.freq_shift": torch.tensor(0)} | state


def to_official(state: State, grid: tuple[int, int]) -> State:
    """Convert ours to official, on the CPU, with the position table of a (rows, cols) grid.

    Raises KeyError for a missing key, and UserError for weights that came from diffusers, because the original layout
    has no place for their time frequencies, or that were trained with QK-norm or RoPE.
    """
    for key, setting in _ATTENTION.items():
        if key in state:
            raise UserError(f"{setting}: the original DiT's layout has no place for it; export safetensors instead")
    if int(state["time_embed.freq_shift"]):
        raise UserError(
            "time_embed.freq_shift: these weights use diffusers' time frequencies, which the original DiT "
            "does not have; export safetensors instead"
        )
    depth, width = _depth(state, "blocks"), state["patch_embed.weight"].shape[0]
    official = {"pos_embed": sincos_positions(grid, width)[None]}
    official |= {key: state[ours].detach().cpu() for ours, key in _official_keys(depth)}
    for leaf in ("weight", "bias"):
        parts = state[f"adaln.{leaf}"].detach().cpu().split([6 * width] * depth + [2 * width])
        official |= {f"{module}.{leaf}": part for module, part in zip(_official_adaln(depth), parts)}
    return official


def from_diffusers(state: State) -> State:
    """Convert diffusers to ours, by way of official. Unknown keys are kept.

    Raises KeyError for a missing key, and ValueError if the blocks' (t, y) embedders differ, as they do after training
    in diffusers, because a DiT has only one.
    """
    # Take the embedder of the first block for all.
    state = dict(state)
    depth = _depth(state, "transformer_blocks")
    official: State = {}
    for name, key in _DIFFUSERS_EMBEDDER.items():
        first, *others = (state.pop(f"transformer_blocks.{i}.norm1.emb.{name}") for i in range(depth))
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(f"norm1.emb.{name} differs between blocks; fastdit has one embedder for all")
        official[key] = first

    # Rename the first and last layers, and rename and join those of the blocks.
    for leaf in ("weight", "bias"):
        official[f"x_embedder.proj.{leaf}"] = state.pop(f"pos_embed.proj.{leaf}")
        official[f"final_layer.adaLN_modulation.1.{leaf}"] = state.pop(f"proj_out_1.{leaf}")
        official[f"final_layer.linear.{leaf}"] = state.pop(f"proj_out_2.{leaf}")
        for i in range(depth):
            block, source = f"blocks.{i}", f"transformer_blocks.{i}"
            qkv = [state.pop(f"{source}.attn1.to_{part}.{leaf}") for part in "qkv"]
            official[f"{block}.attn.qkv.{leaf}"] = torch.cat(qkv)
            official[f"{block}.attn.proj.{leaf}"] = state.pop(f"{source}.attn1.to_out.0.{leaf}")
            official[f"{block}.mlp.fc1.{leaf}"] = state.pop(f"{source}.ff.net.0.proj.{leaf}")
            official[f"{block}.mlp.fc2.{leaf}"] = state.pop(f"{source}.ff.net.2.{leaf}")
            official[f"{block}.adaLN_modulation.1.{leaf}"] = state.pop(f"{source}.norm1.linear.{leaf}")
    return from_official(official) | {"time_embed.freq_shift": torch.tensor(1)} | state


def _official_keys(depth: int) -> Iterator[tuple[str, str]]:
    """Yield (our name, official name) of every tensor that only changes its name."""
    yield "label_embed.weight", _OFFICIAL_LABELS
    modules = list(_OFFICIAL_TOP.items())
    for i in range(depth):
        modules += [(f"blocks.{i}.{ours}", f"blocks.{i}.{key}") for ours, key in _OFFICIAL_BLOCK.items()]
    for ours, key in modules:
        for leaf in ("weight", "bias"):
            yield f"{ours}.{leaf}", f"{key}.{leaf}"


def _official_adaln(depth: int) -> list[str]:
    """Return the official modules whose rows, in this order, are our one `adaln` Linear."""
    return [f"{module}.adaLN_modulation.1" for module in (*(f"blocks.{i}" for i in range(depth)), "final_layer")]


def _depth(state: State, blocks: str) -> int:
    """Return the number of blocks in a state dict whose names begin with `blocks`. Raises KeyError for none."""
    found = [int(match[1]) for key in state if (match := re.match(rf"{blocks}\.(\d+)\.", key))]
    if not found:
        raise KeyError(f"{blocks}.0")
    return 1 + max(found)


def _with_labels(state: State, key: str, labels: Tensor) -> State:
    """Return the state with `labels` as label table, except the null label's row, which stays the file's."""
    stored = state[key]
    if stored.shape[1:] != labels.shape[1:]:  # `_check_fits` reports another width
        return state
    return state | {key: torch.cat([labels[:-1], stored[-1:].to(labels.dtype)])}


def _for_encoder(encoder: Encoder, state: State) -> State:
    """Return a DiT's state with exactly the tensors of `encoder`, whose extra weights stay as they are."""
    if not isinstance(encoder, DiT):
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    present = encoder.state_dict()
    for key in ("class_token.weight", "gains.weight"):
        if key in present and key not in state:
            state[key] = present[key]
    return state


def _read_file(path: Path) -> tuple[State, Tensor | None]:
    """Return the EMA weights in our layout, and the position table if the file is an original DiT's."""
    state = read_tensors(path, "ema")
    if "patch_embed.weight" in state or "encoder.patch_embed.weight" in state:
        return state, None
    if "x_embedder.proj.weight" not in state:
        raise ValueError("not a DiT checkpoint: it has neither x_embedder.proj.weight nor patch_embed.weight")
    return from_official(state), state["pos_embed"]


def _check_positions(encoder: Encoder, positions: Tensor) -> None:
    """Raise ValueError unless the file's position table is the model's, up to rounding."""
    expected = sincos_positions(encoder.grid, encoder.width)[None]
    if positions.shape != expected.shape:
        tokens = f"{positions[..., 0].numel()} in this file, {expected.shape[1]} in this model"
        raise ValueError(f"number of tokens is {tokens}; change input_size")
    if not torch.allclose(positions.float(), expected, atol=1e-5 if positions.dtype == torch.float32 else 1e-2):
        raise ValueError(f"pos_embed is not the sin-cos table of this model's {encoder.grid} grid")


def _read_folder(encoder: Encoder, path: Path) -> State:
    """Return the weights in a folder of diffusers, in our layout. Raises ValueError if its model is another one."""
    config_path = path / "config.json"
    if not config_path.exists():
        raise ValueError("it has no config.json; give diffusers' transformer folder, or a file")
    try:
        config = dict(json.loads(config_path.read_text()))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config.json cannot be read ({error})") from None
    _check_config(encoder, config)
    weights = [path / f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
    existing = [file for file in weights if file.exists()]
    if not existing:
        raise ValueError(f"it has neither {weights[0].name} nor {weights[1].name}")
    return from_diffusers(read_tensors(existing[0], "model"))


def _check_config(encoder: Encoder, config: dict[str, Any]) -> None:
    """Raise ValueError unless diffusers' settings describe a DiT of the encoder's size."""
    for field, allowed in _DIFFUSERS_CONFIG.items():
        if config.get(field) not in allowed:
            raise ValueError(f"{field} is {config.get(field)!r} in config.json, a DiT has {allowed[0]!r}")
    size, heads = config.get("sample_size"), config.get("num_attention_heads")
    for field, described, expected in (
        ("input size", (size, size), encoder.input_size),
        ("number of heads", heads, encoder.heads),
    ):
        if described != expected:
            raise ValueError(f"{field} is {described} in config.json, {expected} in this model; build it to match")


def read_tensors(path: Path, which: str) -> State:
    """Return the tensors of a .pt or .safetensors file, on the CPU. Nothing is unpickled.

    which: "ema" or "model", for files of the original trainer, which hold a dict of tensors under each name.
    Raises ValueError if there is no such file, or if it cannot be read, or if it does not hold a dict of tensors.
    """
    # Read the file.
    if not path.exists():
        raise ValueError("no such file; give a .pt or .safetensors file, or a diffusers folder")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:  # the original trainer stores its arguments, a Namespace of plain values, beside the weights
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in either reader
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path.name} cannot be read as a checkpoint ({reason})") from None

    # Take one of the dicts in a file of the original trainer.
    if isinstance(state, dict) and ("model" in state or "ema" in state):
        if which not in state:
            raise ValueError(f"it holds no {which!r} weights, only {', '.join(map(str, state))}")
        state = state[which]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("not a checkpoint: it does not hold a dict of tensors")
    return state


def _check_fits(model: DiT | Encoder | EncoderDecoder, state: State) -> None:
    """Raise ValueError unless `state` (ours) has exactly the model's tensors, for the most telling difference first."""
    expected = model.state_dict()
    encoder, prefix = (model.encoder, "encoder.") if isinstance(model, EncoderDecoder) else (model, "")
    pairs = [("depth", _depth(state, f"{prefix}blocks"), encoder.depth)]
    for key, dim, field in _FIELDS:
        key = prefix + key
        if key in state and state[key].dim() == expected[key].dim():
            pairs.append((field, state[key].shape[dim], expected[key].shape[dim]))
    for key, setting in _ATTENTION.items():
        if (prefix + key in state) != (prefix + key in expected):
            used = "with" if prefix + key in state else "without"
            raise ValueError(f"its weights were trained {used} {setting}, unlike this model; build it to match")
    for field, stored, needed in pairs:
        if stored != needed:
            raise ValueError(f"{field} is {stored} in this file, {needed} in this model; build it to match")
    if fault := misfit(model, state):
        raise ValueError(fault)


def misfit(module: nn.Module, state: State) -> str | None:
    """Return how `state` differs from the module's tensors in names or shapes, in a few words; None if it does not."""
    expected = module.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        return f"{name} {'is missing' if name in expected else 'is not part of this model'}"
    for name, value in expected.items():
        if state[name].shape != value.shape:
            return f"{name} is {tuple(state[name].shape)}, this model needs {tuple(value.shape)}"
    return None
