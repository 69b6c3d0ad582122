"""Test that data.crop adm gives the pixels of ADM's center_crop_arr, and is not mixed with another crop."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import encode, picture, take
from PIL import Image
from sklearn.datasets import load_sample_images

from fastdit import run_parts
from fastdit.config import Config, DataConfig
from fastdit.data import open_source, read_in_order
from fastdit.data.pillow_images import decode, fit
from fastdit.data.readers import choose_backend
from fastdit.encode import _encode
from fastdit.errors import UserError


def center_crop_arr(pil_image, image_size):
    """Crop as github.com/openai/guided-diffusion does, guided_diffusion/image_datasets.py (MIT), line by line."""
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Two photographs, 427 x 640, and noise with the highest frequencies, upright and not."""
    noise = np.random.default_rng(0).integers(0, 256, (333, 517, 3), dtype=np.uint8)
    found = [Image.fromarray(image) for image in load_sample_images().images]
    return [*found, Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2).copy())]


@pytest.mark.parametrize("size", [32, 64, 100, 128, 213, 214, 256, 500])
def test_the_pixels_are_those_of_the_original(photos, size):
    for image in photos:
        found = fit(image, (size, size), 3, "adm").transpose(1, 2, 0)
        assert np.array_equal(found, center_crop_arr(image, size))


def test_gray_images(photos):
    for image in photos:
        gray = image.convert("L")
        assert np.array_equal(fit(gray, (64, 64), 1, "adm")[0], center_crop_arr(gray, 64))


def test_it_matters_from_twice_the_size_on(photos):
    """Below, both crops differ by rounding at the border only; from there on by several levels."""
    for image in photos:
        close, far = (
            np.abs(fit(image, (size, size), 3, "adm").astype(float) - fit(image, (size, size), 3)) for size in (256, 64)
        )
        assert close.max() <= 1
        assert np.sqrt((far**2).mean()) > 2


def test_sizes_of_two_sides(photos):
    for height, width in ((40, 100), (100, 40), (64, 65)):
        for image in photos:
            assert fit(image, (height, width), 3, "adm").shape == (3, height, width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos) -> Path:
    home = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(photos):
        path = home / "images" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, "JPEG", quality=95))
    return home / "images"


def expected(source) -> list[np.ndarray]:
    files = (io.BytesIO(source.read(i).tobytes()) for i in range(source.n))
    return [center_crop_arr(Image.open(file).convert("RGB"), 64) for file in files]


def test_batches_of_training_and_of_encoding(folder):
    """The loader, and the reader of encoding, give the original's pixels of JPEG files."""
    source = open_source(str(folder))
    options = {"batch": source.n, "size": 64, "channels": 3, "shuffle": False, "flip": False, "crop": "adm"}
    x = take(1, source, **options)[0][0]
    ((_, y),) = read_in_order(source, [np.arange(source.n)], size=(64, 64), device=torch.device("cpu"), crop="adm")
    for batch in (x, y):
        found = ((batch + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        assert all(np.array_equal(a, b) for a, b in zip(found, expected(source), strict=True))


def test_dali_cannot(folder):
    assert choose_backend("auto", "adm").describe("image", 1).endswith("(data.crop adm is Pillow's)")
    assert choose_backend("torch", "adm").name == "torch"
    with pytest.raises(
        UserError, match=r"^data\.reader: DALI cannot crop as data\.crop adm does; leave it out, or set"
    ):
        take(1, open_source(str(folder)), batch=1, size=64, channels=3, crop="adm", reader="dali")


def test_latents_say_how_their_images_were_cropped(folder, tmp_path, capsys):
    flags = f"--source {folder} --autoencoder identity --size 32 --threads 1 --device cpu --mirrored false --out"
    _encode([*flags.split(), str(tmp_path / "adm"), "--crop", "adm"])
    assert capsys.readouterr().out.rstrip().endswith("--data.flip false --data.crop adm")
    _encode([*flags.split(), str(tmp_path / "center")])
    assert "--data.crop" not in capsys.readouterr().out
    read = open_source(str(tmp_path / "adm")).read(0)[0]
    pixels = fit(decode(open_source(str(folder)).read(0))[0], (32, 32), 3, "adm")
    assert np.abs((read.astype(float) + 1) * 127.5 - pixels).max() < 0.1
    with pytest.raises(UserError, match="was begun with crop adm, now it is center"):
        _encode([*flags.split(), str(tmp_path / "adm")])

    # A run says which crop it expects. Latents of older versions, which do not say it, fit any.
    data = {"size": 32, "channels": 3, "flip": False}
    for crop, other in (("adm", "center"), ("center", "adm")):
        config = Config(data=DataConfig(source=str(tmp_path / crop), crop=crop, **data))
        assert run_parts.open_data(config).n == 4
        with pytest.raises(UserError, match=rf"^data\.crop: {other}, but the latents in .* --data\.crop {crop}"):
            run_parts.open_data(Config(data=DataConfig(source=str(tmp_path / crop), crop=other, **data)))
    manifest = tmp_path / "adm" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("crop") == "adm"
    manifest.write_text(json.dumps(content))
    assert run_parts.open_data(Config(data=DataConfig(source=str(tmp_path / "adm"), **data))).n == 4


def test_an_older_folder_of_latents_goes_on(folder, tmp_path):
    """Its manifest has no crop, and stands for the center."""
    flags = f"--source {folder} --autoencoder identity --size 32 --threads 1 --device cpu --out {tmp_path}/x".split()
    _encode(flags)
    manifest = tmp_path / "x" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("crop") == "center"
    manifest.write_text(json.dumps(content))
    _encode(flags)
    with pytest.raises(UserError, match="was begun with crop center, now it is adm"):
        _encode([*flags, "--crop", "adm"])


def test_very_long_images_are_cut_first():
    assert fit(Image.fromarray(picture(3, 4000)), (16, 16), 3, "adm").shape == (3, 16, 16)
