"""Read DiT checkpoints of other projects, and write the original layout, bit for bit.

There are three layouts, all plain dicts of tensors:

    official    the original DiT's .pt: a state dict, or {"model", "ema", ...}; an adaLN Linear in every block
    diffusers   DiTTransformer2DModel: split q, k, v; the (t, y) embedder repeated in every block
    ours        `DiT.state_dict()`: all adaLN projections stacked in one Linear

`weight_files` reads files, `weight_entries` finds the weights in them, and `weight_fit` checks that they fit.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.errors import UserError

from .dit import DiT, Encoder
from .embeddings import sincos_positions
from .encoder_decoder import EncoderDecoder
from .weight_entries import (
    choose_entry,
    declared_classes,
    declared_noise,
    find_entries,
    unnamed_averages,
    without_additions,
)
from .weight_files import State, read_content
from .weight_fit import ATTENTION, check_fits, fit_labels, fit_outputs, fit_positions, number_of_blocks, other_grid

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
_DIFFUSERS_WEIGHT = "pos_embed.proj.weight"  # one that no other layout has


class _Read(NamedTuple):
    """Hold weights in our layout, and what their file tells beside them.

    lines: what a user should know. positions: the position table, if the file has one. classes: the number of classes,
    if the file states it. noise: the noise process, if the file states it.
    """

    state: State
    lines: list[str]
    positions: Tensor | None = None
    classes: int | None = None
    noise: dict[str, str] | None = None


def load_checkpoint(
    model: DiT | EncoderDecoder,
    path: str | Path,
    *,
    new_labels: bool = False,
    weights: str | None = None,
    classes: int | None = None,
    check_noise: Callable[[dict], None] = lambda trained: None,
    spare_outputs: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Fill `model` from a checkpoint in any of the three layouts, which is recognized by its content.

    A DiT's checkpoint fills the encoder of an `EncoderDecoder`, whose decoder stays as it is; the modulation of the
    DiT's last layer becomes the bridge's. Call it before the engine shards the weights.

    Weights of another grid of patches fit, because positions are computed. Where the file has no null class, the
    model's initial null label stays.

    Args:
        model: the network, on any device.
        path: a .pt or .safetensors file, or the folder that diffusers' `save_pretrained` wrote.
        new_labels: whether the model keeps its label table, for other classes than the file's. The row of the null
            label, the last of both tables, is still taken from the file.
        weights: name of the weights to take from a file that holds several. None takes the EMA weights, if there are
            any, else the first.
        classes: number of classes of the file, the null class not counted, where it is known. None takes what the file
            states, or guesses from the number of rows.
        check_noise: called with the noise process that the file states, if it does: its name and settings.
        spare_outputs: whether a file with twice the outputs fits, whose second half is left out, as in SiT's.
        say: called with a line for each choice that a user should know of.

    Raises UserError, which names the file and the flag, if it cannot be read or does not hold exactly this model.
    """
    path = Path(path)
    try:
        # Read the weights in our layout.
        encoder = model if isinstance(model, DiT) else model.encoder
        read = read_weights(encoder, path, weights)
        state, lines = read.state, read.lines
        if read.noise is not None:
            check_noise(read.noise)
        if encoder is model and "encoder.patch_embed.weight" in state:
            raise ValueError("it holds an extra decoder, no plain DiT; take --method sd_dit --sd_dit.decoder extra")

        lines.append(fit_outputs(encoder, state, spare_outputs, read.noise is not None))

        # Complete them with those that the model keeps, and check that all fit.
        prefix = "" if "patch_embed.weight" in state or encoder is model else "encoder."
        if not prefix:
            model, state = encoder, _for_encoder(encoder, state)
        labels = f"{prefix}label_embed.weight"
        if encoder.null_class and labels in state:
            fresh = encoder.label_embed.weight.detach()
            state[labels], line = fit_labels(state[labels], fresh, classes or read.classes, new_labels)
            lines.append(line)
        check_fits(model, state)
        if read.positions is not None:
            lines.append(fit_positions(encoder, read.positions))
    except KeyError as missing:
        raise UserError(f"{path}: {missing.args[0]} is missing; this is not a whole DiT checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    model.load_state_dict(state)
    for line in filter(None, lines):
        say(f"{path}: {line}")


def read_weights(encoder: Encoder, path: Path, weights: str | None = None) -> _Read:
    """Return the weights in a file, or in a folder of diffusers, in our layout; `load_checkpoint` tells the arguments.

    Raises KeyError for a missing tensor, and OSError or ValueError if the file cannot be read or is no DiT's.
    """
    return _read_folder(encoder, path, weights) if path.is_dir() else _read_file(path, weights)


def save_official(state: State, path: str | Path, *, grid: tuple[int, int]) -> None:
    """Write a state dict in our layout as an original DiT's .pt file.

    grid: the model's `grid`, for its position table. Raises KeyError and UserError as `to_official` does.
    """
    torch.save(to_official(state, grid), path)


def from_official(state: State) -> State:
    """Convert official to ours, without the position table. Unknown keys are kept; a missing one raises KeyError."""
    state = {key: value for key, value in state.items() if key != "pos_embed"}
    depth = number_of_blocks(state, "blocks")
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
    for key, (flag, on, _) in ATTENTION.items():
        if key in state:
            raise UserError(f"{flag} {on}: the original DiT's layout has no place for it; export safetensors instead")
    if int(state["time_embed.freq_shift"]):
        raise UserError(
            "time_embed.freq_shift: these weights use diffusers' time frequencies, which the original DiT "
            "does not have; export safetensors instead"
        )
    depth, width = number_of_blocks(state, "blocks"), state["patch_embed.weight"].shape[0]
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
    depth = number_of_blocks(state, "transformer_blocks")
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


def _for_encoder(encoder: Encoder, state: State) -> State:
    """Return a DiT's state with exactly the tensors of `encoder`, whose extra weights stay as they are."""
    if not isinstance(encoder, DiT):
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    present = encoder.state_dict()
    for key in ("class_token.weight", "gains.weight"):
        if key in present and key not in state:
            state[key] = present[key]
    return state


def _read_file(path: Path, weights: str | None) -> _Read:
    """Return the weights of a file in our layout: those called `weights`, else the EMA weights, else the first."""
    content = read_content(path)
    entries = find_entries(content)
    if not entries:
        if not isinstance(content, dict) or not _holds_tensors(content):
            raise ValueError("not a checkpoint: it does not hold a dict of tensors")
        raise ValueError("not a DiT checkpoint: it has neither x_embedder.proj.weight nor patch_embed.weight")
    if weights is None and not any(entry.is_ema for entry in entries) and (place := unnamed_averages(content)):
        raise ValueError(
            f"its EMA weights, {place}, are a list without names, which is not read; take the others with "
            f"--init_weights {entries[0].name}"
        )
    entry, line = choose_entry(entries, weights)
    state, lines = without_additions(entry.state)
    lines.insert(0, line)
    if _DIFFUSERS_WEIGHT in state:
        raise ValueError("it holds weights of diffusers; give the folder with this file and its config.json")
    if "x_embedder.proj.weight" not in state:
        return _Read(state, lines)
    noise = declared_noise(content, entry.state)
    return _Read(from_official(state), lines, state["pos_embed"], declared_classes(content), noise)


def _holds_tensors(content: dict) -> bool:
    """Return whether a dict, or one of the dicts in it, holds nothing but tensors. An empty one does."""
    dicts = [content, *(value for value in content.values() if isinstance(value, dict))]
    return any(all(isinstance(value, Tensor) for value in part.values()) for part in dicts)


def _read_folder(encoder: Encoder, path: Path, weights: str | None) -> _Read:
    """Return the weights in a folder of diffusers, in our layout. Raises ValueError if its model is another one."""
    # Read the settings.
    if (path / "model_index.json").exists() and (path / "transformer").is_dir():
        path = path / "transformer"  # of a whole pipeline
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
        raise KeyError(_DIFFUSERS_WEIGHT)
    state, lines = without_additions(entries[0].state)

    # Compare what the tensors do not tell.
    heads, patches = config.get("num_attention_heads"), state.get(_DIFFUSERS_WEIGHT)
    if heads != encoder.heads and patches is not None and patches.shape[0] == encoder.width:
        raise ValueError(
            f"number of heads is {heads} in config.json, {encoder.heads} in this model; take --model.heads {heads}"
        )
    size, classes = config.get("sample_size"), config.get("num_embeds_ada_norm")
    side = size // encoder.patch if isinstance(size, int) else 0
    lines += [line, other_grid((side, side), encoder.grid) if side else None]
    return _Read(from_diffusers(state), lines, classes=classes if isinstance(classes, int) else None)


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
