"""Find a DiT's weights in what a checkpoint file holds: in containers, under prefixes, beside other weights.

Training scripts write `{"model": ..., "ema": ..., "opt": ...}`, `{"state_dict": ...}`, and the like, nested in any way,
and wrappers of a network (DDP, torch.compile, FSDP, EMA classes) put words before or into the names of its weights.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .weight_files import State

# One weight of each layout. What stands before it in a name stands before all names. The order matters.
_MARKERS = ("encoder.patch_embed.weight", "patch_embed.weight", "x_embedder.proj.weight", "pos_embed.proj.weight")
# Words that DDP, torch.compile, FSDP and gradient checkpointing put into names, at any place.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_EMA = re.compile(r"(?<![a-z])(?<!non_)(?<!no_)(ema|averaged?)(?![a-z])", re.IGNORECASE)
# Tensors that training adds to a DiT and sampling does not need, and where they come from.
_ADDITIONS = {
    re.compile(r"projectors?\."): "REPA's projectors",
    re.compile(r"(n_averaged|initted|step|num_updates|decay)$"): "an EMA's counters",
}
# Values of `path_type` and `prediction` in the arguments of SiT's and REPA's trainers: those that mean a convention of
# Flow, and those that no process of fastdit has.
_CONVENTIONS = {("Linear", "velocity"): "sit", ("linear", "v"): "repa"}
_OTHER_FLOWS = {(path, prediction) for path in ("GVP", "VP") for prediction in ("velocity", "noise", "score")}
_OTHER_FLOWS |= {("Linear", "noise"), ("Linear", "score"), ("cosine", "v")}
_DEEPEST = 8  # containers in containers


@dataclass(frozen=True)
class Entry:
    """Hold one set of a DiT's weights in a file.

    Args:
        name: where it is in the file, such as "ema" or "state_dict.model"; empty if the file holds nothing else.
        state: the weights, by names without prefixes.
    """

    name: str
    state: State

    @property
    def is_ema(self) -> bool:
        """Return whether the name says that these are EMA weights."""
        return bool(_EMA.search(self.name))

    def answers(self, word: str) -> bool:
        """Return whether `--init_weights word` may mean this entry."""
        return word in (self.name, *self.name.split(".")) or (word == "ema" and self.is_ema)


class Read(NamedTuple):
    """Hold weights in our layout, and what their file tells beside them.

    lines: what a user should know. The others are None if the file does not state them: the position table, the number
    of classes, name and settings of the noise process, the number of attention heads, and the grid of patches.
    """

    state: State
    lines: list[str | None]
    positions: Tensor | None = None
    classes: int | None = None
    noise: dict[str, str] | None = None
    heads: int | None = None
    grid: tuple[int, int] | None = None


def find_entries(content: object) -> list[Entry]:
    """Return all sets of a DiT's weights in the content of a file, in its order."""
    return _find(content, "", 0)


def _find(content: object, place: str, depth: int) -> list[Entry]:
    """Return the entries in a part of a file, which is found at `place`."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return []
    # Sort the tensors of this container by the prefixes under which there is a DiT.
    tensors = {
        ".".join(word for word in key.split(".") if word not in _WRAPPERS): value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    states: dict[str, State] = {prefix: {} for key in tensors if (prefix := _prefix(key)) is not None}
    for key, value in tensors.items():
        fitting = [prefix for prefix in states if key.startswith(prefix)]
        if fitting:
            prefix = max(fitting, key=len)
            states[prefix][key.removeprefix(prefix)] = value
    found = [Entry(_join(place, prefix.rstrip(".")), state) for prefix, state in states.items()]

    # Look into the containers in this one.
    for key, value in content.items():
        if isinstance(key, str):
            found += _find(value, _join(place, key), depth + 1)
    return found


def _prefix(key: str) -> str | None:
    """Return what stands before the name of a weight that tells a DiT, with its dot; None for other weights."""
    for marker in _MARKERS:
        if key == marker or key.endswith(f".{marker}"):
            return key[: -len(marker)]
    return None


def _join(place: str, name: str) -> str:
    return ".".join(filter(None, (place, name)))


def choose_entry(entries: list[Entry], word: str | None) -> tuple[Entry, str | None]:
    """Return the entry that `word` names, else the EMA weights, else the first; and a line that says which it is.

    The line is None if the file leaves no choice. Raises ValueError if `word` names none of them.
    """
    fitting = [entry for entry in entries if word is None or entry.answers(word)]
    names = [entry.name or "(without a name)" for entry in entries]
    if not fitting:
        raise ValueError(f"it holds no weights called {word!r}, only {', '.join(names)}; change --init_weights")
    fitting.sort(key=lambda entry: (entry.name != word, word is None and not entry.is_ema))
    entry = fitting[0]
    others = [name for name, other in zip(names, entries) if other is not entry]
    if not entry.name and not others:
        return entry, None
    line = f"starting from its {'EMA weights' if entry.is_ema else 'weights'}, {entry.name or 'which have no name'}"
    if others:
        return entry, f"{line}; --init_weights chooses others: {', '.join(others)}"
    return entry, line if entry.is_ema else f"{line}; it holds no EMA weights"


def without_additions(state: State) -> tuple[State, list[str]]:
    """Return the weights without those that training methods are known to add, and a line for each kind of these."""
    lines = []
    for pattern, origin in _ADDITIONS.items():
        added = [key for key in state if pattern.match(key)]
        state = {key: value for key, value in state.items() if key not in added}
        if added:
            lines.append(f"left out {len(added)} tensors that a DiT does not have: {origin} ({added[0]}, ...)")
    return state, lines


def declared_classes(content: object) -> int | None:
    """Return the number of classes that the file's training arguments state, without a null class; None if unknown."""
    classes = _arguments(content).get("num_classes")
    return classes if isinstance(classes, int) and not isinstance(classes, bool) and classes > 0 else None


def unnamed_averages(content: object, place: str = "", depth: int = 0) -> str | None:
    """Return where in a file there is a list of tensors called `shadow_params`, as EMA classes save it, or None."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return None
    for key, value in content.items():
        if key == "shadow_params" and isinstance(value, list):
            return _join(place, key)
        if isinstance(key, str) and (found := unnamed_averages(value, _join(place, key), depth + 1)):
            return found
    return None


def declared_noise(content: object, state: State) -> dict[str, str] | None:
    """Return name and convention of the noise process that a file of SiT's or REPA's trainer states, or None.

    Its arguments state it, or REPA's projectors among the weights, `state`.

    Raises ValueError if they state a path or a prediction that no process of fastdit has.
    """
    arguments = _arguments(content)
    path, prediction = (str(arguments.get(name)) for name in ("path_type", "prediction"))
    if (path, prediction) in _OTHER_FLOWS:
        raise ValueError(
            f"it was trained on the path {path} to predict {prediction}; fastdit has the linear path and velocities "
            "alone: give weights that were trained so"
        )
    convention = _CONVENTIONS.get((path, prediction))
    if convention is None and any(key.startswith("projectors.") for key in state):
        convention = "repa"
    return convention and {"name": "flow", "convention": convention}


def _arguments(content: object) -> Mapping:
    """Return the training arguments in the content of a file, empty if there are none."""
    arguments = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return arguments if isinstance(arguments, Mapping) else {}
