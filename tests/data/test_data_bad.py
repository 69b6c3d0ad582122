"""Test bad data: each case ends in one clear line that names the file, and none hangs or goes unnoticed."""

import io
import json
import re
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import (
    encode,
    latent_source,
    levels,
    numbered,
    numbered_source,
    numbers_and_flips,
    picture,
    take,
)
from PIL import Image

from fastdit.data import make_loader, open_source, write_shards
from fastdit.data.order import Order
from fastdit.errors import UserError

GRAY = {"size": (5, 7), "channels": 1}
PNG = numbered(1)[0]


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    for part in parts:
        assert part in text


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


# Paths


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("missing", ["missing", "fashion_mnist"]),
        ("", ["data.source", "fashion_mnist"]),
        ("x-{0..3}.tar", ["x-0.tar", "no such shard"]),
        ("x-{3..0}.tar", ["{3..0}", "empty"]),
        ("empty", ["empty", "class folders"]),
        ("flat", ["flat", "class folders"]),
        ("hollow", ["hollow", "cat", "no images"]),
        ("synthetic:3x4", ["synthetic:3x4", "synthetic:CxHxW"]),
        ("synthetic:3x4x4:0:9", ["at least 1"]),
    ],
)
def test_paths_that_hold_no_data(tmp_path, monkeypatch, name, parts):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "flat", "hollow/ant", "hollow/cat"):
        Path(folder).mkdir(parents=True)
    Path("flat/a.png").write_bytes(PNG)
    Path("hollow/ant/a.png").write_bytes(PNG)
    Path("hollow/cat/notes.txt").write_text("no image")
    with pytest.raises(UserError) as error:
        open_source(name)
    assert_one_line(error, *parts)


# Shards

GOOD = [("a.png", PNG), ("a.cls", b"0"), ("b.png", PNG), ("b.cls", b"1")]


@pytest.mark.parametrize(
    ("members", "parts"),
    [
        ([], ["no samples"]),
        ([*GOOD, ("c.png", PNG)], ["'c'", "no label"]),
        ([*GOOD, ("c.cls", b"1")], ["'c'", "no image"]),
        ([*GOOD, ("a.png", PNG)], ["'a'", "unique"]),
        ([*GOOD, ("a.cls", b"1")], ["'a'", "unique"]),
        ([*GOOD, ("a.jpg", PNG)], ["'a'", "2 images"]),
        ([*GOOD, ("c.png", PNG), ("c.cls", b"cat")], ["'c.cls'", "class number", "cat"]),
        ([*GOOD, ("c.png", PNG), ("c.cls", b"")], ["'c.cls'", "class number"]),
        ([*GOOD, ("c.png", PNG), ("c.cls", b"-1")], ["'c'", "label -1 is out of range"]),
        ([*GOOD, ("c.png", PNG), ("c.json", b"{")], ["'c.json'", "class number"]),
        ([*GOOD, ("c.png", PNG), ("c.json", b"[3]")], ["'c.json'", "class number"]),
        ([*GOOD, ("c.png", PNG), ("c.json", b'{"label": 1.5}')], ["'c.json'", "class number"]),
        ([*GOOD, ("c.png", PNG), ("c.json", b'{"caption": "x"}')], ["'c.json'", "class number"]),
        ([*GOOD, ("c.npy", npy(np.zeros((2, 3, 4, 4)))), ("c.cls", b"1")], ["'c'", "mixes"]),
    ],
)
def test_shards_of_bad_samples(tmp_path, members, parts):
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError) as error:
        open_source(path)
    assert_one_line(error, "bad.tar", *parts)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_cut_anywhere_is_an_error(tmp_path, form):
    """Cut anywhere before the end-of-archive block; a member's size does not always show the cut."""
    with tarfile.open(tmp_path / "whole.tar", "w", format=form) as tar:
        for key in ("a" * 10, "b" * 20 if form == tarfile.USTAR_FORMAT else "b" * 120):
            for name, content in ((f"{key}.png", PNG), (f"{key}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    whole = (tmp_path / "whole.tar").read_bytes()
    open_source(str(tmp_path / "whole.tar"))
    for cut in [*range(0, end, 128), end - 1, end + 511]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError) as error:
            open_source(str(tmp_path / "cut.tar"))
        assert_one_line(error, "cut.tar", "truncated" if cut else "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[: end - 512])
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path / "cut.tar"))
    assert_one_line(error, "truncated", f"{key}.cls", f"byte {end - 1024}: ")


def test_damaged_headers_and_joined_archives(tmp_path):
    path = tmp_path / "x.tar"
    whole = Path(write_tar(path, GOOD)).read_bytes()
    for position in (3, 130, 150, 512 + 512 + 10):
        damaged = bytearray(whole)
        damaged[position] ^= 0x15
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            open_source(str(path))
        assert_one_line(error, "x.tar", f"byte {1024 if position > 512 else 0}: damaged tar header")
    path.write_bytes(whole + whole)
    with pytest.raises(UserError) as error:
        open_source(str(path))
    assert_one_line(error, "x.tar", "end of archive")
    path.write_bytes(PNG)
    with pytest.raises(UserError):
        open_source(str(path))


def test_labels_out_of_range_and_class_names_that_are_none(tmp_path):
    numbered_source(tmp_path, 5)
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path), classes=2)
    assert_one_line(error, "n-00.tar", "'s002'", "label 2", "2 classes")
    for text in ("{", '{"a": 1}', "[]", "[1, 2, 3]"):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(UserError) as error:
            open_source(str(tmp_path))
        assert_one_line(error, "classes.json")
    (tmp_path / "classes.json").write_text('["ant", "bee"]')
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path))
    assert_one_line(error, "label 2", "2 classes")


# Latents


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        (b"no array", ["'b'", "like"]),
        (npy(np.zeros((2, 3, 4, 5), np.float32)), ["'b'", "like"]),
        (npy(np.zeros((2, 3, 4, 4), np.float16)), ["'b'", "like"]),
        (npy(np.zeros((2, 4, 3, 4), np.float32)), ["'b'", "like"]),
    ],
)
def test_latents_unlike_the_first(tmp_path, second, parts):
    first = npy(np.zeros((2, 3, 4, 4), np.float32))
    members = [("a.npy", first), ("a.cls", b"0"), ("b.npy", second), ("b.cls", b"0")]
    path = write_tar(tmp_path / "l.tar", members)
    with pytest.raises(UserError) as error:
        open_source(path)
    assert_one_line(error, "l.tar", *parts)


@pytest.mark.parametrize(
    "file",
    [
        b"no array",
        b"",
        npy(np.zeros((2, 3, 4, 4), np.float64)),
        npy(np.zeros((3, 3, 4, 4), np.float32)),
        npy(np.zeros((2, 3, 4), np.float32)),
        npy(np.asfortranarray(np.zeros((2, 3, 4, 4), np.float32))),
        npy(np.zeros((2, 3, 4, 4), np.float32))[:-4],
        npy(np.array([{}, {}])),
        npy(np.zeros((2, 3, 4, 4), np.float32)).replace(b"2, 3, 4, 4", b"2,-3,-4, 4"),
        npy(np.zeros((2, 3, 4, 4), np.float32)).replace(b"}", b" "),
        npy(np.zeros((2, 3, 4, 4), np.float32)).replace(b"'fortran_order'", b"\x00ortran_order'"),
    ],
)
def test_files_that_are_no_latents(tmp_path, file):
    path = write_tar(tmp_path / "l.tar", [("a.npy", file), ("a.cls", b"0")])
    with pytest.raises(UserError) as error:
        open_source(path)
    assert_one_line(error, "l.tar", "'a'", "no latent")


def test_latents_that_do_not_fit_the_loader(tmp_path):
    source = latent_source(tmp_path, np.zeros((4, 2, 3, 4, 5), np.float32))
    for size, channels in ((4, 3), ((4, 5), 4), ((5, 4), 3)):
        with pytest.raises(UserError) as error:
            make_loader(source, batch=2, size=size, channels=channels, flip=False)
        assert_one_line(error, str(tmp_path), "(3, 4, 5)", "channels")
    with pytest.raises(UserError) as error:
        make_loader(source, batch=2, size=(4, 5), channels=3)
    assert_one_line(error, str(tmp_path), "flip")


# Images

BAD_IMAGES = {
    "cut.png": PNG[:-20],
    "cut.jpg": encode(picture(20, 20), "JPEG")[:-30],
    "cut.webp": encode(picture(20, 20), "WEBP")[:-60],
    "empty.png": b"",
    "page.png": b"<html>not found</html>",
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "zeros.jpg": bytes(500),
    "huge.jpg": re.sub(
        rb"(\xff\xc0...)....", rb"\1" + b"\x7f\xff" * 2, encode(picture(20, 20), "JPEG"), flags=re.DOTALL
    ),
}

STAND_INS = {"page.png": ("HTML page", "download"), "pointer.jpg": ("Git LFS pointer", "git lfs pull")}


def source_with(folder: Path, bad: dict[int, tuple[str, bytes]], n: int = 11):
    """Return a source of `numbered` images, those in `bad` replaced by (suffix, bytes)."""

    def samples():
        for i, png in enumerate(numbered(n)):
            suffix, content = bad.get(i, ("png", png))
            yield f"s{i:03d}", {suffix: content, "cls": str(i % 3).encode()}

    write_shards(folder / "n-%02d.tar", samples(), 4)
    return open_source(str(folder))


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_corrupt_image_stops_and_is_named(tmp_path, name):
    source = source_with(tmp_path, {6: (name.partition(".")[2], BAD_IMAGES[name])})
    with closing(make_loader(source, batch=4, shuffle=False, flip=False, **GRAY)) as loader:
        assert numbers_and_flips(next(loader)[0])[0] == [0, 1, 2, 3]
        for _ in range(2):  # asked again, it says it again
            with pytest.raises(UserError) as error:
                next(loader)
            fault = STAND_INS.get(name, ("corrupt", "--data.on_corrupt skip"))
            assert_one_line(error, "n-01.tar", "'s006'", "sample 6", *fault)
        assert loader.position == 4


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_corrupt_image_is_skipped_and_counted(tmp_path, name):
    bad = (name.partition(".")[2], BAD_IMAGES[name])
    source = source_with(tmp_path, {6: bad, 7: bad, 10: bad})
    options = {"batch": 4, "shuffle": False, "flip": False, "on_corrupt": "skip", **GRAY}
    with closing(make_loader(source, **options)) as loader:
        seen = [numbers_and_flips(next(loader)[0])[0] for _ in range(3)]
    assert seen == [[0, 1, 2, 3], [4, 5, 8, 8], [8, 9, 0, 0]]
    assert loader.skipped == 3


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_corrupt_image_in_a_large_batch(tmp_path, name):
    """Decode a batch of 40. DALI 2.4 crashes on an image that it cannot parse in a batch of 32 or more."""
    bad = (name.partition(".")[2], BAD_IMAGES[name])
    source = source_with(tmp_path, {3: bad, 70: bad}, n=80)
    options = {"batch": 40, "shuffle": False, "flip": False, **GRAY}
    with closing(make_loader(source, on_corrupt="skip", **options)) as loader:
        seen = [i for _ in range(2) for i in numbers_and_flips(next(loader)[0])[0]]
    assert seen == [i + (i in (3, 70)) for i in range(80)]
    with pytest.raises(UserError) as error:
        take(1, source, **options)
    assert_one_line(error, "n-00.tar", "'s003'", "corrupt")


def test_skipping_is_deterministic_and_resumes_bit_equal(tmp_path):
    bad = ("png", BAD_IMAGES["cut.png"])
    source = source_with(tmp_path, {2: bad, 3: bad, 9: bad})
    options = {"batch": 3, "seed": 4, "on_corrupt": "skip", **GRAY}
    whole = take(12, source, **options)
    for k, (x, y) in enumerate(whole):
        request = Order(11, 3, seed=4).request(3 * k, {2, 3, 9})
        assert numbers_and_flips(x) == (request.ids.tolist(), request.flips.tolist())
        assert y.tolist() == [i % 3 for i in request.ids]
    for stop in (1, 4, 8):
        first, second = make_loader(source, **options), make_loader(source, **options)
        with closing(first), closing(second):
            for _ in range(stop):
                next(first)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert second.skipped == first.skipped
            for x, y in whole[stop:]:
                found = next(second)
                assert torch.equal(found[0], x)
                assert torch.equal(found[1], y)
            assert second.skipped == 3


def test_nothing_but_corrupt_images(tmp_path):
    source = source_with(tmp_path, dict.fromkeys(range(5), ("png", b"x")), n=5)
    with pytest.raises(UserError) as error:
        take(3, source, batch=2, on_corrupt="skip", **GRAY)
    assert_one_line(error, str(tmp_path), "none of its 5 images")


def test_an_image_that_vanished(tmp_path):
    for i in range(4):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{i}.png").write_bytes(PNG)
    source = open_source(str(tmp_path))
    (tmp_path / "a" / "2.png").unlink()
    with pytest.raises(UserError) as error:
        take(1, source, batch=4, **GRAY)
    assert_one_line(error, "2.png", "cannot be read")


COLOR = Image.fromarray(picture(8, 8))
SHEER = Image.fromarray(np.dstack([picture(8, 8), np.full((8, 8), 90, np.uint8)]))
OTHER_CHANNELS = [
    (3, encode(COLOR.convert("L"), "PNG"), "png", "1 channels"),
    (3, encode(COLOR.convert("L"), "JPEG"), "jpg", "1 channels"),
    (3, encode(COLOR.convert("LA"), "PNG"), "png", "2 channels"),
    (3, encode(SHEER, "PNG"), "png", "4 channels"),
    (3, encode(SHEER, "WEBP", quality=80), "webp", "4 channels"),
    (3, encode(SHEER, "WEBP", lossless=True), "webp", "4 channels"),
    (3, encode(COLOR.convert("CMYK"), "JPEG"), "jpg", "4 channels"),
    (1, encode(COLOR, "PNG"), "png", "3 channels"),
    (1, encode(COLOR, "JPEG"), "jpg", "3 channels"),
    (1, encode(COLOR, "WEBP"), "webp", "3 channels"),
    (1, encode(COLOR.convert("P"), "PNG"), "png", "3 channels"),
    (1, encode(COLOR.convert("LA"), "PNG"), "png", "2 channels"),
]


@pytest.mark.parametrize(("channels", "file", "suffix", "message"), OTHER_CHANNELS)
def test_an_image_of_other_channels(tmp_path, channels, file, suffix, message):
    """Refuse the image, also with on_corrupt skip: a wrong setting must not skip the data set."""
    good = encode(COLOR if channels == 3 else COLOR.convert("L"), "PNG")
    samples = [(f"s{i}", {"png": good, "cls": b"0"}) for i in range(5)]
    write_shards(tmp_path / "c-%d.tar", [*samples, ("odd", {suffix: file, "cls": b"0"})], 6)
    source = open_source(str(tmp_path))
    for on_corrupt in ("stop", "skip"):
        with pytest.raises(UserError) as error:
            take(2, source, batch=3, size=8, channels=channels, shuffle=False, on_corrupt=on_corrupt)
        assert_one_line(error, "c-0.tar", "'odd'", message, f"takes {channels}", "data.convert")


@pytest.mark.parametrize(("channels", "file", "suffix", "message"), OTHER_CHANNELS)
def test_an_image_of_other_channels_is_made_to_fit(tmp_path, channels, file, suffix, message):
    """Convert as Pillow does. Decoders of JPEG and WebP and the weights of colors in gray differ by a few levels."""
    samples = [("odd", {suffix: file, "cls": b"0"}), ("good", {"png": encode(COLOR, "PNG"), "cls": b"0"})]
    write_shards(tmp_path / "c-%d.tar", samples, 2)
    source = open_source(str(tmp_path))
    x, _ = take(1, source, batch=2, size=8, channels=channels, shuffle=False, flip=False, convert=True)[0]
    for found, image in zip(levels(x), (Image.open(io.BytesIO(file)), COLOR)):
        expected = np.asarray(image.convert("RGB" if channels == 3 else "L"), dtype=np.float64).reshape(8, 8, channels)
        assert np.abs(found - expected).max() < (4 if image.mode != "CMYK" else 12)


def test_channels_no_image_has(tmp_path):
    with pytest.raises(UserError) as error:
        make_loader(numbered_source(tmp_path, 5), batch=2, size=8, channels=4)
    assert_one_line(error, str(tmp_path), "takes 4")


# States and arguments


def test_a_state_of_other_data_or_seed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    options = {"batch": 2, **GRAY}
    state = make_loader(numbered_source(tmp_path / "a", 5), **options).state_dict()
    for loader, parts in (
        (make_loader(numbered_source(tmp_path / "b", 6), **options), ["number of samples is 6", "was 5"]),
        (make_loader(numbered_source(tmp_path / "a", 5), seed=3, **options), ["seed is 3", "was 0"]),
    ):
        with pytest.raises(UserError) as error:
            loader.load_state_dict(state)
        assert_one_line(error, str(tmp_path), *parts)


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"rank": 2, "world": 2}, {"threads": 0}, {"prefetch": -1}, {"on_corrupt": "no"}]
)
def test_arguments_that_make_no_sense(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_loader(numbered_source(tmp_path, 5), **{"batch": 2, **GRAY, **wrong})
