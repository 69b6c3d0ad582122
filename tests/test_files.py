"""Files are whole or absent, whatever interrupts their writer, and checksums are those of hashlib."""

import hashlib
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdit.errors import UserError
from fastdit.files import prepare_file, prepare_folder, save_tensors, sha256_of, write_atomically


@pytest.mark.parametrize("many_writers", [False, True])
def test_the_file_appears_when_it_is_whole(tmp_path, many_writers):
    path = tmp_path / "a.json"
    for content in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with write_atomically(path, many_writers=many_writers) as temporary:
            temporary.write_text(content)
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(".a.json.")
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def interrupt(path: Path, many_writers: bool, error: type[BaseException], text: str | None) -> None:
    """Raise `error` in the middle of writing, after `text` is written if there is one."""
    with write_atomically(path, many_writers=many_writers) as temporary:
        if text is not None:
            temporary.write_text(text)
        raise error


@pytest.mark.parametrize("many_writers", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_writer_changes_nothing(tmp_path, many_writers, error):
    path = tmp_path / "a"
    path.write_text("old")
    for written in (True, False):
        with pytest.raises(error):
            interrupt(path, many_writers, error, "half" if written else None)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "a"):
        pass


def test_the_next_attempt_replaces_what_a_killed_writer_left(tmp_path):
    (tmp_path / ".a.partial").write_text("half of a longer file")
    with write_atomically(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "whole")]


def test_many_writers_do_not_meet(tmp_path):
    """Every writer is inside its block at the same time; the last one to leave wins."""
    path, names, barrier = tmp_path / "a", [], threading.Barrier(4, timeout=20)

    def write(content: str) -> None:
        with write_atomically(path, many_writers=True) as temporary:
            names.append(temporary.name)
            temporary.write_text(content * 1000)
            barrier.wait()

    threads = [threading.Thread(target=write, args=(content,)) for content in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 4
    assert path.read_text() in {content * 1000 for content in "abcd"}
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_of_files_one_after_the_other(tmp_path):
    contents = [b"", b"some", b"x" * 3_000_000]
    paths = [tmp_path / str(i) for i in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
        assert sha256_of(path) == sha256_of(str(path)) == hashlib.sha256(content).hexdigest()
    assert sha256_of(*paths) == hashlib.sha256(b"".join(contents)).hexdigest()
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "missing")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_tensors_are_written_with_the_users_umask(tmp_path, mask, mode):
    path, before = tmp_path / "a.safetensors", os.umask(mask)
    try:
        save_tensors({"x": torch.arange(3.0)}, path, metadata={"a": "b"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
    assert torch.equal(load_file(path)["x"], torch.arange(3.0))
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path):
    prepare_file(tmp_path / "a" / "b" / "c.pt", "--out c.pt")
    prepare_folder(tmp_path / "a" / "b", "--out b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_places_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/nope/x")):
        with pytest.raises(UserError, match=r"--out y: cannot write into .* \(.*\); choose another place"):
            prepare_folder(folder, "--out y")
    with pytest.raises(UserError, match="--out y: is a folder; name a file"):
        prepare_file(tmp_path, "--out y")
