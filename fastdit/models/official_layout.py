"""Convert the weights of a DiT between our layout and the original DiT's, bit for bit."""

from collections.abc import Iterator

import torch

from fastdit.errors import UserError

from .dit import DiT
from .embeddings import sincos_positions
from .weight_files import State
from .weight_fit import ATTENTION, number_of_blocks

_OFFICIAL_TOP = {
    "patch_embed": "x_embedder.proj",
    "time_embed.fc1": "t_embedder.mlp.0",
    "time_embed.fc2": "t_embedder.mlp.2",
    "head": "final_layer.linear",
}
_OFFICIAL_BLOCK = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
OFFICIAL_LABELS = "y_embedder.embedding_table.weight"


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
    return {"pos_embed": sincos_positions(grid, state["patch_embed.weight"].shape[0])[None], **rename(state)}


def check_official(network: DiT) -> None:
    """Raise UserError, as `to_official` does, if the original layout has no place for what attention has beside it."""
    present = {"model.qk_norm": network.qk_norm, "model.rope": network.rope is not None}
    for flag, on, _ in ATTENTION.values():
        if present[flag]:
            raise UserError(f"{flag} {on}: the original DiT's layout has no place for it; export safetensors instead")


def rename(state: State) -> State:
    """Convert ours to official, on the CPU, without positions, time frequencies or what attention has beside its GEMMs.

    Raises KeyError for a missing key.
    """
    depth, width = number_of_blocks(state, "blocks"), state["patch_embed.weight"].shape[0]
    official = {key: state[ours].detach().cpu() for ours, key in _official_keys(depth)}
    for leaf in ("weight", "bias"):
        parts = state[f"adaln.{leaf}"].detach().cpu().split([6 * width] * depth + [2 * width])
        official |= {f"{module}.{leaf}": part for module, part in zip(_official_adaln(depth), parts)}
    return official


def _official_keys(depth: int) -> Iterator[tuple[str, str]]:
    """Yield (our name, official name) of every tensor that only changes its name."""
    yield "label_embed.weight", OFFICIAL_LABELS
    modules = list(_OFFICIAL_TOP.items())
    for i in range(depth):
        modules += [(f"blocks.{i}.{ours}", f"blocks.{i}.{key}") for ours, key in _OFFICIAL_BLOCK.items()]
    for ours, key in modules:
        for leaf in ("weight", "bias"):
            yield f"{ours}.{leaf}", f"{key}.{leaf}"


def _official_adaln(depth: int) -> list[str]:
    """Return the official modules whose rows, in this order, are our one `adaln` Linear."""
    return [f"{module}.adaLN_modulation.1" for module in (*(f"blocks.{i}" for i in range(depth)), "final_layer")]
