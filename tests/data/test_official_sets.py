"""Convert miniature downloads in the layouts of ten published sets: whole, unpacked, interrupted, damaged, misused."""

import contextlib
import gzip
import io
import json
import os
import shlex
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import decode, encode
from official_downloads import DOWNLOADS, STEP, image, mat, pack, write_download
from PIL import Image

from fastdit.commands.data_tools import _data
from fastdit.data import open_source
from fastdit.data.sets import to_shards
from fastdit.data.sets.celeba_crops import BOXES, face
from fastdit.data.sets.official_sets import OFFICIAL_SETS
from fastdit.errors import UserError


def convert(name: str, flags: str = "--from from --out out") -> str:
    """Return the text that the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _data(["convert-set", name, *shlex.split(flags)])
    return out.getvalue()


def refusal(name: str, flags: str = "--from from --out out") -> str:
    with pytest.raises(UserError) as refused:
        convert(name, flags)
    return str(refused.value)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(folder: Path) -> dict[int, int]:
    """Return the label of each image's number in the shards of a folder."""
    source = open_source(str(folder))
    levels = [decode(source.read(i).tobytes()).astype(float).mean() for i in range(source.n)]
    assert all(abs(level / STEP - round(level / STEP)) < 0.2 for level in levels)
    return {round(level / STEP): int(label) for level, label in zip(levels, source.labels, strict=True)}


def test_each_set_has_a_download():
    assert list(DOWNLOADS) == list(OFFICIAL_SETS)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download(name):
    """Splits, labels and names are right, the images are those of the download, and `check` finds nothing wrong."""
    download = write_download(name, Path("from"))
    printed = convert(name)
    known = OFFICIAL_SETS[name]
    assert list(download.expected) == list(known.images)
    for split, expected in download.expected.items():
        assert numbers(Path("out") / split) == expected
        source = open_source(f"out/{split}")
        assert source.class_names == (download.names or tuple(map(str, range((known.classes > 1 and 2) or 1))))
        assert f"out/{split}: {len(expected)} images" in printed
        manifest = json.loads(Path("out", split, "manifest.json").read_text())
        assert manifest["counts"] == [list(expected.values()).count(label) for label in range(len(source.class_names))]
        with contextlib.redirect_stdout(io.StringIO()) as checked:
            _data(["check", f"out/{split}"])
        assert "checksums" in checked.getvalue()
        assert f"warning: {split} of {known.title} has {known.images[split]:,} images" in printed  # it is a miniature
    assert f"license: {known.license}" in printed
    flags = known.train or "--preset finetune"
    assert flags in printed
    assert "out/train" in printed


@pytest.mark.parametrize("name", DOWNLOADS)
def test_an_unpacked_download(name):
    """Folders in the place of the archives give the same bytes."""
    download = write_download(name, Path("from"))
    convert(name)
    for file in download.folders:
        path = Path("from", file)
        if file.endswith((".tar.gz", ".tgz", ".tar", ".zip")):
            shutil.unpack_archive(path, "from" if name != "df20-mini" or "meta" not in file else "from/DF20M-metadata")
            path.unlink()
    if name == "caltech101":
        shutil.unpack_archive("from/caltech-101/101_ObjectCategories.tar.gz", "from")
    convert(name, "--from from --out again")
    for split, expected in download.expected.items():
        assert numbers(Path("again") / split) == expected


def test_an_interrupted_conversion_goes_on(monkeypatch):
    write_download("food101", Path("from"))
    flags = "--from from --out out --per_shard 2"
    convert("food101", flags.replace("--out out", "--out whole"))
    whole = {path.relative_to("whole"): path.read_bytes() for path in Path("whole").rglob("*.tar")}
    assert len(whole) == 4

    real, written = to_shards.write_shard, []

    def breaks(path: Path, samples) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        real(path, samples)

    monkeypatch.setattr(to_shards, "write_shard", breaks)
    with pytest.raises(KeyboardInterrupt):
        convert("food101", flags)
    monkeypatch.setattr(to_shards, "write_shard", real)
    assert [path.name for path in Path("out").rglob("*.tar")] == ["images-00000.tar"]
    with pytest.raises(UserError, match="not all of its samples are written yet"):
        open_source("out/train")
    assert "was begun with per_shard 2, now it is 3" in refusal("food101", flags.replace("2", "3"))
    before = next(Path("out").rglob("*.tar")).stat().st_mtime_ns
    convert("food101", flags)
    assert Path("out/train/images-00000.tar").stat().st_mtime_ns == before
    assert {path.relative_to("out"): path.read_bytes() for path in Path("out").rglob("*.tar")} == whole
    convert("food101", flags)  # is there already


@pytest.mark.parametrize("share", [0.1, 0.3, 0.55, 0.8, 0.95])
@pytest.mark.parametrize("name", ["food101", "celeba64", "caltech101", "artbench10"])
def test_a_download_that_was_cut(name, share):
    write_download(name, Path("from"))
    file = Path("from", OFFICIAL_SETS[name].files[0][0])
    content = file.read_bytes()
    end = content.rstrip(b"\0") if file.suffix == ".tar" else content
    file.write_bytes(content[: int(len(end) * share)])
    message = refusal(name)
    assert str(file) in message
    assert "download it again" in message
    assert "\n" not in message


def test_an_archive_that_was_cut_between_two_members():
    """Every place where a cut leaves whole members alone; `tarfile` takes it for the end."""
    download = write_download("artbench10", Path("from"))
    file = Path("from/artbench-10-imagefolder-split.tar")
    content = file.read_bytes()
    with tarfile.open(file) as opened:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in opened]
    for end in ends:
        file.write_bytes(content[:end])
        assert f"{file}: cannot be read (it was cut); download it again" in refusal("artbench10")
        packed = Path("packed", "101_ObjectCategories.tar.gz")
        packed.parent.mkdir(exist_ok=True)
        packed.write_bytes(gzip.compress(content[:end]))
        assert f"{packed}: cannot be read (it was cut)" in refusal("caltech101", "--from packed --out out")
    file.write_bytes(content)
    convert("artbench10")
    assert numbers(Path("out/train")) == download.expected["train"]


def test_an_archive_that_a_browser_has_unpacked():
    """The name of the packed file, the content of the tar."""
    download = write_download("cub200", Path("from"))
    file = Path("from/CUB_200_2011.tgz")
    file.write_bytes(gzip.decompress(file.read_bytes()))
    convert("cub200")
    assert numbers(Path("out/test")) == download.expected["test"]


def test_files_that_are_missing():
    Path("from").mkdir()
    message = refusal("flowers102")
    assert message.startswith(
        "--from from: has no 102flowers.tgz and no imagelabels.mat and no setid.mat; download what"
    )
    assert message.endswith("needs from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/")
    write_download("flowers102", Path("from"))
    Path("from/setid.mat").unlink()
    assert "--from from: has no setid.mat; download" in refusal("flowers102")
    assert "--from gone: has no" in refusal("flowers102", "--from gone --out out")


def test_lists_that_do_not_fit():
    download = write_download("cub200", Path("from"))
    files = download.folders["CUB_200_2011.tgz"]
    tgz = Path("from/CUB_200_2011.tgz")

    tgz.write_bytes(pack(tgz.name, {name: content for name, content in files.items() if not name.endswith("A_2.jpg")}))
    assert (
        "1 of the 1 images of the split test (such as CUB_200_2011/images/001.Albatross/A_2.jpg) are not in"
        in refusal("cub200")
    )
    for change, words in (
        ({"CUB_200_2011/classes.txt": b"001.Albatross\n"}, "its lists are not as published"),
        ({"CUB_200_2011/train_test_split.txt": b"1 1\n"}, "its lists are not as published (KeyError"),
        ({"CUB_200_2011/image_class_labels.txt": b"1 x\n"}, "its lists are not as published (ValueError"),
    ):
        tgz.write_bytes(pack(tgz.name, files | change))
        assert words in refusal("cub200")
    tgz.write_bytes(pack(tgz.name, {name: content for name, content in files.items() if "classes" not in name}))
    assert "CUB_200_2011/classes.txt: is not in the download" in refusal("cub200")
    assert not Path("out").exists() or not list(Path("out").rglob("*.tar"))


def test_other_lists_that_do_not_fit():
    for name, file, change, words in (
        (
            "food101",
            "food-101.tar.gz",
            {"food-101/meta/train.json": b"{"},
            "its lists are not as published (JSONDecode",
        ),
        ("food101", "food-101.tar.gz", {"food-101/meta/train.json": b"[1]"}, "its lists are not as published"),
        ("sun397", "SUN397.tar.gz", {"SUN397/ClassName.txt": b"/a/abbey\n"}, "its folder is not in ClassName.txt"),
        ("flowers102", "setid.mat", {"": b"x"}, "setid.mat: is no MATLAB file"),
        ("celeba64", "list_eval_partition.txt", {"": b"000001.jpg 5\n"}, "its lists are not as published"),
        (
            "df20-mini",
            "DF20M-metadata.zip",
            {"DF20M-train_metadata_PROD.csv": b"a,b\n1,2\n"},
            "no image_path and class",
        ),
    ):
        download = write_download(name, Path("from"))
        Path("from", file).write_bytes(pack(file, download.folders[file] | change))
        message = refusal(name, f"--from from --out {name}")
        assert words in message
        assert "\n" not in message


def test_a_file_that_is_there_twice():
    write_download("ffhq64", Path("from"))
    with zipfile.ZipFile("from/thumbnails128x128.zip", "a") as opened, pytest.warns(UserWarning, match="Duplicate"):
        opened.writestr("thumbnails128x128/00000/00000.png", image(1, "PNG"))
    assert "'thumbnails128x128/00000/00000.png' is there twice; download it again" in refusal("ffhq64")


def test_a_download_that_was_replaced():
    """A mended archive of the same size is not taken for the one that was converted."""
    download = write_download("artbench10", Path("from"))
    file = Path("from/artbench-10-imagefolder-split.tar")
    good = file.read_bytes()
    file.write_bytes(
        good.replace(download.folders[file.name]["artbench-10-imagefolder-split/train/baroque/b.jpg"][-99:], bytes(99))
    )
    convert("artbench10")
    file.write_bytes(good)
    os.utime(file, (1e9, 1e9))
    assert "was begun with files" in refusal("artbench10")
    shutil.unpack_archive(file, "from")
    file.unlink()
    convert("artbench10", "--from from --out folder")
    image_file = Path("from/artbench-10-imagefolder-split/train/baroque/b.jpg")
    os.utime(image_file, (2e9, 2e9))
    assert "was begun with files" in refusal("artbench10", "--from from --out folder")


def test_a_packed_archive_with_a_wrong_checksum():
    """gzip compares it at its end, which lies behind the end of the tar."""
    write_download("df20-mini", Path("from"))
    file = Path("from/DF20M-images.tar.gz")
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)
    assert f"{file}: cannot be read (CRC check failed" in refusal("df20-mini")


def test_an_archive_with_a_password():
    write_download("ffhq64", Path("from"))
    file = Path("from/thumbnails128x128.zip")
    content = bytearray(file.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(mark)
        while start >= 0:
            content[start + at] |= 1
            start = content.find(mark, start + 4)
    file.write_bytes(content)
    message = refusal("ffhq64")
    assert "password required" in message
    assert "\n" not in message


@pytest.mark.parametrize("before", ["./", "/"])
@pytest.mark.parametrize("name", ["ffhq64", "cub200"])
def test_names_in_an_archive_that_begin_in_another_way(name, before):
    download = write_download(name, Path("from"))
    ((file, files),) = download.folders.items()
    Path("from", file).write_bytes(pack(file, {before + member: content for member, content in files.items()}))
    convert(name)
    assert numbers(Path("out/train")) == download.expected["train"]


def test_classes_of_one_name_are_told_apart():
    download = write_download("cars", Path("from"))
    files = download.folders["car_devkit.tgz"]
    names = mat(class_names=np.array([["Audi", "Audi"]], object))
    Path("from/car_devkit.tgz").write_bytes(pack("a.tgz", files | {"devkit/cars_meta.mat": names}))
    convert("cars")
    assert json.loads(Path("out/train/classes.json").read_text()) == ["Audi (0)", "Audi (1)"]


@pytest.mark.parametrize(
    ("name", "file", "change", "words"),
    [
        (
            "cub200",
            "CUB_200_2011.tgz",
            {"CUB_200_2011/classes.txt": b"1 001.Albatross\n"},
            "has the label 1 of 1 classes",
        ),
        (
            "cub200",
            "CUB_200_2011.tgz",
            {"CUB_200_2011/image_class_labels.txt": b"1 0\n2 1\n3 1\n4 1\n5 1"},
            "the label -1",
        ),
        ("celeba64", "list_eval_partition.txt", {"": b"000001.jpg -1\n"}, "its lists are not as published (KeyError"),
    ],
)
def test_labels_out_of_range(name, file, change, words):
    download = write_download(name, Path("from"))
    Path("from", file).write_bytes(pack(file, download.folders[file] | change))
    assert words in refusal(name)


def test_a_page_in_the_place_of_an_archive():
    write_download("ffhq64", Path("from"))
    Path("from/thumbnails128x128.zip").write_bytes(b"<!DOCTYPE html><html>Quota exceeded</html>")
    assert "is an HTML page" in refusal("ffhq64")


def test_sums(monkeypatch):
    """A file with another sum than the published one is converted, and named."""
    write_download("flowers102", Path("from"))
    assert "warning: from/setid.mat: has md5 " in convert("flowers102")
    monkeypatch.setitem(OFFICIAL_SETS, "flowers102", replace(OFFICIAL_SETS["flowers102"], md5={}))
    assert "md5" not in convert("flowers102", "--from from --out again")


def test_a_link_in_an_archive_is_no_image():
    download = write_download("artbench10", Path("from"))
    with tarfile.open("from/artbench-10-imagefolder-split.tar", "a") as opened:
        info = tarfile.TarInfo("artbench-10-imagefolder-split/train/baroque/link.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(info)
    convert("artbench10")
    assert numbers(Path("out/train")) == download.expected["train"]


# -- CelebA's crops --


@pytest.mark.parametrize("crop", BOXES)
def test_the_face_is_cut_out(crop):
    """The crop and the scaling, against pixels taken by slices; and the two crops differ."""
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    top, left, side = {"ddim": (121 - 64, 89 - 64, 128), "score_sde": ((218 - 140) // 2, (178 - 140) // 2, 140)}[crop]
    part = Image.fromarray(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    expected = np.asarray(part.resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode(face(encode(pixels, "PNG"), "a.png", crop)), expected)


def test_crops_of_the_command():
    download = write_download("celeba64", Path("from"))
    assert "for celeba64 alone" in refusal("ffhq64", "--from from --out out --crop ddim")
    convert("celeba64", "--from from --out out --crop score_sde")
    assert json.loads(Path("out/train/manifest.json").read_text())["crop"] == "score_sde"
    assert "was begun with crop score_sde, now it is ddim" in refusal("celeba64")
    assert decode(open_source("out/train").read(0).tobytes()).shape == (64, 64, 3)
    files = download.folders["img_align_celeba.zip"]
    for content, words in ((image(0), "is 24 x 20 pixels; give img_align_celeba.zip"), (b"x", "cannot be decoded")):
        changed = files | {"img_align_celeba/000001.jpg": content}
        Path("from/img_align_celeba.zip").write_bytes(pack("a.zip", changed))
        assert f"img_align_celeba/000001.jpg: {words}" in refusal("celeba64", "--from from --out again")
        shutil.rmtree("again")
