"""Test which images of a folder are taken, and that a tree that may mean two things is refused with the way out."""

import gzip
import json
import lzma
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from data_helpers import encode, latent_source, numbered_source, picture
from PIL import Image
from test_data_bad import write_tar

from fastdit.commands import data_check, data_convert
from fastdit.data import open_source
from fastdit.data.sources import check_apart
from fastdit.encode import _encode
from fastdit.errors import UserError

PNG = encode(picture(6, 6), "PNG")


def tree(root: Path, *files: str) -> Path:
    """Write a small image to each path below `root`, or its own name if its suffix is no image's."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG if path.suffix.lower() in (".png", ".jpg", ".jfif") else name.encode())
    return root


def listed(root: Path, **options) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Return the class names of a tree, and each image with its label."""
    source = open_source(str(root), **options)
    return source.class_names, [
        (os.path.relpath(source.where(i), root), int(source.labels[i])) for i in range(source.n)
    ]


def refusal(root: Path | str, **options) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(root), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Which folders are classes


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "TEST"), ("train",)])
@pytest.mark.parametrize("below", ["cat/1.png", "1.png"])
def test_splits_are_no_classes(tmp_path, names, below):
    tree(tmp_path, *(f"{name}/{below}" for name in names))
    text = refusal(tmp_path)
    assert f"point --data.source at {tmp_path / names[0]}" in text
    assert "--data.labels first" in text
    assert listed(tmp_path, labels="first")[0] == tuple(sorted(names))
    if below == "cat/1.png":
        assert "look like splits" in refusal(tmp_path, labels="deepest")
        assert listed(tmp_path / names[0])[0] == ("cat",)


def test_nested_class_trees(tmp_path):
    tree(tmp_path, "a/abbey/1.jpg", "a/alley/2.jpg", "b/bazaar/indoor/3.jpg", "b/bazaar/outdoor/4.jpg")
    text = refusal(tmp_path)
    assert "(a, b) hold only folders" in text
    assert f"{tmp_path / 'a'}" in text
    assert "--data.labels deepest" in text
    names, images = listed(tmp_path, labels="deepest")
    assert names == ("a/abbey", "a/alley", "b/bazaar/indoor", "b/bazaar/outdoor")
    assert images == [(f"{name}/{i + 1}.jpg", i) for i, name in enumerate(names)]
    assert listed(tmp_path, labels="first")[0] == ("a", "b")
    (tmp_path / "a" / "attic").mkdir()
    assert "a/attic: the class folder holds no images" in refusal(tmp_path, labels="deepest")


def test_one_nested_class_is_enough_to_ask(tmp_path):
    tree(tmp_path, "cat/1.png", "dog/puppies/1.png")
    assert "(dog) hold only folders" in refusal(tmp_path)
    tree(tmp_path, "dog/2.png")  # its own image: the folder below it is a part of it
    assert listed(tmp_path)[1] == [("cat/1.png", 0), ("dog/2.png", 1), ("dog/puppies/1.png", 1)]


def test_what_lies_beside_class_folders(tmp_path):
    tree(tmp_path, "cat/1.png", "dog/1.png", "cover.png")
    assert "1 images (such as cover.png) lie beside the class folders (cat, dog)" in refusal(tmp_path)
    (tmp_path / "cover.png").unlink()
    tree(tmp_path, "cat.zip", "dog.tar.gz")
    source = open_source(str(tmp_path))
    assert source.n == 2
    assert sorted(source.notes[0].split(": not taken: ")[1].split(", ")) == ["1 .gz", "1 .zip"]
    tree(tmp_path, "n-00.tar")
    text = refusal(tmp_path)
    assert "both .tar files (such as n-00.tar) and folders of images (such as cat)" in text


def test_leftovers_are_no_data(tmp_path):
    """macOS, Synology, Windows and galleries leave folders and files that look like images."""
    tree(tmp_path, "cat/1.png", "cat/._1.png", "cat/.hidden/2.png", "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg")
    tree(tmp_path, "__MACOSX/cat/._1.png", "@eaDir/x.png", ".git/x.png", ".DS_Store", "cat/Thumbs.db", "#recycle/1.png")
    tree(tmp_path, "cat/thumbnails/1.png", "Thumbs/1.png")
    assert listed(tmp_path) == (("cat",), [("cat/1.png", 0)])
    assert open_source(str(tmp_path)).notes == (f"{tmp_path}: not taken: 2 thumbnail folders",)


def test_hidden_shards_are_no_shards(tmp_path):
    n = numbered_source(tmp_path, 9).n
    (tmp_path / "._n-00.tar").write_bytes(b"\0\5\26\7" + bytes(100))
    (tmp_path / "logs").mkdir()
    assert open_source(str(tmp_path)).n == n


def test_leftovers_in_a_shard(tmp_path):
    members = [
        ("./a.png", PNG),
        ("./a.cls", b"0"),
        ("__MACOSX/._a.png", b""),
        ("x/@eaDir/a.jpg", PNG),
        ("._a.cls", b""),
    ]
    assert open_source(write_tar(tmp_path / "a.tar", members)).n == 1


def test_links_that_lead_in_circles(tmp_path):
    tree(tmp_path, "cat/1.png", "cat/more/2.png", "dog/1.png")
    (tmp_path / "cat" / "more" / "up").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "top").symlink_to("..")
    (tmp_path / "all").symlink_to(".")
    (tmp_path / "dog" / "above").symlink_to(tmp_path.parent)
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere.png")
    names, images = listed(tmp_path)
    assert names == ("cat", "dog")
    assert images == [("cat/1.png", 0), ("cat/more/2.png", 0), ("dog/1.png", 1)]
    assert "4 links to a folder above them, 1 broken links" in open_source(str(tmp_path)).notes[0]


def test_each_file_is_taken_once(tmp_path):
    tree(tmp_path, "root/cat/1.png", "pool/2.png", "pool/deep/3.png")
    root = tmp_path / "root"
    (root / "cat" / "0.png").symlink_to("1.png")
    (root / "cat" / "pool").symlink_to(tmp_path / "pool")
    (root / "cat" / "pool again").symlink_to(tmp_path / "pool")
    (root / "dog").symlink_to(tree(tmp_path / "elsewhere", "4.png"))
    (tmp_path / "pool" / "deep" / "back").symlink_to(tmp_path / "elsewhere" / "..")
    names, images = listed(root)
    assert names == ("cat", "dog")
    assert images == [("cat/1.png", 0), ("cat/pool again/2.png", 0), ("cat/pool again/deep/3.png", 0), ("dog/4.png", 1)]
    (root / "dog" / "mine.png").symlink_to(root / "cat" / "1.png")
    assert "dog/mine.png: is the same file as" in refusal(root)


# Which files are taken


def test_suffixes_that_are_taken_and_counted(tmp_path, capsys):
    tree(tmp_path, "cat/1.PNG", "cat/2.jfif", "cat/3.heic", "cat/4.HEIC", "cat/5.svg", "cat/LICENSE", "labels.csv")
    for form, suffix in (("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif"), ("AVIF", "avif"), ("JPEG2000", "jp2")):
        (tmp_path / "cat" / f"x.{suffix}").write_bytes(encode(Image.fromarray(picture(8, 8)), form))
    source = open_source(str(tmp_path))
    assert source.n == 7
    (note,) = source.notes
    assert note.startswith(f"{tmp_path}: not taken: 2 .heic, 1 ")
    assert sorted(note.split(": not taken: ")[1].split(", ")) == ["1 .csv", "1 .svg", "1 without a suffix", "2 .heic"]
    data_check.run([str(tmp_path), "--decode", "false"])
    assert capsys.readouterr().out.splitlines()[0] == note


def test_names_that_are_not_utf8(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    source = open_source(str(tree(tmp_path / "root", "cat/1.png", f"cat/{odd}.png", f"{odd}/1.png")))
    assert source.class_names == (r"caf\xe9", "cat")
    json.dumps(source.class_names).encode()
    assert source.where(0) == rf"{tmp_path}/root/caf\xe9/1.png"
    assert [source.samples.read(i).tobytes() for i in range(source.n)] == [PNG] * 3


def test_a_folder_of_nothing_that_is_taken(tmp_path):
    assert "(only 1 .zip)" in refusal(tree(tmp_path / "a", "photos.zip"))
    assert "cat: the class folder holds no images" in refusal(tree(tmp_path / "b", "cat/1.heic", "dog/1.png"))


def test_compressed_archives_are_explained(tmp_path):
    members = [("a.png", PNG), ("a.cls", b"0")]
    whole = Path(write_tar(tmp_path / "a.tar", members)).read_bytes()
    for name, pack, command in (("b.tar", gzip, "gzip"), ("c.tar.gz", gzip, "gzip"), ("d.tar", lzma, "xz")):
        (tmp_path / name).write_bytes(pack.compress(whole))
        text = refusal(tmp_path / name)
        assert f"{name}: is compressed" in text
        assert f"unpack it: {command} -dc {tmp_path / name} > {tmp_path / name[0]}-unpacked.tar" in text
        subprocess.run(text.split("unpack it: ")[1], shell=True, check=True)
        assert open_source(str(tmp_path / f"{name[0]}-unpacked.tar")).n == 1
    for name in ("b.tar", "d.tar", "b-unpacked.tar", "c-unpacked.tar", "d-unpacked.tar"):
        (tmp_path / name).unlink()
    assert "compressed archives (such as c.tar.gz), which are not read; unpack them" in refusal(tmp_path)
    (tmp_path / "a.tar").unlink()
    assert "(only 1 .gz); unpack its archives" in refusal(tmp_path)


def test_keys_with_dots_state_the_rule(tmp_path):
    for members in ([("22.05.png", PNG), ("22.05.cls", b"0")], [("a.png", PNG), ("a.1.cls", b"0")]):
        assert "A key ends at the first dot of a file name" in refusal(write_tar(tmp_path / "a.tar", members))
    assert "first dot" not in refusal(write_tar(tmp_path / "a.tar", [("a.png", PNG)]))


# Where latents go


@pytest.mark.parametrize("out", [".", "latents", "..", "cat/x"])
def test_encoding_into_the_images_is_refused(tmp_path, out):
    root = tree(tmp_path / "photos", "cat/1.png")
    with pytest.raises(UserError) as error:
        _encode(["--source", str(root), "--autoencoder", "identity", "--out", str(root / out), "--size", "8"])
    assert "lie one in the other" in str(error.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["1.png"]


def test_shards_and_runs_stay_out_of_images(tmp_path):
    """Shards beside images, or a run's files among them, would make the images no source any more."""
    root, other = tree(tmp_path / "photos", "cat/1.png"), tree(tmp_path / "others", "dog/1.png")
    for command in (_encode, data_convert.run):
        flags = (
            ["--autoencoder", "identity", "--size", "8", "--source", str(root)] if command is _encode else [str(root)]
        )
        with pytest.raises(UserError, match="holds images, beside which shards are no source"):
            command([*flags, "--out", str(other)])
    source = open_source(str(root))
    for out in (root, root / "cat" / "run"):
        with pytest.raises(UserError, match="lie one in the other"):
            check_apart(source, out, "--out", around=False)
    check_apart(source, tmp_path, "--out", around=False)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["1.png", "1.png"]


def test_encoding_into_the_source_shards_is_refused(tmp_path):
    numbered_source(tmp_path, 3)
    with pytest.raises(UserError, match="holds other shards"):
        _encode(["--source", str(tmp_path), "--autoencoder", "identity", "--out", str(tmp_path), "--size", "8"])


def test_latents_beside_pictures_of_them_are_refused(tmp_path):
    latent_source(tmp_path, np.zeros((3, 2, 3, 4, 4), np.float32))
    tree(tmp_path, "samples/1.png")
    assert "move one of the two elsewhere" in refusal(tmp_path)
