"""Archives as other tools write them: links, names of any bytes, and files that are no tar archives."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_data_bad import write_tar
from test_folders import PNG, refusal, tree

from fastdit.data import open_source
from fastdit.data.shards import write_shard

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(path: Path, members: list[tuple[str, bytes | tuple[bytes, str]]], form: int = tarfile.PAX_FORMAT) -> str:
    """Write files `(name, content)` and links `(name, (kind, target))`."""
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 200])
def test_hard_links_are_the_files_they_lead_to(tmp_path, form, length):
    folder = "d" * min(length, 60 if form == "ustar" else length)
    link = tarfile.LNKTYPE, f"{folder}/a.png"
    members = [(link[1], PNG), (f"{folder}/a.cls", b"0"), ("b.png", link), ("b.cls", b"1"), ("c.png", PNG)]
    source = open_source(archive(tmp_path / "x.tar", [*members, ("c.cls", (tarfile.LNKTYPE, "b.cls"))], FORMS[form]))
    assert source.labels.tolist() == [0, 1, 1]
    assert all(source.read(i).tobytes() == PNG for i in range(3))


def test_other_links_are_named(tmp_path):
    members = [("a.png", PNG), ("a.cls", b"0"), ("b.png", (tarfile.SYMTYPE, "a.png")), ("b.cls", b"1")]
    text = refusal(archive(tmp_path / "x.tar", members))
    assert "byte 2048: 'b.png' is a symbolic link to 'a.png'; make the archive again with: tar --dereference" in text
    members[2] = "b.png", (tarfile.LNKTYPE, "z.png")
    assert "'b.png' is a hard link to 'z.png', which no earlier member is" in refusal(
        archive(tmp_path / "x.tar", members)
    )


@pytest.mark.parametrize("form", FORMS)
def test_names_of_any_bytes(tmp_path, form):
    """Two Latin-1 names, which differ in bytes that are not UTF-8, are two samples."""
    names = [bytes([byte]).decode("utf-8", "surrogateescape") for byte in (0xE9, 0xE8)]
    members = [
        (f"{name}.{e}", content) for k, name in enumerate(names) for e, content in (("png", PNG), ("cls", b"%d" % k))
    ]
    source = open_source(archive(tmp_path / "x.tar", members, FORMS[form]))
    assert source.labels.tolist() == [0, 1]
    assert source.where(0) != source.where(1)
    source.where(0).encode()  # can be printed
    write_shard(tmp_path / "again.tar", [(names[0], {"png": PNG, "cls": b"0"})])
    assert open_source(str(tmp_path / "again.tar")).n == 1


def test_compressed_members(tmp_path):
    members = [("a.png.gz", gzip.compress(PNG)), ("a.cls", b"0")]
    text = refusal(write_tar(tmp_path / "x.tar", members))
    assert "'a' has no image but a compressed one ('.png.gz'); unpack it, and make the archive again" in text


def test_files_that_are_no_archives(tmp_path):
    for content, part in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "is an HTML page"),
        (b"\x28\xb5\x2f\xfd", "zstd -dc"),
    ):
        (tmp_path / "x.tar").write_bytes(content)
        assert part in refusal(tmp_path / "x.tar")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("cat/1.png", PNG)
    assert "x.zip: is a zip archive, and shards are tar archives; unpack it with: unzip" in refusal(tmp_path / "x.zip")


def test_shards_of_several_splits(tmp_path):
    for name in ("set-train-000", "set-train-001", "set-val-000", "other"):
        write_tar(tmp_path / f"{name}.tar", [("a.png", PNG), ("a.cls", b"0")])
    text = refusal(tmp_path)
    assert "holds shards of several splits (train, val), which are not mixed" in text
    pattern = f"{tmp_path}/set-train-*.tar"
    assert text.endswith(f"point --data.source at one: '{pattern}', or at all: '{tmp_path}/*.tar'")
    assert open_source(pattern).n == 2
    assert "no file has such a name" in refusal(tmp_path / "x*.tar")
    (tmp_path / "set-val-000.tar").unlink()
    assert open_source(str(tmp_path)).n == 3


def test_shards_in_folders(tmp_path):
    """Never a part of the shards: those of one folder, or an error."""
    shard = write_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.cls", b"0")])
    below = tmp_path / "x" / "train" / "00"
    below.mkdir(parents=True)
    Path(shard).rename(below / "a.tar")
    assert f"its shards lie in folders; point --data.source at one of them: {below}" in refusal(tmp_path / "x")
    write_tar(tmp_path / "x" / "b.tar", [("a.png", PNG), ("a.cls", b"0")])
    assert f"holds shards (such as b.tar), and so does a folder in it ({below})" in refusal(tmp_path / "x")
    (tmp_path / "x" / "b.tar").unlink()
    tree(tmp_path / "x", "train/cat/1.png")  # class folders, beside which archives are left out
    assert open_source(str(tmp_path / "x"), labels="first").n == 1
