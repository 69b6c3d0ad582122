"""fastdit: fast training of class-conditional diffusion transformers, with SD-DiT and SADM."""

import signal
import sys
import threading
from pathlib import Path

__version__ = "0.1.0"


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
