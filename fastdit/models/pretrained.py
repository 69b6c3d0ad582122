"""Read DiT checkpoints of other projects, and write the original layout, bit for bit.

There are three layouts, all plain dicts of tensors:

    official    the original DiT's .pt: a state dict, or {"model", "ema", ...}; an adaLN Linear in every block
    diffusers   DiTTransformer2DModel: split q, k, v; the (t, y) embedder repeated in every block
    ours        `DiT.state_dict()`: all adaLN projections stacked in one Linear

`weight_files` reads files, `weight_entries` finds the weights in them, and `weight_fit` checks that they fit.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastdit.errors import UserError

from .diffusers_layout import DIFFUSERS_WEIGHT, from_diffusers, read_folder
from .dit import SIZES, DiT, Encoder
from .encoder_decoder import EncoderDecoder
from .official_layout import from_official, to_official
from .weight_entries import (
    Read,
    choose_entry,
    declared_classes,
    declared_noise,
    find_entries,
    unnamed_averages,
    without_additions,
)
from .weight_files import State, read_content
from .weight_fit import (
    USUAL_CLASSES,
    check_finite,
    check_fits,
    fit_labels,
    fit_outputs,
    fit_positions,
    number_of_blocks,
    other_grid,
)

__all__ = ["from_diffusers", "from_official", "load_checkpoint", "open_network", "save_official", "to_official"]


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
        read = read_weights(path, weights)
        state, lines = read.state, read.lines
        if read.noise is not None:
            check_noise(read.noise)
        if encoder is model and "encoder.patch_embed.weight" in state:
            raise ValueError("it holds an extra decoder, no plain DiT; take --method sd_dit --sd_dit.decoder extra")
        if read.heads not in (None, encoder.heads) and state["patch_embed.weight"].shape[0] == encoder.width:
            raise ValueError(
                f"number of heads is {read.heads} in config.json, {encoder.heads} in this model; "
                f"take --model.heads {read.heads}"
            )
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
        check_finite(state)
        if read.positions is not None:
            lines.append(fit_positions(encoder, read.positions))
        lines.append(other_grid(read.grid, encoder.grid) if read.grid else None)
    except KeyError as missing:
        raise UserError(f"{path}: {missing.args[0]} is missing; this is not a whole DiT checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    model.load_state_dict(state)
    for line in filter(None, lines):
        say(f"{path}: {line}")


def read_weights(path: Path, weights: str | None = None) -> Read:
    """Return the weights in a file, or in a folder of diffusers, in our layout; `load_checkpoint` tells the arguments.

    Raises KeyError for a missing tensor, and OSError or ValueError if the file cannot be read or is no DiT's.
    """
    return read_folder(path, weights) if path.is_dir() else _read_file(path, weights)


def open_network(
    path: str | Path,
    *,
    weights: str | None = None,
    heads: int | None = None,
    size: tuple[int, int] | None = None,
    classes: int | None = None,
    check_noise: Callable[[dict | None], bool] = lambda trained: False,
    say: Callable[[str], None] = lambda line: None,
) -> DiT:
    """Return the DiT that a checkpoint in any of the three layouts holds, with its weights, on the CPU, in eval mode.

    Args:
        path, weights, say: as in `load_checkpoint`.
        heads: number of attention heads; None takes the file's, or the published size's of this depth and width.
        size: height and width of the samples; None takes the file's.
        classes: number of classes, the null class not counted; None takes the file's, or guesses from the rows.
        check_noise: called with the noise process that the file states, or None. It returns whether twice the outputs
            are spare, as `load_checkpoint` has it.

    Raises UserError if it cannot be read, is no plain DiT, or lacks `heads` or `size` and they are not given.
    """
    path = Path(path)
    try:
        read = read_weights(path, weights)
        if "encoder.patch_embed.weight" in read.state:
            raise ValueError("it holds SD-DiT's extra decoder, no plain DiT; take fastdit.load of its run")
        spare = check_noise(read.noise)
        network, state = _network_for(read, heads, size, classes, spare)
        line = fit_outputs(network, state, spare, read.noise is not None)
        check_fits(network, state)
        positions = fit_positions(network, read.positions) if read.positions is not None else None
    except KeyError as missing:
        raise UserError(f"{path}: {missing.args[0]} is missing; this is not a whole DiT checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    network.load_state_dict(state)
    for text in filter(None, (*read.lines, line, positions)):
        say(f"{path}: {text}")
    return network.eval()


def _network_for(
    read: Read, heads: int | None, size: tuple[int, int] | None, classes: int | None, spare: bool
) -> tuple[DiT, State]:
    """Return a DiT of the sizes that weights tell, with its initial weights, and the weights.

    Raises KeyError for a missing weight, and ValueError if the number of heads or the size is not known.
    """
    # Read the sizes off the tensors.
    state = read.state
    width, channels, _, patch = state["patch_embed.weight"].shape
    depth, rows = number_of_blocks(state, "blocks"), len(state["label_embed.weight"])
    outputs = len(state["head.weight"]) // patch**2
    published = {(dims["depth"], dims["width"]): dims["heads"] for dims in SIZES.values()}
    heads = heads or read.heads or published.get((depth, width))
    if heads is None:
        raise ValueError(f"no number of attention heads is known for depth {depth} and width {width}; give heads=")
    if size is None:
        grid = read.grid or _square(read.positions)
        if grid is None:
            raise ValueError("it does not tell the size of its samples; give size=")
        size = (grid[0] * patch, grid[1] * patch)

    # A file without a null class has as many rows as classes.
    known = classes or read.classes or rows - (rows not in USUAL_CLASSES)
    if rows not in (known, known + 1):
        raise ValueError(f"its label table has {rows} rows, which {known} classes have not")
    network = DiT(
        input_size=size,
        patch=patch,
        channels=channels,
        out_channels=channels if spare else outputs,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=len(state["blocks.0.fc1.weight"]) / width,
        classes=known,
        null_class=rows > known,
        qk_norm="blocks.0.q_norm" in state,
        rope="rope.theta" in state,
    )
    return network, state


def _square(positions: Tensor | None) -> tuple[int, int] | None:
    """Return the grid of a position table (..., patches, width), or None if it is no square."""
    side = 0 if positions is None else math.isqrt(positions.shape[-2])
    return (side, side) if side and side**2 == positions.shape[-2] else None


def save_official(state: State, path: str | Path, *, grid: tuple[int, int]) -> None:
    """Write a state dict in our layout as an original DiT's .pt file.

    grid: the model's `grid`, for its position table. Raises KeyError and UserError as `to_official` does.
    """
    torch.save(to_official(state, grid), path)


def _for_encoder(encoder: Encoder, state: State) -> State:
    """Return a DiT's state with exactly the tensors of `encoder`, whose extra weights stay as they are."""
    if not isinstance(encoder, DiT):
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    present = encoder.state_dict()
    for key in ("class_token.weight", "gains.weight"):
        if key in present and key not in state:
            state[key] = present[key]
    return state


def _read_file(path: Path, weights: str | None) -> Read:
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
    if DIFFUSERS_WEIGHT in state:
        raise ValueError("it holds weights of diffusers; give the folder with this file and its config.json")
    if "x_embedder.proj.weight" not in state:
        return Read(state, lines)
    noise = declared_noise(content, entry.state)
    return Read(from_official(state), lines, state["pos_embed"], declared_classes(content), noise)


def _holds_tensors(content: dict) -> bool:
    """Return whether a dict, or one of the dicts in it, holds nothing but tensors. An empty one does."""
    dicts = [content, *(value for value in content.values() if isinstance(value, dict))]
    return any(all(isinstance(value, Tensor) for value in part.values()) for part in dicts)
