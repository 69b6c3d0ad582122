"""Check that weights in our layout fit a network, and name the flag under which they would.

The position table is computed, so weights of another grid fit. A label table may lack the null class.
"""

import math

import torch
from torch import Tensor, nn

from .dit import SIZES, DiT, Encoder
from .embeddings import sincos_positions
from .encoder_decoder import EncoderDecoder
from .weight_files import State

# Our key that tells whether attention has an option of ours, the flag, and its values with the option and without.
ATTENTION = {"blocks.0.q_norm": ("model.qk_norm", "rms", "none"), "rope.theta": ("model.rope", "true", "false")}
_SIT = "--noise.name flow --noise.flow.convention sit"
# Numbers of classes that data sets often have. A table of as many rows has no null class.
USUAL_CLASSES = (10, 100, 1000)


def check_finite(state: State) -> None:
    """Raise ValueError that names a tensor with a value that is not finite."""
    for name, value in state.items():
        known = value.float() if value.dtype.itemsize == 1 else value  # torch has no such test for some fp8 types
        if value.is_floating_point() and not known.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite; copy the file again, or give an earlier one")


def check_fits(model: DiT | Encoder | EncoderDecoder, state: State) -> None:
    """Raise ValueError unless `state` (ours) has exactly the model's tensors, for the most telling difference first."""
    expected = model.state_dict()
    encoder, prefix = (model.encoder, "encoder.") if isinstance(model, EncoderDecoder) else (model, "")
    for key, (flag, on, off) in ATTENTION.items():
        if (prefix + key in state) != (prefix + key in expected):
            used, value = ("with", on) if prefix + key in state else ("without", off)
            raise ValueError(f"its weights were trained {used} {flag} {on}, unlike this model; take --{flag} {value}")
    for field, stored, needed, remedy in _sizes(encoder, state, expected, prefix):
        if stored != needed:
            raise ValueError(f"{field} is {stored} in this file, {needed} in this model; {remedy}")
    if fault := misfit(model, state):
        raise ValueError(fault)


def _sizes(encoder: Encoder, state: State, expected: State, prefix: str) -> list[tuple[str, int, int, str]]:
    """Return (field, value in the file, value in the model, what to do) of each size that the tensors tell."""
    # Read the file's sizes off its tensors.
    patches = state.get(f"{prefix}patch_embed.weight")
    width = patches.shape[0] if patches is not None and patches.dim() == 4 else encoder.width
    depth = number_of_blocks(state, f"{prefix}blocks")
    outputs = [table[f"{prefix}head.weight"].shape[0] for table in (state, expected) if f"{prefix}head.weight" in table]
    size = _size_flags(depth, width, encoder)

    def row(key: str, dim: int, field: str, remedy: str) -> list[tuple[str, int, int, str]]:
        key = prefix + key
        if key not in state or state[key].dim() != expected[key].dim():
            return []
        stored = state[key].shape[dim]
        return [(field, stored, expected[key].shape[dim], remedy.format(stored))]

    # Pair them with the model's.
    mlp = state.get(f"{prefix}blocks.0.fc1.weight")
    return [
        ("depth", depth, encoder.depth, size),
        *row("patch_embed.weight", 0, "width", size),
        *row("patch_embed.weight", 1, "channels", "take data of as many (--data.channels {})"),
        *row("patch_embed.weight", 3, "patch", "take --model.patch {}"),
        *row(
            "blocks.0.fc1.weight",
            0,
            "MLP width",
            f"take --model.mlp_ratio {len(mlp) / width if mlp is not None else 4:g}",
        ),
        *row(
            "label_embed.weight",
            0,
            "number of classes, the null class included,",
            "take --finetune all for other classes",
        ),
        *row("head.weight", 0, "number of outputs per token", _output_remedy(*outputs) if len(outputs) == 2 else ""),
    ]


def _size_flags(depth: int, width: int, encoder: Encoder) -> str:
    """Return the flags that give the model the depth and width of a file."""
    names = [name for name, dims in SIZES.items() if (dims["depth"], dims["width"]) == (depth, width)]
    published = {"depth": encoder.depth, "width": encoder.width, "heads": encoder.heads} in SIZES.values()
    if names and published:
        return f"take --model.size {names[0]}"
    if names:
        heads = SIZES[names[0]]["heads"]
        return f"take --model.depth {depth} --model.width {width} --model.heads {heads} (the published {names[0]})"
    if width == encoder.width:
        return f"take --model.depth {depth}"
    return f"take --model.depth {depth} --model.width {width}, and --model.heads as in its training"


def _output_remedy(stored: int, needed: int) -> str:
    """Return what to do about a head of another number of outputs."""
    if stored == 2 * needed:
        return "it predicts a variance too: take --noise.name ddpm"
    if needed == 2 * stored:
        return "it predicts no variance: take --noise.name edm or flow, the one that it was trained with"
    return "give weights that were trained for data of as many channels"


def fit_outputs(encoder: DiT | Encoder, state: State, spare: bool, declared: bool) -> str | None:
    """Leave the second half of the outputs out of `state` if it is spare, and return a line about that.

    SiT's trainer gives its networks twice the outputs (learn_sigma) and ignores the second half, whose weights stay at
    their initial zeros. A trained DDPM has other numbers there, so zeros tell a file of SiT's.

    spare: whether the run's noise process allows for twice the outputs. declared: whether the file states that it is
    SiT's.

    Raises ValueError if the file is SiT's and the outputs are not spare, or the other way round.
    """
    patch, channels = encoder.patch, encoder.channels
    keys = ("head.weight", "head.bias")
    if any(key not in state or len(state[key]) != 2 * patch**2 * channels for key in keys):
        return None
    halves = {key: state[key].unflatten(0, (patch**2, 2, channels)) for key in keys}
    first, second = (any(bool(value[:, i].any()) for value in halves.values()) for i in (0, 1))
    if spare:
        if second and not declared:
            raise ValueError(
                "the second half of its outputs, a learned variance, is not zero, as SiT's is; take --noise.name ddpm"
            )
        state |= {key: value[:, 0].flatten(0, 1) for key, value in halves.items()}
        return "left out the second half of its outputs, which SiT's networks have and do not use"
    if first and not second:
        raise ValueError(f"the second half of its outputs is zero, as in SiT's files; take {_SIT}")
    return None


def misfit(module: nn.Module, state: State) -> str | None:
    """Return how `state` differs from the module's tensors in names or shapes, in a few words; None if it does not."""
    expected = module.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        return f"{name} {'is missing' if name in expected else 'is not part of this model'}"
    for name, value in expected.items():
        if state[name].shape != value.shape:
            return f"{name} is {tuple(state[name].shape)}, this model needs {tuple(value.shape)}"
    return None


def number_of_blocks(state: State, blocks: str) -> int:
    """Return the number of blocks in a state dict whose names begin with `blocks`. Raises KeyError for none."""
    start = f"{blocks}."
    words = (key.removeprefix(start).split(".")[0] for key in state if key.startswith(start))
    found = [int(word) for word in words if word.isdecimal()]
    if not found:
        raise KeyError(f"{blocks}.0")
    return 1 + max(found)


def fit_labels(stored: Tensor, fresh: Tensor, declared: int | None, new_labels: bool) -> tuple[Tensor, str | None]:
    """Return the label table to start from, for a model with a null class, and a line if one is due.

    stored, fresh: the file's table and the model's initial one, whose last row is the null label's.
    declared: the file's number of classes, where it states one.
    new_labels: whether the classes are others than the file's, so that only the null row can come from it.
    """
    rows, classes = stored.shape[0], fresh.shape[0] - 1
    if stored.shape[1:] != fresh.shape[1:] or (rows == classes + 1 and not new_labels):  # `check_fits` sees to the rest
        return stored, None
    if declared is not None:
        has_null = rows > declared
    else:
        has_null = rows == classes + 1 or (rows != classes and rows not in USUAL_CLASSES)
    no_null = f"its label table of {rows} rows has no null class; a new null label is trained"
    if not new_labels:
        if has_null or rows != classes:
            return stored, None
        return torch.cat([stored, fresh[-1:].to(stored.dtype)]), no_null
    if not has_null:
        return fresh, no_null
    line = None if declared is not None else f"the last of its {rows} label rows is taken as the null label"
    return torch.cat([fresh[:-1], stored[-1:].to(fresh.dtype)]), line


def fit_positions(encoder: Encoder, positions: Tensor) -> str | None:
    """Return a line if the file's position table is that of another grid than the model's.

    Raises ValueError if it is not the sin-cos table of any grid. Tables are compared up to rounding.
    """
    tokens, width = positions[..., 0].numel(), positions.shape[-1]
    if width != encoder.width:
        raise ValueError(f"pos_embed has {width} features, this model's width is {encoder.width}")
    shapes = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    shapes.sort(key=lambda grid: (grid != encoder.grid, abs(math.log(grid[0] / grid[1]))))
    tolerance = 1e-5 if positions.dtype == torch.float32 else 1e-2
    for grid in shapes:
        if torch.allclose(positions.float().reshape(tokens, width), sincos_positions(grid, width), atol=tolerance):
            return other_grid(grid, encoder.grid)
    raise ValueError(
        "pos_embed is no sin-cos table; a DiT of fastdit has computed positions and cannot take learned ones"
    )


def other_grid(stored: tuple[int, int], needed: tuple[int, int]) -> str | None:
    """Return a line if weights were trained on another grid of patches than the model's."""
    if stored == needed:
        return None
    before, now = ("x".join(map(str, grid)) for grid in (stored, needed))
    return f"it was trained on {before} patches, and this model has {now}; the positions are computed anew"
