"""Ranks find each other: a port in use, and ranks that never start."""

import socket
import time
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from launching import SCRIPTS, TINY, free_port, metrics, run

from fastdit import rendezvous
from fastdit.errors import UserError


@contextmanager
def listening(port: int):
    """Hold a port, unless another process does already."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
            server.listen()
        except OSError:
            assert port == rendezvous.DEEPSPEED_PORT
        yield


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """The environment of one of two ranks, as a launcher sets it."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(rendezvous.TIMEOUT, "0.3")


@pytest.mark.launch
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_default_port_is_in_use(ranks, tmp_path):
    """Case R6: nobody chose it, so the ranks take another one."""
    command = [str(SCRIPTS / "deepspeed"), "--num_gpus", ranks, "fastdit/train.py", *TINY, "--sample.agreement", "0"]
    with listening(rendezvous.DEEPSPEED_PORT), pytest.MonkeyPatch.context() as patch:
        patch.delenv(rendezvous.TIMEOUT)
        patch.setenv("TMPDIR", str(tmp_path))
        run([*command, "--steps", "1", "--out", str(tmp_path / "run")], tmp_path / "log").succeeded()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert not list(tmp_path.glob("*.port"))


@pytest.mark.parametrize("free", [False, True])
def test_a_port_in_use(free, monkeypatch):
    port = rendezvous.os.environ["MASTER_PORT"]
    with listening(int(port)):
        if free:
            assert isinstance(rendezvous._open_store(0, 2, time.monotonic() + 9, free=True), dist.Store)
            assert rendezvous.os.environ["MASTER_PORT"] != port
        else:
            with pytest.raises(UserError, match=f"^port {port} of 127.0.0.1: is in use; .* --master_port"):
                rendezvous._open_store(0, 2, time.monotonic() + 9, free=False)


def test_a_rank_that_never_starts(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^rank 1 of 2 did not start within 0.3 s; .* FASTDIT_START_TIMEOUT=SECONDS"):
        rendezvous.join("gloo")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    with pytest.raises(UserError, match=r"rank 0 was not reached within 0.3 s; .* FASTDIT_START_TIMEOUT=SECONDS"):
        rendezvous.join("gloo")


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf", ""])
def test_the_timeout_is_a_number(monkeypatch, text):
    monkeypatch.setenv(rendezvous.TIMEOUT, text)
    with pytest.raises(UserError, match=f"^{rendezvous.TIMEOUT}={text}: must be a number of seconds"):
        rendezvous.start_timeout()


def test_the_port_is_read_from_a_file_of_this_user(tmp_path):
    path = tmp_path / "x.port"
    with pytest.raises(UserError, match="rank 0 was not reached"):
        rendezvous._read_port(path, time.monotonic() + 0.1)
    (tmp_path / "other").write_text("1")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="rank 0 was not reached"):
        rendezvous._read_port(path, time.monotonic() + 0.1)
    rendezvous._write_port(path, "1234")
    assert rendezvous._read_port(path, time.monotonic() + 9) == "1234"
