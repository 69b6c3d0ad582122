"""Test that an image which DALI refuses and Pillow reads is used, and only one that both refuse is called corrupt."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import encode, levels, picture, take
from PIL import Image, ImageOps

from fastdit.commands import data_check
from fastdit.data import make_loader, open_source, pipeline, read_in_order
from fastdit.errors import UserError

SIZE = (12, 15)
OPTIONS = {"size": SIZE, "channels": 3}


def exif(tag: int, value: object) -> Image.Exif:
    tags = Image.Exif()
    tags[tag] = value
    return tags


def odd_webp(seed: int = 3) -> bytes:
    """Return a WebP file with EXIF after an image of an odd length, whose padding byte DALI's parser does not skip."""
    while True:
        image = Image.fromarray(picture(*SIZE, seed=seed))
        file = encode(image, "WEBP", lossless=True, exif=exif(0x010E, "x"))
        if pipeline._has_padding(np.frombuffer(file, np.uint8)):
            return file
        seed += 100


def folder(root: Path, files: dict[str, bytes]):
    (root / "cat").mkdir()
    for name, file in files.items():
        (root / "cat" / name).write_bytes(file)
    return open_source(str(root))


def mixed(root: Path, bad: bool = False):
    """Return a source of 12 images, every third one PNG, and where its images lie."""
    files = {}
    for i in range(12):
        form = ("PNG", "GIF", "AVIF")[i % 3]
        image = picture(*SIZE, seed=i)
        files[f"{i:02d}.{form.lower()}"] = encode(image, form) if i != 4 else odd_webp(i)
    if bad:
        files["07.gif"] = files["07.gif"][:40]
        files["08.avif"] = b"no image"
    return folder(root, files)


def upright(file: bytes) -> np.ndarray:
    """Return the pixels that Pillow decodes, turned by EXIF, uint8 (H, W, 3)."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB"))


@pytest.mark.parametrize("reader", ["dali", "torch"])
def test_every_format_gives_pillows_pixels(tmp_path, reader):
    image = Image.fromarray(picture(*SIZE))
    files = {f"0.{form.lower()}": encode(image, form) for form in ("GIF", "BMP", "TIFF", "PPM", "AVIF", "PNG")}
    files |= {"1.jp2": encode(image, "JPEG2000"), "2.webp": odd_webp(), "3.tif": encode(image.convert("1"), "TIFF")}
    files |= {f"4.{suffix}": encode(image, "JPEG", subsampling=0, quality=98) for suffix in ("jfif", "jpe")}
    source = folder(tmp_path, files)
    assert source.n == len(files)
    x = take(1, source, batch=source.n, shuffle=False, flip=False, convert=True, reader=reader, **OPTIONS)[0][0]
    for i, found in enumerate(levels(x)):
        expected = upright(Path(source.where(i)).read_bytes())
        assert np.abs(found - expected).max() < (2.1 if source.where(i)[-4:] in ("jfif", ".jpe") else 1e-3), (
            source.where(i)
        )


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["AVIF", "WEBP", "TIFF"])
def test_orientation_is_respected(tmp_path, turn, form):
    size = (15, 12) if turn > 4 else (12, 15)
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(form, {})
    file = encode(Image.fromarray(picture(*size, seed=turn)), form, exif=exif(0x0112, turn), **lossless)
    source = folder(tmp_path, {f"a.{form.lower()}": file})
    x = take(1, source, batch=1, flip=False, **OPTIONS)[0][0]
    assert np.abs(levels(x)[0] - upright(file)).max() < 1e-3


def test_the_middle_of_a_very_long_image(tmp_path, capsys):
    """Both readers give the middle, whichever way the image lies: a step of the gray level (cubic: it overshoots)."""
    long = np.where(np.arange(4800) < 2400, 60, 180)[None].repeat(3, 0).astype(np.uint8)
    files = {"a.png": encode(Image.fromarray(long), "PNG"), "b.png": encode(Image.fromarray(long.T.copy()), "PNG")}
    source = folder(tmp_path, files)
    for reader in ("dali", "torch"):
        options = {"size": (48, 48), "channels": 1, "shuffle": False, "flip": False, "reader": reader}
        flat, tall = levels(take(1, source, batch=2, threads=1, **options)[0][0])[..., 0]
        for image in (flat, tall.T):
            assert np.abs(image[:, :8] - 60).max() < 12
            assert np.abs(image[:, -8:] - 180).max() < 12
            assert np.abs(image - image[:1]).max() < 2
    data_check.run([str(tmp_path)])
    line = capsys.readouterr().out
    assert "2 images decode" in line
    assert "2 by Pillow instead of DALI" in line


MOST_BYTES = """
import re, resource, sys, torch
from pathlib import Path
from data_helpers import take
from fastdit.data import open_source
options = {"size": 256, "channels": 1, "batch": 2, "threads": 1, "prefetch": 0, "reader": sys.argv[3]}
for source in sys.argv[1:3]:
    take(1, open_source(source), device=torch.device("cpu"), **options)
    own = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss is the parent's too
    print(max(int(own[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024)
"""


@pytest.mark.parametrize("reader", ["dali", "torch"])
def test_very_long_images_cost_no_gigabytes(tmp_path, reader):
    """Scaled whole to cover 256 x 256 pixels, an image of 1 x 12,000 would take 0.8 GB in gray, and work on it more.

    The peak is compared with that of images of 256 x 256 pixels, which the same process has read before.
    """
    for name, shape in (("plain", (256, 256)), ("long", (1, 12_000))):
        (tmp_path / name).mkdir()
        images = [Image.fromarray(np.zeros(size, np.uint8)) for size in (shape, shape[::-1])]
        folder(tmp_path / name, {f"{k}.png": encode(image, "PNG") for k, image in enumerate(images)})
    command = [sys.executable, "-c", MOST_BYTES, str(tmp_path / "plain"), str(tmp_path / "long"), reader]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1] / "helpers"), CUDA_VISIBLE_DEVICES="")
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    plain, long = map(int, said.split()[-2:])
    assert long - plain < 3e8


def test_half_of_webps_with_exif_are_no_longer_corrupt(tmp_path, capsys):
    files = {}
    for k in range(40):
        image = np.random.default_rng(k).integers(0, 256, (24 + k, 40, 3), dtype="u1")
        files[f"{k:02d}.webp"] = encode(image, "WEBP", lossless=True, exif=exif(0x010E, "x"))
    folder(tmp_path, files)
    data_check.run([str(tmp_path)])
    line = capsys.readouterr().out
    assert "40 images decode (40 color; 24 x 40 to 63 x 40 pixels; " in line
    beyond = int(re.search(r"(\d+) by Pillow instead of DALI", line).group(1))
    assert beyond == sum(pipeline._has_padding(np.frombuffer(file, np.uint8)) for file in files.values())
    assert 10 < beyond < 30


def test_order_and_resumption_are_as_with_other_images(tmp_path):
    """The same pixels as PNG files give the same batches, to the bit."""
    (tmp_path / "mixed").mkdir()
    (tmp_path / "png").mkdir()
    source = mixed(tmp_path / "mixed")
    plain = folder(
        tmp_path / "png",
        {f"{i:02d}.png": encode(upright(Path(source.where(i)).read_bytes()), "PNG") for i in range(source.n)},
    )
    options = {"batch": 5, "seed": 3, "prefetch": 3, **OPTIONS}
    whole = take(8, source, **options)
    for (x, y), (expected, labels) in zip(whole, take(8, plain, **options), strict=True):
        assert torch.equal(x, expected)
        assert torch.equal(y, labels)
    first, second = make_loader(source, **options), make_loader(source, **options)
    with closing(first), closing(second):
        for _ in range(3):
            next(first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all(torch.equal(next(second)[0], x) for x, _ in whole[3:])


def test_a_failed_batch_is_decoded_by_pillow(tmp_path, monkeypatch):
    """An image whose head parses, and which DALI refuses only as it decodes: the batch is made again."""
    source = folder(tmp_path, {f"{i}.png": encode(picture(*SIZE, seed=i), "PNG") for i in range(6)})
    options = {"batch": 4, "shuffle": False, "flip": True, **OPTIONS}
    whole = take(4, source, **options)
    # A file that is cut for DALI, and whole for Pillow.
    (tmp_path / "cat" / "2.png").write_bytes(cut := encode(picture(*SIZE, seed=2), "PNG")[:-30])
    intact = np.frombuffer(encode(picture(*SIZE, seed=2), "PNG"), np.uint8)
    original = pipeline.to_pnm
    monkeypatch.setattr(pipeline, "to_pnm", lambda file: original(intact if len(file) == len(cut) else file))
    with closing(make_loader(open_source(str(tmp_path)), **options)) as loader:
        for x, _ in whole:
            assert torch.equal(next(loader)[0], x)
        assert loader.skipped == 0
        assert loader._reader.by_pillow == {2}


def test_what_both_refuse_is_corrupt(tmp_path, capsys):
    source = mixed(tmp_path, bad=True)
    with pytest.raises(UserError, match=r"07\.gif: the image \(sample 7\) is corrupt"):
        take(3, source, batch=4, shuffle=False, **OPTIONS)
    with closing(make_loader(source, batch=4, shuffle=False, on_corrupt="skip", **OPTIONS)) as loader:
        for _ in range(4):
            next(loader)
        assert loader.skipped == 2
        assert loader.state_dict()["corrupt"] == [7, 8]
    batches = read_in_order(source, [np.arange(12)], size=SIZE, device=torch.device("cpu"), on_corrupt="skip")
    assert [ids.tolist() for ids, _ in batches] == [[0, 1, 2, 3, 4, 5, 6, 9, 10, 11]]
    with pytest.raises(UserError, match="2 problems in 2 files"):
        data_check.run([str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_channels_of_the_file_count(tmp_path):
    sheer = Image.fromarray(np.dstack([picture(*SIZE), np.full(SIZE, 90, np.uint8)]))
    source = folder(tmp_path, {"a.avif": encode(sheer, "AVIF", quality=100)})
    with pytest.raises(UserError, match="4 channels"):
        take(1, source, batch=1, **OPTIONS)
    x = take(1, source, batch=1, flip=False, convert=True, **OPTIONS)[0][0]
    assert np.abs(levels(x)[0] - upright(encode(sheer, "AVIF", quality=100))).max() < 1e-3


def test_readers_leave_no_threads(tmp_path):
    before = set(threading.enumerate())
    take(3, mixed(tmp_path), batch=4, **OPTIONS)
    assert set(threading.enumerate()) <= before
