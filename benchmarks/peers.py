"""Other projects' DiT classes, imported from a local clone of theirs. None of their code is part of this project."""

import importlib.util
from pathlib import Path

from torch import nn

from fastdit.errors import UserError
from fastdit.run_parts import Shape

# The clone's file with the class `DiT`: the same in both, but fast-DiT's recomputes each block in the backward pass.
FILES = {"facebookresearch": "models.py", "fast-dit": "models.py"}


def load_peer(name: str, folder: str) -> type[nn.Module]:
    """The class `DiT` of a clone of `name`, a key of FILES. Raises UserError."""
    flag = f"--against peer:{name}:{folder}"
    if name not in FILES:
        raise UserError(f"{flag}: {name!r} is unknown; choose of {', '.join(FILES)}")
    path = Path(folder) / FILES[name]
    if not path.is_file():
        raise UserError(f"{flag}: holds no {path.name}; give the folder of a clone")
    spec = importlib.util.spec_from_file_location(f"peer_{name.replace('-', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.DiT
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise UserError(f"{flag}: needs {error.name}, fastdit does not; pip install {package}") from None
    except Exception as error:  # it is theirs: anything may happen
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{flag}: {path.name} gives no class DiT ({reason}); give a clone that works here") from None


def build_peer(kind: type[nn.Module], dims: dict[str, int], mlp_ratio: float, patch: int, shape: Shape, out: int):
    """The peer's model of these sizes: width, depth, heads; `out` channels. Raises UserError where it has no such."""
    if shape.height != shape.width:
        raise UserError(f"--against peer: takes square images only, not {shape.height}x{shape.width}")
    if out not in (shape.channels, 2 * shape.channels):
        raise UserError(f"--against peer: makes {shape.channels} or {2 * shape.channels} channels, not {out}")
    return kind(
        input_size=shape.height,
        patch_size=patch,
        in_channels=shape.channels,
        hidden_size=dims["width"],
        depth=dims["depth"],
        num_heads=dims["heads"],
        mlp_ratio=mlp_ratio,
        num_classes=shape.classes,
        learn_sigma=out != shape.channels,
    )
