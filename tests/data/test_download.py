"""Test what ends a download at once: a disk that is small or refuses to write, and an answer that is not the file."""

import resource
import shutil
from collections import namedtuple

import pytest
from fetch_helpers import Server

from fastdit.data.sets import download as module
from fastdit.data.sets.download import DownloadError, download

CONTENT = bytes(range(256)) * 2000
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = Server({"x.bin": CONTENT})
    yield server
    server.close()


def refusal(server, path, size=None) -> str:
    with pytest.raises(DownloadError) as caught:
        download(f"{server.address}/x.bin", path, size)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{server.address}/x.bin: ")


@pytest.mark.parametrize(("size", "asked"), [(len(CONTENT), 0), (None, 1)])
def test_a_small_disk_is_told_before_anything_is_written(server, tmp_path, monkeypatch, size, asked):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, len(CONTENT) - 1))
    text = refusal(server, tmp_path / "x.bin", size)
    assert text == (
        f"512.0 kB are to come, and {tmp_path} has 512.0 kB free; free some space, or choose another place with --out"
    )
    assert len(server.asked) == asked
    assert not list(tmp_path.iterdir())


def test_what_has_arrived_needs_no_room_again(server, tmp_path, monkeypatch):
    (tmp_path / ".x.bin.partial").write_bytes(CONTENT[:1000])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, len(CONTENT) - 1000))
    download(f"{server.address}/x.bin", tmp_path / "x.bin", len(CONTENT))
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert server.asked == [("x.bin", "bytes=1000-")]


def test_a_system_that_refuses_to_write_is_not_asked_again(server, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        text = refusal(server, tmp_path / "x.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert text.startswith(f"{tmp_path}/.x.bin.partial: cannot be read or written (File too large); allow larger files")
    assert len(server.asked) == 1
    download(f"{server.address}/x.bin", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("answer", [b"<html>", b"  <!DOCTYPE HTML>\n", b"version https://git-lfs.github.com/spec/v1\n"])
def test_an_answer_that_stands_in_for_the_file(server, tmp_path, answer):
    server.files["x.bin"] = answer
    assert refusal(server, tmp_path / "x.bin").startswith("the answer is a")
    assert not list(tmp_path.iterdir())
