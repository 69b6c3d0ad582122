"""Compare real DALI on real shards and generated trees with Pillow, tarfile and fp64 transcriptions."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import (
    decode,
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

from fastdit.data import make_loader, open_source
from fastdit.data.order import Order
from fastdit.data.sets import make_fashion_mnist

GRAY = {"size": (5, 7), "channels": 1}


# The shipped set


def test_the_shipped_set_is_what_tarfile_and_pillow_read():
    source = open_source("fashion_mnist")
    assert (source.n, source.classes, source.class_names[9]) == (10_000, 10, "Ankle boot")
    assert np.bincount(source.labels).tolist() == [1000] * 10
    pixels, labels = [], []
    for path in sorted(Path(source.samples.paths[0]).parent.glob("*.tar"))[:4:3]:
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        pixels += (decode(files[name]) for name in sorted(files) if name.endswith(".png"))
        labels += (int(files[name]) for name in sorted(files) if name.endswith(".cls"))
    batches = take(8, source, batch=500, size=28, channels=1, shuffle=False, flip=False)
    x = torch.cat([batches[k][0] for k in (0, 1, 6, 7)])
    y = torch.cat([batches[k][1] for k in (0, 1, 6, 7)])
    assert x.dtype == torch.float32
    assert y.tolist() == labels
    assert np.abs(levels(x) - np.stack(pixels)).max() < 1e-4
    assert x.min() == -1
    assert x.max() == 1


def test_the_shipped_sets_script_is_deterministic(tmp_path):
    images = np.stack([picture(28, 28, 1, seed) for seed in range(23)])
    labels = (np.arange(23) % 10).astype(np.uint8)
    for name, array in (("images", images), ("labels", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    arguments = [str(tmp_path / "images.gz"), str(tmp_path / "labels.gz")]
    make_fashion_mnist.main(*arguments, str(tmp_path / "a"))
    subprocess.run([sys.executable, make_fashion_mnist.__file__, *arguments, str(tmp_path / "b")], check=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    source = open_source(str(tmp_path / "a"))
    x, y = take(1, source, batch=23, size=28, channels=1, shuffle=False, flip=False)[0]
    assert y.tolist() == labels.tolist()
    assert np.abs(levels(x)[..., 0] - images).max() < 1e-4


# Pixels


@pytest.mark.parametrize(
    ("form", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 80}, 0),
        ("JPEG", {"quality": 85}, 2),
        ("JPEG", {"quality": 85, "subsampling": 0}, 2),
        ("JPEG", {"quality": 85, "progressive": True}, 2),
    ],
)
def test_decoded_pixels_are_pillows(tmp_path, form, options, tolerance):
    files = [encode(picture(37, 53, seed=seed), form, **options) for seed in range(3)]
    for i, file in enumerate(files):
        (tmp_path / f"class {i % 2}" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"class {i % 2}" / "sub" / f"{i}.{form.lower()}").write_bytes(file)
    source = open_source(str(tmp_path), labels="first")
    assert source.class_names == ("class 0", "class 1")
    x, y = take(1, source, batch=3, size=(37, 53), channels=3, shuffle=False, flip=False)[0]
    expected = np.stack([decode(files[i]) for i in (0, 2, 1)])
    assert y.tolist() == [0, 0, 1]
    assert np.abs(levels(x) - expected).max() < tolerance + 1e-4


@pytest.mark.parametrize(("form", "suffix", "tolerance"), [("PNG", "png", 0), ("JPEG", "JPEG", 2)])
def test_gray_images_stay_gray(tmp_path, form, suffix, tolerance):
    files = [encode(picture(21, 33, 1, seed), form) for seed in range(3)]
    (tmp_path / "only").mkdir()
    for i, file in enumerate(files):
        (tmp_path / "only" / f"{i}.{suffix}").write_bytes(file)
    options = {"batch": 3, "size": (21, 33), "channels": 1, "shuffle": False, "flip": False}
    x, _ = take(1, open_source(str(tmp_path)), **options)[0]
    assert np.abs(levels(x) - np.stack([decode(file) for file in files])).max() < tolerance + 1e-4


def test_a_palette_image_is_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    palette = Image.fromarray(picture(16, 16)).convert("P")
    for i in range(2):
        (tmp_path / "a" / f"{i}.png").write_bytes(encode(palette, "PNG"))
    x, _ = take(1, open_source(str(tmp_path)), batch=2, size=16, channels=3, flip=False)[0]
    assert np.abs(levels(x) - np.asarray(palette.convert("RGB"))).max() < 1e-4


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(picture(16, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    (tmp_path / "a").mkdir()
    for i in range(2):
        (tmp_path / "a" / f"{i}.jpg").write_bytes(encode(image, "JPEG", exif=exif, subsampling=0))
    x, _ = take(1, open_source(str(tmp_path)), batch=2, size=(24, 16), channels=3, flip=False)[0]
    upright = decode(encode(image, "JPEG", subsampling=0)).transpose(1, 0, 2)[:, ::-1]
    assert np.abs(levels(x) - upright).max() < 2 + 1e-4


def cubic_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize with Keys' cubic (a = -1/2), widened by the scale when shrinking, edges repeated; float64 (H, W, C)."""

    def matrix(n_in: int, n_out: int) -> np.ndarray:
        scale = n_in / n_out
        wide, rows = max(scale, 1.0), np.zeros((n_out, n_in))
        for i in range(n_out):
            center = (i + 0.5) * scale
            taps = np.arange(int(center - 2 * wide) - 1, int(center + 2 * wide) + 2)
            t = np.abs((taps + 0.5 - center) / wide)
            weights = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2) * (t < 2)
            np.add.at(rows[i], taps.clip(0, n_in - 1), weights / weights.sum())
        return rows

    vertical, horizontal = matrix(image.shape[0], height), matrix(image.shape[1], width)
    return np.einsum("yh,xw,hwc->yxc", vertical, horizontal, image.astype(np.float64)).clip(0, 255)


@pytest.mark.parametrize("size", [(32, 32), (28, 41)])
def test_resize_covers_and_crops_the_center(tmp_path, size):
    """Resize portrait and landscape images of odd extents: shrink, enlarge, and neither."""
    extents = [(61, 83), (83, 61), (200, 133), (20, 33), (32, 32), (333, 101), (28, 41), (16, 17)]
    images = [picture(*extent, seed=i) for i, extent in enumerate(extents)]
    (tmp_path / "a").mkdir()
    for i, image in enumerate(images):
        (tmp_path / "a" / f"{i}.png").write_bytes(encode(image, "PNG"))
    options = {"batch": len(images), "size": size, "channels": 3, "shuffle": False, "flip": False}
    x, _ = take(1, open_source(str(tmp_path)), **options)[0]
    for found, image in zip(levels(x), images):
        scale = max(size[0] / image.shape[0], size[1] / image.shape[1])
        height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        expected = cubic_resize(image, height, width)[top : top + size[0], left : left + size[1]]
        assert np.abs(found - expected).max() < 0.6  # rounding to 8 bits, and DALI's tabulated filter


# Resume


def posteriors(n: int, kinds: int = 4, shape=(3, 5, 7), dtype=np.float32) -> np.ndarray:
    """Return posteriors (n, kinds, *shape) with means 10 * sample + half and stds 0.5 + sample / 10."""
    values = np.empty((n, kinds, *shape), dtype=dtype)
    for i in range(n):
        for half in range(kinds // 2):
            values[i, 2 * half] = 10 * i + half
            values[i, 2 * half + 1] = 0.5 + i / 10
    return values


@pytest.fixture(params=["image", "latent", "synthetic"])
def any_source(request, tmp_path):
    if request.param == "image":
        return numbered_source(tmp_path, 11), GRAY
    if request.param == "latent":
        return latent_source(tmp_path, posteriors(11)), {"size": (5, 7), "channels": 3}
    return open_source("synthetic:3x5x7:4:11"), {"size": (5, 7), "channels": 3}


def test_resume_is_bit_equal(any_source):
    """Resume at the start, in the middle, across an epoch's border, and into a loader that has prefetched."""
    source, options = any_source
    options = {**options, "batch": 4, "seed": 7, "prefetch": 3}
    whole = take(9, source, **options)
    for stop in (0, 2, 3, 5):
        first, second = make_loader(source, **options), make_loader(source, **options)
        with closing(first), closing(second):
            for _ in range(stop):
                next(first)
            for _ in range(stop % 3):
                next(second)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert second.position == 4 * stop
            for k in range(stop, 9):
                x, y = next(second)
                assert torch.equal(x, whole[k][0])
                assert torch.equal(y, whole[k][1])


def test_seeds_differ(any_source):
    source, options = any_source
    a, b, c = (take(1, source, batch=11, seed=seed, **options)[0][0] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_batches_kept_stay_what_they_were(tmp_path):
    """Check that later batches and closing do not touch the tensors, which are DALI's memory."""
    batches = take(40, numbered_source(tmp_path, 11), batch=4, seed=2, **GRAY)
    order = Order(11, 4, seed=2)
    for step, (x, _) in enumerate(batches):
        assert numbers_and_flips(x)[0] == order.request(4 * step).ids.tolist()


def test_loaders_leave_no_threads_and_no_files(tmp_path):
    source = numbered_source(tmp_path, 11)
    counts = []
    for _ in range(12):
        take(2, source, batch=4, threads=3, **GRAY)
        counts.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
    assert counts[-1] == counts[2]


# Latents


def test_latents_are_drawn_anew_with_the_right_moments(tmp_path):
    rng = np.random.default_rng(0)
    stored = np.stack([rng.normal(size=(5, 3, 5, 7)), rng.uniform(0.1, 2, (5, 3, 5, 7))], axis=1)
    source = latent_source(tmp_path, stored.astype(np.float32))
    options = {"batch": 5, "size": (5, 7), "channels": 3, "shuffle": False, "flip": False}
    draws = torch.stack([x for x, _ in take(400, source, **options)]).double().numpy()
    assert not np.array_equal(draws[0], draws[1])
    noise = (draws - stored[:, 0]) / stored[:, 1]
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size)
    assert np.abs(noise.mean(0)).max() < 5 / np.sqrt(400)
    assert np.abs(noise.var(0) - 1).max() < 5 * np.sqrt(2 / 400)
    assert len(np.unique(noise.astype(np.float32))) > 0.95 * noise.size


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_flip_to_the_stored_half_scaled_and_shifted(tmp_path, dtype):
    stored = posteriors(7, dtype=dtype)
    stored[:, 1::2] = 0
    source = latent_source(tmp_path, stored)
    options = {"batch": 4, "size": (5, 7), "channels": 3, "seed": 9}
    flips = []
    for step, (x, y) in enumerate(take(7, source, latent_scale=0.25, latent_shift=2.0, **options)):
        request = Order(7, 4, seed=9).request(4 * step)
        expected = torch.from_numpy((10.0 * request.ids + request.flips - 2) * 0.25).float()
        assert x.dtype == torch.float32
        assert torch.equal(x, expected[:, None, None, None].expand(4, 3, 5, 7))
        assert y.tolist() == [i % 2 for i in request.ids]
        flips += request.flips.tolist()
    assert 0 < sum(flips) < len(flips)


# Shards and sources


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_dialects_and_label_forms(tmp_path, form):
    """Read long names, sub-folders, non-ASCII names and `.json` labels, and ignore other files."""
    deep = "/".join(["folder" * 8] * 3)
    keys = ["a", "sub/b", f"{deep}/c", "d" * (95 if form == tarfile.USTAR_FORMAT else 140), "é"]
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for i, (key, file) in enumerate(zip(keys, numbered(5))):
            add(f"{key}.png", file)
            add(f"{key}.txt", b"a caption")
            if i % 2:
                add(f"{key}.json", json.dumps({"label": i, "url": "x"}).encode())
            else:
                add(f"{key}.cls", f"{i}\n".encode())
        add("._a.png", b"what macOS adds")
    source = open_source(str(tmp_path / "x.tar"))
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    assert [source.where(i).split("'")[1] for i in range(5)] == keys
    assert [source.read(i).tobytes() for i in range(5)] == numbered(5)


def test_the_ways_to_name_shards(tmp_path, monkeypatch):
    whole = numbered_source(tmp_path, 11)
    parts = open_source(str(tmp_path / "n-{01..02}.tar"))
    single = open_source(str(tmp_path / "n-01.tar"))
    assert [whole.n, parts.n, single.n] == [11, 7, 4]
    assert [parts.read(i).tobytes() for i in range(4)] == [whole.read(i + 4).tobytes() for i in range(4)]
    monkeypatch.chdir(tmp_path)
    assert open_source(".").n == 11


def test_classes_come_from_the_argument_the_names_or_the_labels(tmp_path):
    assert numbered_source(tmp_path, 5).classes == 3
    assert open_source(str(tmp_path), classes=7).class_names == ("0", "1", "2", "3", "4", "5", "6")
    (tmp_path / "classes.json").write_text('["ant", "bee", "cat", "dog"]')
    assert open_source(str(tmp_path)).class_names == ("ant", "bee", "cat", "dog")
    assert open_source(str(tmp_path), classes=5).class_names == ("ant", "bee", "cat", "dog", "4")


def test_synthetic_images_are_their_ids():
    source = open_source("synthetic:3x6x5:4:70")
    assert (source.kind, source.n, source.classes) == ("synthetic", 70, 4)
    options = {"batch": 35, "size": (6, 5), "channels": 3}
    x, y = take(2, source, shuffle=False, flip=False, **options)[1]
    assert np.abs(levels(x) - np.stack([source.read(i).transpose(1, 2, 0) for i in range(35, 70)])).max() < 1e-4
    assert y.tolist() == [i % 4 for i in range(35, 70)]
    again = open_source("synthetic:3x6x5:4:70")
    assert all((source.read(i) == again.read(i)).all() for i in range(70))
    x, _ = take(1, source, **options)[0]
    request = Order(70, 35).request(0)
    for found, i, flip in zip(levels(x), request.ids, request.flips):
        image = source.read(int(i)).transpose(1, 2, 0)
        assert np.abs(found - (image[:, ::-1] if flip else image)).max() < 1e-4
