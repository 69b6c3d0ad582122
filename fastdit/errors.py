"""Define the exception that a command turns into one line for the user, and a check of numbers that raises it."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from typing import NoReturn

EXIT_CODE = 2
LARGEST = 2**63 - 1  # whole number that PyTorch takes


class UserError(Exception):
    """Input that the user can mend. Its text is one line: the file or field, what is wrong, what to do."""


def check_ranges(settings: object, group: str, ranges: dict[str, tuple[float, ...]]) -> None:
    """Raise UserError for the first number in the dataclass `settings` that is out of its range.

    Fields without a range must be finite. In a pair each number must be in the range; null and words are no numbers.

    group: prefix of the flags, with its dot. ranges: (smallest,) or (smallest, largest), by names of fields with blanks
    between them.
    """
    by_field = {name: limits for names, limits in ranges.items() for name in names.split()}
    for field in fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                _check_range(f"{group}{field.name}", number, *by_field.get(field.name, ()))


def _check_range(flag: str, number: float, low: float = -math.inf, high: float | None = None) -> None:
    most = high if high is not None else LARGEST if isinstance(number, int) else math.inf
    if isinstance(number, float) and not math.isfinite(number):
        raise UserError(f"{flag}: must be a finite number, got {number}")
    if low <= number <= most:
        return
    if high is not None:
        bounds = f"from {low} to {high}"
    else:
        bounds = f"at least {low}" if number < low else f"at most {most}"
    raise UserError(f"{flag}: must be {bounds}, got {number}")


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
