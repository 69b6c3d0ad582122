"""Write nested dictionaries of tensors and numbers as safetensors, and read them back without pickle.

The tensors of the state are the file's, numbered. Everything else is JSON in its metadata, in which a tensor is
`{"tensor": "3"}`, a dictionary is `{"items": [[key, value], ...]}`, and tuples become lists.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdit.errors import UserError
from fastdit.files import save_tensors


def save_state(state: object, path: Path) -> None:
    """Write a state of dictionaries, lists, tuples, tensors, strings, numbers, booleans and None.

    Keys of dictionaries are strings or numbers. Raises TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encoded(state, tensors))
    save_tensors(tensors, path, {"structure": structure})


def load_state(path: Path) -> object:
    """Return what `save_state` wrote, with its tensors on the CPU. Raises UserError if the file cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return _decoded(json.loads(file.metadata()["structure"]), file)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use another checkpoint") from None


def count_bytes(state: object) -> int:
    """Return the bytes of the tensors in a state that `save_state` takes."""
    if isinstance(state, Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(count_bytes, parts))


def _encoded(state: object, tensors: dict[str, Tensor]) -> object:
    """Return the state as JSON, and add its tensors to `tensors`."""
    if isinstance(state, Tensor):
        name = str(len(tensors))
        tensors[name] = state.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(state, dict):
        return {"items": [[key, _encoded(value, tensors)] for key, value in state.items()]}
    if isinstance(state, list | tuple):
        return [_encoded(value, tensors) for value in state]
    if state is None or isinstance(state, str | bool | int | float):
        return state
    raise TypeError(f"a checkpoint cannot hold {type(state).__name__}")


def _decoded(value: object, file) -> object:
    """Return the state of which `value` is the JSON and `file` holds the tensors."""
    if isinstance(value, dict):
        if "tensor" in value:
            return file.get_tensor(value["tensor"])
        return {key: _decoded(item, file) for key, item in value["items"]}
    return [_decoded(item, file) for item in value] if isinstance(value, list) else value
