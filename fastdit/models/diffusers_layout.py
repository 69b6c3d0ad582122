"""Read and write the weights of a DiT in the layout of diffusers' DiTTransformer2DModel, and read its folders."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.errors import UserError

from .dit import DiT
from .official_layout import OFFICIAL_LABELS, from_official, rename
from .weight_entries import Read, find_entries, without_additions
from .weight_files import State, read_content, read_metadata
from .weight_fit import ATTENTION, number_of_blocks

NULL_LABEL = 1000  # with which DiTPipeline guides
FREQ_SHIFT = "time_freq_shift"  # key of safetensors metadata: the time frequencies that the weights were trained with
_DIFFUSERS_EMBEDDER = {
    "timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embedder.embedding_table.weight": OFFICIAL_LABELS,
}
# Settings of diffusers under which its block computes what ours does. Our norms have eps 1e-6 like the original's.
# Diffusers' default, 1e-5 in the norm before the MLP, changes outputs by a few 1e-6.
_DIFFUSERS_CONFIG = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5, 1e-6),
}
# Names of the weights in diffusers' folders: whole or an index of shards, with or without a variant such as fp16.
_DIFFUSERS_FILE = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?\.(safetensors|bin)")
_DIFFUSERS_INDEX = re.compile(r"diffusion_pytorch_model\.(safetensors|bin)\.index(?:\.(\w+))?\.json")
DIFFUSERS_WEIGHT = "pos_embed.proj.weight"  # one that no other layout has


def from_diffusers(state: State, freq_shift: int = 1) -> State:
    """Convert diffusers to ours, by way of official. Unknown keys are kept.

    Rows that repeat the null label's, as `to_diffusers` adds them, are left out.

    freq_shift: the time frequencies that the weights were trained with; see `TimeEmbed`.

    Raises KeyError for a missing key, and ValueError if the blocks' (t, y) embedders differ, as they do after training
    in diffusers, because a DiT has only one.
    """
    # Take the embedder of the first block for all.
    state = dict(state)
    depth = number_of_blocks(state, "transformer_blocks")
    official: State = {}
    for name, key in _DIFFUSERS_EMBEDDER.items():
        first, *others = (state.pop(f"transformer_blocks.{i}.norm1.emb.{name}") for i in range(depth))
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(f"norm1.emb.{name} differs between blocks; fastdit has one embedder for all")
        official[key] = first
    official[OFFICIAL_LABELS] = _without_repeated_end(official[OFFICIAL_LABELS])

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
    return from_official(official) | {"time_embed.freq_shift": torch.tensor(freq_shift)} | state


def _without_repeated_end(table: Tensor) -> Tensor:
    """Return a label table in which the last row is there once, where it is repeated at the end."""
    others = (table != table[-1]).any(1).nonzero()
    return table[: int(others[-1]) + 2] if len(others) else table


def to_diffusers(state: State) -> State:
    """Convert ours to diffusers, on the CPU. Rounding apart, `DiTTransformer2DModel` computes the same from it.

    DiTPipeline guides with label 1000 whatever the number of classes. The table of fewer classes is therefore filled up
    to 1001 rows with that of the null label.

    Diffusers' class has freq_shift 1 (see `TimeEmbed`). Weights with 0 are written as they are. They need other
    frequencies in each block: `block.norm1.emb.time_proj.downscale_freq_shift = 0`.

    Raises KeyError for a missing key, and UserError for weights that were trained with QK-norm or RoPE.
    """
    for key, (flag, on, _) in ATTENTION.items():
        if key in state:
            raise UserError(f"{flag} {on}: diffusers' DiT has no place for it; export safetensors instead")
    official = rename(state)
    labels, depth = official[OFFICIAL_LABELS], number_of_blocks(state, "blocks")
    official[OFFICIAL_LABELS] = torch.cat([labels, labels[-1:].expand(max(0, NULL_LABEL + 1 - len(labels)), -1)])
    result: State = {}
    for leaf in ("weight", "bias"):
        result[f"pos_embed.proj.{leaf}"] = official[f"x_embedder.proj.{leaf}"]
        result[f"proj_out_1.{leaf}"] = official[f"final_layer.adaLN_modulation.1.{leaf}"]
        result[f"proj_out_2.{leaf}"] = official[f"final_layer.linear.{leaf}"]
        for i in range(depth):
            block, target = f"blocks.{i}", f"transformer_blocks.{i}"
            for part, value in zip("qkv", official[f"{block}.attn.qkv.{leaf}"].chunk(3)):
                result[f"{target}.attn1.to_{part}.{leaf}"] = value
            result[f"{target}.attn1.to_out.0.{leaf}"] = official[f"{block}.attn.proj.{leaf}"]
            result[f"{target}.ff.net.0.proj.{leaf}"] = official[f"{block}.mlp.fc1.{leaf}"]
            result[f"{target}.ff.net.2.{leaf}"] = official[f"{block}.mlp.fc2.{leaf}"]
            result[f"{target}.norm1.linear.{leaf}"] = official[f"{block}.adaLN_modulation.1.{leaf}"]
    for i in range(depth):
        for name, key in _DIFFUSERS_EMBEDDER.items():
            result[f"transformer_blocks.{i}.norm1.emb.{name}"] = official[key]
    # A file holds a tensor once, so that views of one another are copied.
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in result.items()}


def transformer_config(network: DiT) -> dict[str, object]:
    """Return the settings with which `DiTTransformer2DModel` holds the weights of `network`.

    Raises UserError, which names the flag, if that class cannot compute what the network does.
    """
    rows, cols = network.input_size
    no_place = "diffusers' DiT has no place for it; export a .safetensors file instead"
    if network.qk_norm:
        raise UserError(f"model.qk_norm rms: {no_place}")
    if network.rope is not None:
        raise UserError(f"model.rope true: {no_place}")
    if rows != cols:
        raise UserError(f"data.size [{rows}, {cols}]: diffusers' DiT takes squares; export a .safetensors file instead")
    if network.mlp_width != 4 * network.width:
        raise UserError(
            f"model.mlp_ratio {network.mlp_width / network.width:g}: diffusers' DiT has 4; export a .safetensors file "
            "instead"
        )
    return {
        "num_attention_heads": network.heads,
        "attention_head_dim": network.width // network.heads,
        "in_channels": network.channels,
        "out_channels": network.out_channels,
        "num_layers": network.depth,
        "sample_size": rows,
        "patch_size": network.patch,
        "num_embeds_ada_norm": max(network.classes, NULL_LABEL),
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def read_folder(path: Path, weights: str | None) -> Read:
    """Return the weights in a folder of diffusers, in our layout. Raises ValueError if its model is another one."""
    # Read the settings.
    if not (path / "config.json").exists() and (path / "transformer" / "config.json").exists():
        path = path / "transformer"  # of a pipeline, or of an export that no pipeline fits
    if (path / "checkpoints").is_dir() and (path / "config.yaml").exists():
        raise ValueError(
            f"it is a run; export its weights first: fastdit-export --run {path} --out weights.safetensors"
        )
    config_path = path / "config.json"
    if not config_path.exists():
        raise ValueError("it has no config.json; give diffusers' transformer folder, or a file")
    try:
        config = dict(json.loads(config_path.read_text()))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config.json cannot be read ({error})") from None
    _check_config(config)

    # Read the weights.
    file, line = _choose_file(path, weights)
    tensors = _read_shards(file) if file.suffix == ".json" else read_content(file)
    entries = find_entries(tensors)
    if not entries:
        raise KeyError(DIFFUSERS_WEIGHT)
    state, lines = without_additions(entries[0].state)

    # Convert them, and tell what tensors do not.
    converted = from_diffusers(state, int(read_metadata(file).get(FREQ_SHIFT, 1)))
    size, classes, heads = (config.get(key) for key in ("sample_size", "num_embeds_ada_norm", "num_attention_heads"))
    patch = converted["patch_embed.weight"].shape[-1]
    return Read(
        converted,
        [*lines, line],
        classes=min(classes, len(converted["label_embed.weight"]) - 1) if isinstance(classes, int) else None,
        heads=heads if isinstance(heads, int) else None,
        grid=(size // patch, size // patch) if isinstance(size, int) else None,
    )


def _choose_file(path: Path, weights: str | None) -> tuple[Path, str | None]:
    """Return the file of weights, or their index, in a folder of diffusers, and a line if there is a choice.

    EMA weights come first, then those without a variant. `weights` names a variant, such as fp16.
    """
    # List the files, each with its variant.
    found = []
    for file in sorted(path.iterdir()):
        if match := _DIFFUSERS_FILE.fullmatch(file.name):
            found.append((match[1] or "", match[2], file))
        elif match := _DIFFUSERS_INDEX.fullmatch(file.name):
            found.append((match[2] or "", match[1], file))
    if not found:
        raise ValueError("it has neither diffusion_pytorch_model.safetensors nor diffusion_pytorch_model.bin")

    # Choose one.
    variants = sorted({variant for variant, _, _ in found})
    fitting = [one for one in found if weights is None or one[0] == weights]
    if not fitting:
        names = ", ".join(variant or "(without a variant)" for variant in variants)
        raise ValueError(f"it holds no variant {weights!r} of the weights, only {names}; change --init_weights")
    fitting.sort(key=lambda one: (one[0] != "ema", one[0] != "", one[1] != "safetensors", one[2].suffix == ".json"))
    variant, _, file = fitting[0]
    others = [name for name in variants if name != variant]
    if not variant and not others:
        return file, None
    line = f"starting from {file.name}"
    if variants := ", ".join(filter(None, others)):
        line += f"; --init_weights chooses other variants: {variants}"
    return file, line


def _read_shards(index: Path) -> State:
    """Return the tensors of all shards that an index of diffusers lists."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{index.name} cannot be read; copy or download it again") from None
    tensors: State = {}
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).exists():
            raise ValueError(f"{index.name} lists {shard}, which is not in the folder; copy or download it")
        tensors |= read_content(index.parent / shard)
    return tensors


def _check_config(config: dict[str, Any]) -> None:
    """Raise ValueError unless diffusers' settings describe a model with the function of a DiT."""
    for field, allowed in _DIFFUSERS_CONFIG.items():
        if config.get(field) not in allowed:
            raise ValueError(f"{field} is {config.get(field)!r} in config.json, a DiT has {allowed[0]!r}")
