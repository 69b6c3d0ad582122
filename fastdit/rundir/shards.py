"""Keep named tensors in pieces: safetensors files that any number of ranks can write, and any other number can read.

A file holds one kind of state of one rank, such as `exp_avg-00003-of-00008.safetensors`. Its tensor NAME is a run of
elements of the flattened tensor NAME. The file's metadata tells where the run starts, and the shape of the whole.
Reading needs neither pickle nor torch.distributed, and loads no more than the elements that are asked for.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdit.errors import UserError
from fastdit.files import save_tensors


class Piece(NamedTuple):
    """Hold a run of elements of a tensor.

    Args:
        name: the name of the tensor.
        shape: the shape of the whole tensor.
        start: the number of elements before the run, in the flattened tensor.
        values: the run, 1-D, on any device.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


def write_pieces(folder: Path, kind: str, rank: int, world: int, pieces: Iterable[Piece]) -> Path:
    """Write pieces of the state `kind` as the file of `rank`, and return it. Each name may come once.

    All pieces are copied to the host at once. A folder must hold the files of one number of ranks only.
    """
    tensors, places = {}, {}
    for piece in pieces:
        tensors[piece.name] = piece.values.detach().to("cpu", copy=True)
        places[piece.name] = [piece.start, list(piece.shape)]
    path = folder / f"{kind}-{rank:05d}-of-{world:05d}.safetensors"
    save_tensors(tensors, path, {"places": json.dumps(places)})
    return path


@dataclass
class _Tensor:
    """Hold the shape of a whole tensor, and its pieces: (start, length, file)."""

    shape: tuple[int, ...]
    pieces: list[tuple[int, int, Path]] = field(default_factory=list)


class PieceReader:
    """Read tensors, or any runs of their elements, from the files in `folder`. Raises UserError if one is unreadable.

    Attributes:
        kinds: the kinds of state in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, safe_open] = {}
        self._tensors: dict[str, dict[str, _Tensor]] = {}
        for path in sorted(folder.glob("*-of-*.safetensors")):
            self._index(path, self._tensors.setdefault(path.name.rsplit("-", 3)[0], {}))
        self.kinds = list(self._tensors)

    def _index(self, path: Path, tensors: dict[str, _Tensor]) -> None:
        """Note the pieces in a file. Raises UserError."""
        try:
            file = self._files[path] = safe_open(path, framework="pt")
            places = json.loads(file.metadata()["places"])
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                start, shape = places[name]
                (length,) = file.get_slice(name).get_shape()
                if start < 0 or start + length > prod(shape):
                    raise ValueError(f"{name} has elements {start} to {start + length} of {prod(shape)}")
                tensor = tensors.setdefault(name, _Tensor(tuple(shape)))
                if tensor.shape != tuple(shape):
                    raise ValueError(f"{name} has shape {shape}, elsewhere {list(tensor.shape)}")
                tensor.pieces.append((start, length, path))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read ({error}); use another checkpoint") from None

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors of a kind, by name."""
        return {name: tensor.shape for name, tensor in self._tensors.get(kind, {}).items()}

    def read(self, kind: str, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Return elements of a flattened tensor, 1-D, on the CPU in their own dtype; all from `start` on by default.

        Raises UserError if the files do not hold all of them.
        """
        # Find the pieces that hold the elements. They may overlap, since ranks may hold the same.
        tensor = self._tensors.get(kind, {}).get(name)
        if tensor is None:
            raise UserError(f"{self.folder}: holds no {kind} of {name}; use another checkpoint")
        stop = prod(tensor.shape) if length is None else start + length
        runs, at = [], start
        for begin, count, path in sorted(tensor.pieces):
            if begin <= at < begin + count and at < stop:
                end = min(begin + count, stop)
                runs.append((path, at - begin, end - begin))
                at = end
        if at < stop:
            raise UserError(f"{self.folder}: lacks elements {at} to {stop} of the {kind} of {name}; use another one")

        # Read them.
        parts = [self._files[path].get_slice(name)[first:last] for path, first, last in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def read_whole(self, kind: str, name: str) -> Tensor:
        """Return a tensor in its shape, on the CPU. Raises UserError as `read` does."""
        return self.read(kind, name).view(self._tensors[kind][name].shape)
