"""Let the ranks of a run find each other: choose the port, wait for all ranks, and form the process group.

Under the `deepspeed` launcher on one node, rank 0 takes another port where the default one is in use. It writes the
port into a file, which is named after the launcher's process and which the other ranks wait for.
"""

import errno
import os
import socket
import stat
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from fastdit.errors import UserError

DEEPSPEED_PORT = 29500  # what the launcher takes without --master_port
TIMEOUT = "FASTDIT_START_TIMEOUT"  # environment variable: seconds that ranks wait for each other at the start
DEFAULT_TIMEOUT = 600.0
LONGEST = 1_000_000
LAUNCHER = "deepspeed.launcher.launch"


def join(backend: str) -> None:
    """Form the process group of all ranks, whose places and address are in the environment, unless there is one.

    Raises UserError if the port cannot be used, or if a rank does not start in time.
    """
    from deepspeed.constants import default_pg_timeout  # 30 minutes, or DEEPSPEED_TIMEOUT

    if dist.is_initialized():
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    end = time.monotonic() + start_timeout()
    published = _published_port()
    if published and rank:
        os.environ["MASTER_PORT"] = _read_port(published, end)
    try:
        store = _open_store(rank, world, end, free=(published is not None or world == 1) and not _port_is_chosen())
        if published and not rank:
            _write_port(published, os.environ["MASTER_PORT"])
        _wait_for_all(store, rank, world, end)
    finally:
        if published and not rank:
            published.unlink(missing_ok=True)
    store.set_timeout(default_pg_timeout)
    options = {"rank": rank, "world_size": world, "timeout": default_pg_timeout}
    dist.init_process_group(backend, store=store, **options)


def start_timeout() -> float:
    """Return the seconds that ranks wait for each other at the start. Raises UserError."""
    text = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    with suppress(ValueError):
        if 0 < float(text) < LONGEST:
            return float(text)
    raise UserError(f"{TIMEOUT}={text}: must be a number of seconds above 0 and below {LONGEST:,}")


def _open_store(rank: int, world: int, end: float, free: bool) -> dist.Store:
    """Return the store of the run's rank 0, or of `torchrun`; `free` allows rank 0 another port. Raises UserError."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun serves
    if serves and port and not _is_free(port):
        if not free:
            raise UserError(
                f"port {port} of {address}: is in use; give another one, with --master_port to deepspeed or torchrun, "
                "or as MASTER_PORT"
            )
        port = 0
    elif not serves:
        _wait_for_server(address, port, end)
    try:
        waiting = timedelta(seconds=max(1.0, end - time.monotonic()))
        store = dist.TCPStore(address, port, world, serves, timeout=waiting, wait_for_workers=False)
    except dist.DistError as error:
        raise UserError(f"MASTER_ADDR {address}, MASTER_PORT {port}: {_first_line(error)}; give others") from error
    os.environ["MASTER_PORT"] = str(store.port)
    return dist.PrefixStore(f"fastdit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _is_free(port: int) -> bool:
    """Return whether this machine can listen on a port. torch would log several lines for one in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def _wait_for_server(address: str, port: int, end: float) -> None:
    """Wait until rank 0, or `torchrun`, listens. torch would log a stack for each failed attempt. Raises UserError."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                where = f"MASTER_ADDR {address}, MASTER_PORT {port}"
                raise UserError(f"{where}: {_unreachable()} ({error.strerror or error})") from None
        time.sleep(0.1)


def _first_line(error: Exception) -> str:
    """Return the first line of an exception's text."""
    return str(error).splitlines()[0]


def _unreachable() -> str:
    """Return the message about a rank 0 that does not answer."""
    return (
        f"rank 0 was not reached within {start_timeout():g} s; see why it has not started, or wait longer with "
        f"{TIMEOUT}=SECONDS"
    )


def _wait_for_all(store: dist.Store, rank: int, world: int, end: float) -> None:
    """Wait until every rank has opened the store. Raises UserError that names those that have not."""
    keys, pause = [f"started/{other}" for other in range(world)], 0.02
    try:
        store.set(keys[rank], "")
        while not store.check(keys) and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
    except (dist.DistError, RuntimeError):
        raise UserError("rank 0 has left before all ranks had started; see its own messages") from None
    if missing:
        raise UserError(
            f"rank {', '.join(missing)} of {world} did not start within {start_timeout():g} s; see its own messages, "
            f"or wait longer with {TIMEOUT}=SECONDS"
        )


# -- the port of ranks that the deepspeed launcher starts on one node --


def _published_port() -> Path | None:
    """Return the file for rank 0's port; None unless `deepspeed` started all ranks, two or more, on this node."""
    launcher = _launcher()
    if launcher is None or os.environ.get("LOCAL_SIZE") != os.environ["WORLD_SIZE"] or os.environ["WORLD_SIZE"] == "1":
        return None
    name = f"fastdit-{os.getuid()}-{launcher.pid}-{launcher.create_time():.2f}.port"
    return Path(tempfile.gettempdir()) / name


def _launcher() -> psutil.Process | None:
    """Return the process of the `deepspeed` launcher that started this rank, or None."""
    try:
        parent = psutil.Process().parent()
        return parent if parent and LAUNCHER in parent.cmdline() else None
    except psutil.Error:
        return None


def _port_is_chosen() -> bool:
    """Return whether the user named the port. The `deepspeed` command passes its default on as if it were a choice."""
    if int(os.environ["MASTER_PORT"]) != DEEPSPEED_PORT:
        return True
    try:
        command = psutil.Process().parent().parent()
        return command is None or any(word.startswith("--master_port") for word in command.cmdline())
    except (psutil.Error, AttributeError):
        return True


def _write_port(path: Path, port: str) -> None:
    """Write the port for the other ranks, who find the whole file or none."""
    temporary = path.with_suffix(".partial")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(port)
    temporary.replace(path)


def _read_port(path: Path, end: float) -> str:
    """Return the port that rank 0 writes. Raises UserError if it does not come in time."""
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid():
                return path.read_text()
        time.sleep(0.05)
    raise UserError(_unreachable())
