"""Test latents in 8 bits, how well they decode, and latents standardized by their channels' statistics."""

import json
import math
import re
from contextlib import closing

import numpy as np
import pytest
import torch
import yaml
from data_helpers import encode as encoded
from data_helpers import latent_source, picture, take
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from launching import TINY, forked, metrics

from fastdit import run_parts
from fastdit.commands.data_check import run as check
from fastdit.config import Config, DataConfig, NoiseConfig
from fastdit.data import make_loader, open_source, write_shards
from fastdit.data.latents import LatentForm, quantize, quantized_dtype
from fastdit.encode import _encode
from fastdit.errors import UserError
from fastdit.models import LatentDecoder, open_autoencoder
from fastdit.noise import EDM
from fastdit.parser import parse

N = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write smooth images of 17 x 26 pixels in shards of 5; image i has label i % 2."""
    folder = tmp_path_factory.mktemp("images")
    files = [encoded(picture(17, 26, seed=i), "PNG") for i in range(N)]
    samples = ((f"s{i:02d}", {"png": file, "cls": str(i % 2).encode()}) for i, file in enumerate(files))
    write_shards(folder / "i-%d.tar", samples, 5)
    return folder


def encode(images, out, flags: str = "") -> dict:
    """Encode with the autoencoder space_to_depth:2, and return the manifest."""
    fixed = f"--source {images} --autoencoder space_to_depth:2 --out {out} --size [16,24] --per_shard 5 --device cpu"
    _encode([*fixed.split(), *flags.split()])
    return json.loads((out / "manifest.json").read_text())


def read_all(folder, **options) -> torch.Tensor:
    source = open_source(str(folder))
    options = {"batch": source.n, "size": (8, 12), "channels": 12, "shuffle": False, "flip": False} | options
    return take(1, source, **options)[0][0]


# -- 8 bits --


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(arrays.arrays(np.float32, (2, 3, 4, 5), elements=st.floats(-1e4, 1e4, width=32)))
def test_quantized_values_are_off_by_half_a_step_at_most(means):
    records = quantize(means)
    form = LatentForm.of(records.dtype, records.shape)
    views = torch.from_numpy(records.view(np.uint8).reshape(2, -1).copy())
    read, std = form.unpack(views)
    assert std is None
    assert form.view_bytes == views.shape[1] == 3 * 4 * 5 + 2 * 3 * 4
    spread = means.max((-2, -1)) - means.min((-2, -1))
    fp32 = np.finfo(np.float32)
    rounding = 4 * fp32.eps * np.abs(means).max((-2, -1)) + 255 * fp32.smallest_subnormal  # below that a step is 0
    off = np.abs(read.numpy().astype(np.float64) - means).max((-2, -1))
    assert (off <= spread / 510 + rounding).all()
    assert (off[spread == 0] == 0).all()
    assert np.load(_file(records)).tobytes() == records.tobytes()


def _file(array: np.ndarray):
    import io

    out = io.BytesIO()
    np.save(out, array)
    out.seek(0)
    return out


def test_forms_that_are_no_latents():
    good = quantized_dtype((3, 4, 5))
    assert LatentForm.of(good, (2,)).views == 2
    other = np.dtype([("low", "<f4", (3,)), ("codes", "u1", (3, 4, 5))])
    swapped = np.dtype([("step", "<f4", (3,)), ("low", "<f4", (3,)), ("codes", "u1", (3, 4, 5))])
    wrong = [(good, (3,)), (good, (1, 2)), (good, ()), (other, (1,)), (swapped, (1,)), (np.dtype("u1"), (2, 3, 4, 5))]
    wrong += [(np.dtype("<f8"), (2, 3, 4, 5)), (np.dtype("<f4"), (3, 3, 4, 5)), (np.dtype("<f4"), (2, 0, 4, 5))]
    wrong += [(quantized_dtype((3, 0, 5)), (1,)), (np.dtype([("codes", "u1")]), (1,))]
    for dtype, shape in wrong:
        with pytest.raises(ValueError, match="not float16 or float32"):
            LatentForm.of(dtype, shape)


def test_a_quantized_source_that_changes_its_form_is_refused(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first = latent_source(tmp_path / "a", quantize(np.ones((3, 2, 3, 4, 5), np.float32)))
    latent_source(tmp_path / "b", quantize(np.ones((3, 1, 3, 4, 5), np.float32)))
    (tmp_path / "b/l-0.tar").rename(tmp_path / "a/l-1.tar")
    assert first.samples.form.views == 2
    with pytest.raises(UserError, match=r"l-1.tar: byte \d+: 'l000': the latent is not uint8 \(3, 4, 5\) with "):
        open_source(str(tmp_path / "a"))


def test_encoded_in_8_bits(images, tmp_path):
    """Compare with float32 latents: values, statistics, size, decoded images, flips."""
    exact, small = (
        encode(images, tmp_path / "exact", "--dtype float32"),
        encode(images, tmp_path / "8", "--dtype uint8"),
    )
    x, x_small = read_all(tmp_path / "exact"), read_all(tmp_path / "8")
    step = (x.amax((-2, -1)) - x.amin((-2, -1))) / 255
    off = (x - x_small).abs().amax((-2, -1))
    assert (off <= step * 0.501).all()
    assert (off > step * 0.25).any()
    assert torch.allclose(
        read_all(tmp_path / "8", flip=True, batch=5), read_all(tmp_path / "exact", flip=True, batch=5), atol=0.01
    )
    form = open_source(str(tmp_path / "8")).samples.form
    assert (form.views, form.view_bytes) == (2, 12 * 8 * 12 + 2 * 4 * 12)
    assert np.allclose(small["channel_mean"], exact["channel_mean"], atol=1e-3)
    assert np.allclose(small["channel_std"], exact["channel_std"], atol=1e-3)
    assert not np.array_equal(small["channel_mean"], exact["channel_mean"])


def test_the_psnr_told_is_that_of_pictures_decoded(images, tmp_path):
    """Measure the loss of 8 bits alone, because space_to_depth loses nothing."""
    psnr = encode(images, tmp_path / "8", "--dtype uint8 --batch 3")["psnr"]
    assert (psnr["pictures"], psnr["autoencoder"]) == (3 + 3 + 2, None)
    encode(images, tmp_path / "exact", "--dtype float32")
    autoencoder, few = open_autoencoder("space_to_depth:2"), [0, 1, 2, 5, 6, 7, 10, 11]
    true, seen = (autoencoder.decode(read_all(tmp_path / name)[few]).double() for name in ("exact", "8"))
    error = (true - seen.clamp(-1, 1)).square().mean().item()
    assert psnr["stored"] == pytest.approx(10 * math.log10(2**2 / error), abs=1e-3)
    assert 45 < psnr["stored"] < 65


# -- standardized --


def settings_for(folder, noise: str, **data) -> Config:
    sizes = {"source": str(folder), "size": (8, 12), "channels": 12, "standardize": "channels", "flip": False}
    return Config(data=DataConfig(**(sizes | data)), noise=NoiseConfig(name=noise, edm=EDM(sigma_data=0.7)))


@pytest.mark.parametrize(("noise", "deviation"), [("edm", 0.7), ("flow", 1.0), ("ddpm", 1.0)])
def test_standardized_channels_have_the_moments_asked_for(images, tmp_path, noise, deviation):
    manifest = encode(images, tmp_path / "l", "--dtype float32 --mirrored false")
    source = open_source(str(tmp_path / "l"))
    config = run_parts.standardized(settings_for(tmp_path / "l", noise), source)
    assert config.data.latent_shift == tuple(manifest["channel_mean"])
    assert run_parts.standardized(config, source) == config, "as a resumed run has it"
    loader = run_parts.build_loader(config, source, batch=N, rank=0, world=1, device=torch.device("cpu"))
    with closing(loader):
        x, _ = next(loader)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.full((12,), deviation), rtol=1e-4)
    data = config.data
    decoder = LatentDecoder(open_autoencoder("space_to_depth:2"), scale=data.latent_scale, shift=data.latent_shift)
    plain = make_loader(source, batch=N, size=(8, 12), channels=12, flip=False)
    with closing(plain):
        z, _ = next(plain)
    assert torch.allclose(decoder(x), decoder.autoencoder.decode(z), atol=1e-5)


def test_what_cannot_be_standardized(images, tmp_path):
    encode(images, tmp_path / "l", "--mirrored false")
    source = open_source(str(tmp_path / "l"))
    with pytest.raises(UserError, match=r"data.standardize: latent_scale 0.5 and latent_shift 0.0 are not what"):
        run_parts.standardized(settings_for(tmp_path / "l", "edm", latent_scale=0.5), source)
    with pytest.raises(UserError, match=r"data.standardize: synthetic has no manifest"):
        run_parts.standardized(settings_for("synthetic", "edm"), open_source("synthetic"))
    (tmp_path / "l/manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"l/manifest.json: is no manifest of shards"):
        run_parts.standardized(settings_for(tmp_path / "l", "edm"), source)
    (tmp_path / "l/manifest.json").unlink()
    with pytest.raises(UserError, match="has no manifest with statistics of channels"):
        run_parts.standardized(settings_for(tmp_path / "l", "edm"), source)
    with pytest.raises(UserError, match=r"data.latent_scale: 2 numbers for 4 channels"):
        parse(["--data.channels", "4", "--data.latent_scale", "[1,2]"])


@pytest.mark.launch
def test_a_run_keeps_the_numbers_and_goes_on_with_them(images, tmp_path):
    """Train, resume, and sample without the data at hand."""
    encode(images, tmp_path / "l", "--dtype uint8 --mirrored false")
    out = tmp_path / "run"
    flags = ["--data.source", tmp_path / "l", "--data.size", "[8,12]", "--data.channels", 12, "--data.flip", "false"]
    flags += ["--data.standardize", "channels", "--data.autoencoder", "space_to_depth:2", "--model.patch", 4]
    forked(*TINY, *flags, "--steps", 2, "--save_every", 1, "--out", out).succeeded()
    data = yaml.safe_load((out / "config.yaml").read_text())["data"]
    assert len(data["latent_scale"]) == len(data["latent_shift"]) == 12
    forked("--resume", "--out", out, "--steps", 4, "--device", "cpu").succeeded()
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    manifest = json.loads((tmp_path / "l/manifest.json").read_text())
    manifest["channel_mean"][3] += 0.1
    (tmp_path / "l/manifest.json").write_text(json.dumps(manifest))
    other = forked("--resume", "--out", out, "--steps", 6, "--device", "cpu")
    assert other.code == 2
    assert "error: data.standardize: latent_scale (" in other.text
    (tmp_path / "l").rename(tmp_path / "away")
    forked("--run", out, "--n", 4, "--device", "cpu", "--out", tmp_path / "x.png", program="fastdit.sample").succeeded()


def test_damage_to_8_bit_latents_is_found(tmp_path, capsys):
    records = quantize(np.random.default_rng(0).normal(size=(7, 2, 3, 4, 5)).astype(np.float32))
    records["step"][2, 1, 0], records["low"][5, 0, 2] = -0.5, np.nan
    latent_source(tmp_path, records)
    with pytest.raises(UserError, match="2 problems in 2 files"):
        check([str(tmp_path)])
    first, second = capsys.readouterr().out.splitlines()
    assert re.search(r"l-0.tar: byte \d+: 'l002': steps of the latent are negative; encode it again", first)
    assert re.search(r"l-1.tar: byte \d+: 'l005': values of the latent are not finite; encode it again", second)
    (tmp_path / "good").mkdir()
    latent_source(tmp_path / "good", records[[0, 1, 3]])
    check([str(tmp_path / "good")])
    assert "3 samples, 2 classes" in (text := capsys.readouterr().out)
    assert "latents uint8 (3, 4, 5) with mirrored ones are finite, none far out of range" in text
