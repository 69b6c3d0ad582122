"""The one exception that a command turns into a single line for the user."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

EXIT_CODE = 2


class UserError(Exception):
    """Input that the user can mend. Its text is one line: the file or field, what is wrong, what to do."""


def run_command(body: Callable[[list[str]], None], argv: list[str] | None = None) -> NoReturn:
    """Run a command and leave the process: code 0, or 2 and one line on stderr for a UserError."""
    try:
        body(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:  # most errors meet every rank: rank 0 speaks, and the launcher ends the others while they wait
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        print(f"\nerror: {error}" + (f" (rank {rank})" if rank else ""), file=sys.stderr, flush=True)
        _leave()
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error) and "Connection reset by peer" not in str(error):
            raise
        print(f"rank {os.environ.get('RANK')} ends: another rank has left", file=sys.stderr, flush=True)
        _leave()
    sys.exit(0)


def _leave() -> NoReturn:
    sys.stdout.flush()
    os._exit(EXIT_CODE)  # other ranks may wait in a collective: no clean-up that could wait for them
