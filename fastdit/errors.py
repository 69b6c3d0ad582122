"""Define the exception that a command turns into one line for the user, and a check of numbers that raises it."""

import errno
import math
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from typing import NoReturn

EXIT_CODE = 2
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
CLOSED_PIPE = 141  # exit code when nobody reads stdout any more, as shells have it
LARGEST = 2**63 - 1  # whole number that PyTorch takes


# What to do about errors of the system that no code can avoid.
REMEDIES = {
    errno.ENOSPC: "free some space, and run the command again",
    errno.EDQUOT: "free some space or get a larger quota, and run the command again",
    errno.EFBIG: "allow larger files (ulimit -f), and run the command again",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.EIO: "check the disk",
    errno.ESTALE: "see whether the network file system is mounted",
}


class UserError(Exception):
    """Input that the user can mend. Its text is one line: the file or field, what is wrong, what to do."""


def explain(error: OSError, path: object = None) -> UserError | None:
    """Return an error of the system as a UserError, or None if a mistake in the code may be its cause.

    It names the file of `error`, else `path`. Without either, only a failing disk is explained.
    """
    named = error.filename if isinstance(error.filename, str | os.PathLike) else path
    if error.errno not in REMEDIES or (named is None and error.errno in (errno.EACCES, errno.EPERM)):
        return None
    where = "a file" if named is None else named
    return UserError(f"{where}: cannot be read or written ({os.strerror(error.errno)}); {REMEDIES[error.errno]}")


def _explain_memory(error: RuntimeError) -> UserError | None:
    """Return an error of torch that memory ran out as a UserError, or None if `error` is another one."""
    text = str(error)
    if "out of memory" not in text and "can't allocate memory" not in text:
        return None
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    return UserError(
        f"out of memory{f': {asked[1]} more are not free' if asked else ''}; end what else uses the device, or in "
        "training lower --micro_batch, set --model.grad_checkpoint blocks, or take a higher ZeRO stage"
    )


def a_few(names: Iterable[str], most: int = 3) -> str:
    """Return the first `most` names in words, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


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
    """Run a command and leave the process: code 0, 2 and one line on stderr for a UserError, or 130 after Ctrl-C."""
    from fastdit.launchers import adopt_rank

    try:
        if signal.getsignal(signal.SIGINT) is leave_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        adopt_rank()
        body(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except UserError as error:
        _fail(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():  # `| head` has seen enough
            os._exit(CLOSED_PIPE)
        if (explained := explain(error)) is None:
            raise
        _fail(explained)
    except RuntimeError as error:
        if explained := _explain_memory(error):
            _fail(explained)
        if "Connection closed by peer" not in str(error) and "Connection reset by peer" not in str(error):
            raise
        print(f"rank {os.environ.get('RANK')} ends: another rank has left", file=sys.stderr, flush=True)
        _leave(EXIT_CODE)
    sys.exit(0)


def _stdout_is_closed() -> bool:
    """Return whether stdout is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(error: UserError) -> NoReturn:
    """Print an error in one line, and end the process."""
    rank = int(os.environ.get("RANK", 0))
    if rank:  # most errors meet every rank: rank 0 speaks, and the launcher ends the others while they wait
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(f"\nerror: {error}" + (f" (rank {rank})" if rank else ""), file=sys.stderr, flush=True)
    _leave(EXIT_CODE)


def leave_at_once(*args) -> NoReturn:
    """End the process after Ctrl-C while it still imports its modules, when nothing is begun."""
    os._exit(INTERRUPTED)


def _leave(code: int) -> NoReturn:
    """End the process without the clean-up of other modules, which may wait for other ranks in a collective."""
    with suppress(OSError):  # stdout may be a file on a full disk
        sys.stdout.flush()
    os._exit(code)
