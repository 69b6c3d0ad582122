"""fastdit: fast training of class-conditional diffusion transformers, with SD-DiT and SADM.

    run = fastdit.load("runs/quickstart")  # a run, at its newest checkpoint
    images = run.sample(classes=["Coat"], n=8, guidance=2.0, seed=0)  # uint8 (n, H, W, C)
    model = fastdit.from_pretrained("dit.safetensors")  # a network from a file of weights
    network = fastdit.DiT(input_size=32, patch=2, channels=4, width=384, depth=12, heads=6, classes=1000)

`fastdit.api` documents them. They are imported when they are first used, so that `import fastdit` takes no time.
"""

import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdit.api import Pretrained, Run, from_pretrained, load
    from fastdit.errors import UserError
    from fastdit.evaluation.model import Model
    from fastdit.models import DiT

__version__ = "0.1.0"
__all__ = ["DiT", "Model", "Pretrained", "Run", "UserError", "from_pretrained", "load"]

# Modules of the public names; that of the others is fastdit.api.
_PLACES = {"DiT": "fastdit.models", "UserError": "fastdit.errors", "Model": "fastdit.evaluation.model"}


def __getattr__(name: str) -> object:
    """Return a public name, whose module is imported now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACES.get(name, "fastdit.api")), name)
    return value


def __dir__() -> list[str]:
    """Return the names in this module, with those that are not imported yet."""
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Return whether this process runs one of fastdit's own commands, and not a program that imports fastdit."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    return program.name.startswith("fastdit-") or program.resolve().parent == Path(__file__).resolve().parent


# The commands import for seconds. Ctrl-C meanwhile would print a traceback; `run_command` takes over afterwards.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    and _is_command()
):
    from fastdit.errors import leave_at_once

    signal.signal(signal.SIGINT, leave_at_once)
