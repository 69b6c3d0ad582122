"""Convert synthetic tars of ImageNet's layout to shards: whole, interrupted, damaged, misused."""

import contextlib
import hashlib
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import decode, encode, picture

from fastdit.commands.data_tools import _data
from fastdit.data import open_source
from fastdit.data.sets import imagenet
from fastdit.errors import UserError

ORDER = ("n02119789", "n01440764", "n09229709")  # the tar's; ranks 1, 0, 2
COUNTS = {"n02119789": 5, "n01440764": 3, "n09229709": 6}
NAMES = "n01440764 tench, Tinca tinca\nn02119789 kit fox\nn02100735 English setter\n\nn09229709 bubble\n"


def image(wnid: str, number: int) -> bytes:
    return encode(picture(20 + number, 30, seed=int(wnid[1:]) + number), "JPEG", quality=90)


def archive(members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5e9
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def members(wnid: str) -> dict[str, bytes]:
    """Return a class's images with numbers as in the real tar, neither consecutive nor sorted."""
    return {f"{wnid}_{i * 37 % 11 + 1}.JPEG": image(wnid, i) for i in range(COUNTS[wnid])}


EXPECTED = [(name[:-5], content, sorted(ORDER).index(w)) for w in ORDER for name, content in members(w).items()]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.tar").write_bytes(archive({f"{wnid}.tar": archive(members(wnid)) for wnid in ORDER}))
    return tmp_path


def convert(flags: str = "--out d --per_shard 4", tar: str | Path = "train.tar") -> str:
    """Return the text that the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _data(["convert-imagenet", str(tar), *shlex.split(flags)])
    return out.getvalue()


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        convert(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(path: Path | str) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def samples(out: Path | str) -> list[tuple[str, bytes, int]]:
    """Return (key, image's bytes, label) of each sample, as tarfile reads them."""
    found = []
    for path in sorted(Path(out).glob("*.tar")):
        with tarfile.open(path) as tar:
            files = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]
        for (name, content), (label_name, label) in zip(files[::2], files[1::2], strict=True):
            key, _, extension = name.partition(".")
            assert (extension, label_name) == ("jpeg", f"{key}.cls")
            found.append((key, content, int(label)))
    return found


def test_every_image_once_in_the_tars_order_with_its_rank_as_label():
    text = convert()
    assert samples("d") == EXPECTED
    manifest = json.loads(Path("d/manifest.json").read_text())
    assert manifest["counts"] == [3, 5, 6]
    assert [shard["samples"] for shard in manifest["shards"].values()] == [4, 4, 4, 2]
    assert {name: shard["sha256"] for name, shard in manifest["shards"].items()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path("d").glob("*.tar")
    }
    assert "non-commercial" in manifest["licence"]
    source = open_source("d")
    assert source.class_names == tuple(sorted(ORDER))
    assert source.labels.tolist() == [label for _, _, label in EXPECTED]
    np.testing.assert_array_equal(decode(source.read(6).tobytes()), decode(EXPECTED[6][1]))
    assert "14 images of 3 classes in 4 shards: d" in text
    assert "warning: ImageNet has 1,281,167 images of 1,000 classes" in text
    assert "fastdit/encode.py --source d --size 256" in text
    assert not list(Path("d").glob(".*"))


def test_the_whole_set_is_not_warned_of(monkeypatch):
    monkeypatch.setattr("fastdit.commands.data_convert_imagenet.IMAGES", 14)
    monkeypatch.setattr("fastdit.commands.data_convert_imagenet.CLASSES", 3)
    assert "warning" not in convert()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["./", "train/"])
def test_other_writers_of_tars(form, prefix):
    inner = {
        f"{prefix}{wnid}.tar": archive({prefix + name: data for name, data in members(wnid).items()}, form)
        for wnid in ORDER
    }
    Path("other.tar").write_bytes(archive(inner, form))
    convert(tar="other.tar")
    assert samples("d") == EXPECTED


def test_names_of_classes():
    Path("names.txt").write_text(NAMES)
    convert("--out d --names names.txt")
    assert open_source("d").class_names == ("tench, Tinca tinca", "kit fox", "bubble")
    assert len(list(Path("d").glob("*.tar"))) == 1
    Path("names.txt").write_text(NAMES.replace("n09229709 bubble", ""))
    assert refusal("--out e --names names.txt").startswith("--names: has no name for n09229709; write a line")
    Path("names.txt").write_text("tench\n")
    assert refusal("--out e --names names.txt").startswith("--names names.txt: line 1 is not")
    assert refusal("--out e --names no.txt").startswith("--names no.txt: cannot be read")
    assert not Path("e").exists()


# Again


@pytest.mark.parametrize("at", [0, 1, 5, 12, 13])
def test_interrupted_it_goes_on_without_redoing(at, monkeypatch):
    convert("--out straight --per_shard 4")
    read = imagenet._samples

    def interrupted(data, images, labels):
        for key, files in read(data, images, labels):
            if key == EXPECTED[at][0]:
                raise KeyboardInterrupt
            yield key, files

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "_samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert()
    done = {path: path.stat().st_mtime_ns for path in Path("d").glob("*.tar")}
    assert len(done) == at // 4
    if done:
        with pytest.raises(UserError, match="not all of its samples"):
            open_source("d")
        assert "begun with per_shard 4, now it is 5" in refusal("--out d --per_shard 5")
    convert()
    assert contents("d") == contents("straight")
    assert done == {path: path.stat().st_mtime_ns for path in done}


def test_finished_it_does_nothing():
    text = convert()
    before = {path: path.stat().st_mtime_ns for path in Path("d").iterdir()}
    assert convert() == text
    assert before == {path: path.stat().st_mtime_ns for path in Path("d").iterdir()}
    Path("other.tar").write_bytes(archive({f"{ORDER[0]}.tar": archive(members(ORDER[0]))}))
    assert "was begun with source train.tar, now it is other.tar" in refusal("--out d --per_shard 4", "other.tar")
    Path("d/manifest.json").unlink()
    assert refusal() == "--out d: holds other shards; choose another folder"


# Mistakes and damage


def test_a_tar_cut_anywhere_is_named_with_the_byte():
    whole = Path("train.tar").read_bytes()
    end = max(i for i, byte in enumerate(whole) if byte) + 1
    inner_end = whole.rindex(b"\xff\xd9", 0, end)  # of the last JPEG
    for size in [1, 511, 512, 600, *np.linspace(1000, inner_end, 23).astype(int).tolist()]:
        Path("cut.tar").write_bytes(whole[:size])
        text = refusal("--out d", "cut.tar")
        assert re.match(r"cut.tar: byte \d+: truncated", text)
        assert str(size) in text
    assert not list(Path("d").glob("*.tar"))


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_header_is_named_with_the_byte(seed):
    rng = np.random.default_rng(seed)
    whole = bytearray(Path("train.tar").read_bytes())
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 3 + 14
    outer = [at for at in headers if whole[at : at + 100].rstrip(b"\0").endswith(b".tar")]
    at = headers[rng.integers(len(headers))]
    whole[at + rng.integers(0, 10)] ^= 1 << rng.integers(8)
    Path("train.tar").write_bytes(whole)
    inside = max(start for start in outer if start <= at)
    where = f"train.tar: byte {at}: damaged tar header;"
    if at not in outer:
        wnid = ORDER[outer.index(inside)]
        where = f"train.tar: {wnid}.tar from byte {inside + 512}: byte {at - inside - 512}: damaged tar header;"
    assert refusal().startswith(where)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x.JPEG": b"1"}, ["'x.JPEG'", "is no class's tar"]),
        ({"a/n01440764.tar": archive({}), "n01440764.tar": archive({})}, ["'n01440764.tar'", "is there twice"]),
        ({"n01440764.tar": archive({"n02119789_1.JPEG": b"1"})}, ["n01440764.tar from byte 512", "'n02119789_1.JPEG'"]),
        ({"n01440764.tar": archive({"n01440764_1.txt": b"1"})}, ["'n01440764_1.txt' is no image of that class"]),
        (
            {"n01440764.tar": archive({"n01440764_1.JPEG": b"1", "x/n01440764_1.JPEG": b"2"})},
            ["'x/n01440764_1.JPEG' is there twice"],
        ),
        ({}, ["is empty"]),
    ],
)
def test_another_tar(content, words):
    Path("x.tar").write_bytes(archive(content))
    text = refusal("--out d", "x.tar")
    assert text.startswith("x.tar: ")
    for word in words:
        assert word in text


def test_wrong_arguments():
    Path("nothing.tar").write_bytes(b"")
    Path("busy").mkdir()
    Path("busy/a.tar").write_bytes(b"")
    for arguments, words in [
        (("--out d", "none.tar"), "none.tar: no such file; fastdit-data fetch imagenet-info says"),
        (("--out d", "nothing.tar"), "nothing.tar: cannot be read"),
        (("--out d --per_shard 0",), "--per_shard 0: must be at least 1"),
        (("--out busy",), "--out busy: holds other shards"),
        (("",), "--out: must be given; --help tells what it is"),
    ]:
        assert refusal(*arguments).startswith(words)
