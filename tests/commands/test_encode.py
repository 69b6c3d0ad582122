"""Images to latent shards: what they hold, continuing, ranks, statistics, mistakes; and training on them."""

import hashlib
import json
import logging
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoder_helpers import diffusers_model
from data_helpers import encode as encoded
from data_helpers import latent_source, picture
from launching import TINY, Launched, forked, metrics, python
from PIL import Image

from fastdit.commands import encoding
from fastdit.data import make_loader, open_source, write_shards
from fastdit.encode import _encode
from fastdit.errors import UserError
from fastdit.models import open_autoencoder
from fastdit.sample import _sample

SIZE, NAMES, N = 16, ["bird", "cat", "dog"], 23


def image(i: int) -> np.ndarray:
    """Return a small picture, whose height and width depend on `i`."""
    return picture(20 + 3 * (i % 5), 33 - 2 * (i % 7), seed=i)


def image_shards(folder: Path, files: list[bytes], suffix: str = "png") -> Path:
    """Image i has label i % 3."""
    folder.mkdir()
    samples = ((f"s{i:03d}", {suffix: file, "cls": str(i % 3).encode()}) for i, file in enumerate(files))
    write_shards(folder / "i-%02d.tar", samples, 7)
    (folder / "classes.json").write_text(json.dumps(NAMES))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """images/ in shards of 7; vae/, a random AutoencoderKL that makes 4 x 4 x 4 of 16 x 16 pixels; tiny/, another."""
    home = tmp_path_factory.mktemp("encode")
    image_shards(home / "images", [encoded(image(i), "PNG") for i in range(N)])
    diffusers_model("AutoencoderKL").save_pretrained(home / "vae")
    diffusers_model("AutoencoderTiny").save_pretrained(home / "tiny")
    return home


@pytest.fixture
def encode(home, tmp_path):
    """encode("--flags ...", out="name"): the folder written, after an in-process run of the command on the CPU."""

    def encode(flags: str = "", out: str = "out", source: Path = home / "images", autoencoder=home / "vae") -> Path:
        fixed = f"--size {SIZE} --per_shard 5 --batch 2 --threads 1 --device cpu"
        names = ["--source", source, "--autoencoder", autoencoder, "--out", tmp_path / out]
        _encode([*map(str, names), *fixed.split(), *flags.split()])
        return tmp_path / out

    return encode


@pytest.fixture(autouse=True)
def one_thread():
    """Take one thread, as launched processes do: with another number convolutions round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def refusal(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cropped(home: Path) -> torch.Tensor:
    """Return what the loader shows a network of all images, in order."""
    options = {"batch": N, "size": SIZE, "channels": 3, "shuffle": False, "flip": False}
    loader = make_loader(open_source(str(home / "images")), **options)
    x, _ = next(loader)
    loader.close()
    return x


# -- what is written --


@pytest.mark.parametrize(("dtype", "mirrored"), [("float32", True), ("float16", True), ("float16", False)])
def test_the_shards_hold_the_posteriors_in_order(encode, home, dtype, mirrored):
    folder = encode(f"--dtype {dtype} --mirrored {str(mirrored).lower()}")
    source, autoencoder = open_source(str(folder)), open_autoencoder(str(home / "vae"))
    assert (source.kind, source.n, source.class_names) == ("latent", N, tuple(NAMES))
    assert source.labels.tolist() == [i % 3 for i in range(N)]
    form = source.samples.form
    assert (form.shape, form.views, form.dtype) == ((4, 4, 4), 2 if mirrored else 1, dtype)
    x = cropped(home)
    with torch.no_grad():
        told = torch.stack([*autoencoder.encode(x), *autoencoder.encode(x.flip(-1))], 1)[:, : 4 if mirrored else 2]
    stored = torch.from_numpy(np.stack([source.read(i) for i in range(N)]))
    tolerance = {"float32": 1e-5, "float16": 1e-3}[dtype]
    torch.testing.assert_close(stored.float(), told, rtol=tolerance, atol=tolerance)
    assert [source.where(i).split("'")[1] for i in (0, 22)] == ["00000000", "00000022"]


def test_the_manifest(encode, home):
    folder = encode()
    told, autoencoder = manifest(folder), open_autoencoder(str(home / "vae"))
    assert sorted(contents(folder)) == ["classes.json", *(f"latents-{k:05d}.tar" for k in range(5)), "manifest.json"]
    assert not (folder / ".unfinished").exists()
    assert told["autoencoder"] == {
        "name": str(home / "vae"),
        "sha256": autoencoder.hash,
        "scale": 0.3611,
        "shift": 0.1159,
    }
    assert (told["source"], told["samples"], told["encoded"]) == (str(home / "images"), N, N)
    assert (told["size"], told["dtype"], told["mirrored"], told["per_shard"]) == ([SIZE, SIZE], "float16", True, 5)
    assert told["counts"] == [8, 8, 7]
    assert {name: shard["samples"] for name, shard in told["shards"].items()} == {
        f"latents-{k:05d}.tar": 5 if k < 4 else 3 for k in range(5)
    }
    for name, shard in told["shards"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == shard["sha256"]


def test_channel_statistics_are_those_of_the_draws(encode):
    folder = encode()
    source, told = open_source(str(folder)), manifest(folder)
    posteriors = np.stack([source.read(i) for i in range(N)]).astype(np.float64)
    mean, std = posteriors[:, 0::2], posteriors[:, 1::2]
    draws = mean + std * np.random.default_rng(0).standard_normal((400, *mean.shape))
    assert np.allclose(told["channel_mean"], mean.mean((0, 1, 3, 4)), rtol=1e-9)
    assert np.allclose(told["channel_std"], draws.std((0, 1, 2, 4, 5)), rtol=5e-3)
    assert np.std(told["channel_mean"]) > 0.01, "channels differ"


def test_grey_transparent_and_cmyk_images_become_colour(encode, tmp_path):
    """Compare with Pillow's own conversion."""
    colours = Image.fromarray(image(3))
    clear = colours.copy()
    clear.putalpha(Image.fromarray(image(4)[..., 0]).resize(clear.size))
    files = [encoded(colours, "PNG"), encoded(colours.convert("L"), "PNG"), encoded(clear, "PNG")]
    source = image_shards(tmp_path / "images", files)
    read = open_source(str(encode("--mirrored false", source=source, autoencoder="identity")))
    colour, grey, dropped = (read.read(i)[0].astype(np.float32) for i in range(3))
    assert np.abs(colour - dropped).max() < 0.02
    weights = np.array([0.299, 0.587, 0.114])
    assert np.abs(grey - grey[:1]).max() == 0
    assert np.abs(grey[0] - np.tensordot(weights, colour, 1)).max() < 0.03
    cmyk = image_shards(tmp_path / "cmyk", [encoded(colours.convert("CMYK"), "JPEG", quality=98)], "jpg")
    read = open_source(str(encode("--mirrored false", out="c", source=cmyk, autoencoder="identity"))).read(0)[0]
    assert np.abs(read.astype(np.float32) - colour).mean() < 0.05


def test_a_folder_of_classes(encode, tmp_path):
    for i in range(4):
        path = tmp_path / "tree" / NAMES[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image(i), "PNG"))
    folder = encode("--size [8,16]", source=tmp_path / "tree", autoencoder="space_to_depth:4")
    source = open_source(str(folder))
    assert source.class_names == ("bird", "cat")
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.samples.shape == (48, 2, 4)
    assert manifest(folder)["autoencoder"]["sha256"] is None


# -- continuing, ranks --


def test_a_folder_of_images_without_classes(encode, tmp_path):
    (tmp_path / "faces").mkdir()
    for i in range(4):
        Image.fromarray(image(i)).save(tmp_path / "faces" / f"{i}.png")
    folder = encode(source=tmp_path / "faces", autoencoder="identity")
    source = open_source(str(folder))
    assert (source.n, source.class_names, source.labels.tolist()) == (4, ("faces",), [0] * 4)


class Stopped(Exception):
    pass


def test_it_goes_on_where_it_was_stopped(encode, tmp_path, monkeypatch, capsys):
    whole, original, encodings = contents(encode(out="whole")), encoding._posteriors, []

    def counted(autoencoder, x, settings):
        encodings.append(len(x))
        if sum(encodings) > limit:
            raise Stopped
        return original(autoencoder, x, settings)

    monkeypatch.setattr(encoding, "_posteriors", counted)
    limit = 12
    with pytest.raises(Stopped):
        encode()
    folder = tmp_path / "out"
    begun = sorted(folder.glob("*.tar"))
    assert [path.name for path in begun] == ["latents-00000.tar", "latents-00001.tar"]
    assert "not all of its samples are written yet" in refusal(open_source, str(folder))
    times = {path: path.stat().st_mtime_ns for path in begun}
    encodings.clear()
    limit = 1000
    encode()
    assert sum(encodings) == N - 10, "what is done is not done again"
    assert {path: path.stat().st_mtime_ns for path in begun} == times
    assert contents(folder) == whole
    encodings.clear()
    encode()
    assert encodings == []
    assert "23 of 23 samples in 5 shards" in capsys.readouterr().out


def test_a_shard_without_its_record_is_written_again(encode, tmp_path):
    """Such a shard is left when the process dies between the two."""
    whole = contents(encode(out="whole"))
    folder = encode()
    (folder / "manifest.json").unlink()
    (folder / "latents-00003.tar").write_bytes(b"not whole")
    assert contents(encode(out="other")) == whole
    for name in ("manifest.json", "classes.json"):
        (folder / name).unlink(missing_ok=True)
    assert "holds other shards" in refusal(encode), "no record of them at all"
    (folder / ".unfinished").mkdir()
    (folder / ".unfinished/settings.json").write_text(json.dumps(manifest(tmp_path / "other")))
    encode()
    assert contents(folder) == whole


def test_ranks_write_disjoint_shards(encode, monkeypatch, capsys):
    whole = contents(encode(out="whole"))
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, mine in ((2, [2]), (0, [0, 2, 3]), (1, [0, 1, 2, 3, 4])):
        monkeypatch.setenv("RANK", str(rank))
        folder = encode()
        assert sorted(folder.glob("*.tar")) == [folder / f"latents-{k:05d}.tar" for k in mine]
        assert (folder / "manifest.json").exists() == (rank == 1)
        said = capsys.readouterr().out
        assert ("23 of 23" in said) == (rank == 1)
    assert contents(folder) == whole
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("RANK", "8")
    (folder / ".unfinished").mkdir()  # by a rank that came when the others finished
    encode()
    assert open_source(str(folder)).n == N


@pytest.mark.launch
def test_killed_it_goes_on(encode, home, tmp_path):
    """SIGKILL ends the command, which runs in a process of its own."""
    images = image_shards(tmp_path / "many", [encoded(image(i), "PNG") for i in range(140)])
    flags = f"--source {images} --autoencoder {home / 'vae'} --out {tmp_path / 'out'} --size {SIZE} --per_shard 5"
    command = python("fastdit/encode.py", *flags.split(), "--batch", 2, "--threads", 1, "--device", "cpu")
    with Launched(command, tmp_path / "log") as launched:
        launched.until(lambda: len(list((tmp_path / "out").glob("*.tar"))) >= 3, "three shards")
        launched.process.send_signal(signal.SIGKILL)
        launched.process.wait()
    begun = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.tar"))[:-1]}
    assert 2 <= len(begun) < 27
    assert contents(encode(source=images)) == contents(encode(source=images, out="straight"))
    assert {path: path.stat().st_mtime_ns for path in begun} == begun


# -- mistakes --


def test_corrupt_images(encode, home, tmp_path, caplog):
    files = [encoded(image(i), "PNG") for i in range(9)]
    for i in (3, 5, 6, 7, 8):
        files[i] = files[i][: len(files[i]) // 2]
    source = image_shards(tmp_path / "images", files)
    text = refusal(encode, source=source)
    assert re.search(r"i-00.tar: byte \d+: 's003'", text)
    assert "is corrupt and cannot be decoded" in text
    with caplog.at_level(logging.WARNING):
        folder = encode("--on_corrupt skip", source=source)
    assert sum("left out" in record.message for record in caplog.records) == 5
    read = open_source(str(folder))
    assert [read.where(i).split("'")[1] for i in range(read.n)] == [f"{i:08d}" for i in (0, 1, 2, 4)]
    told = manifest(folder)
    assert (told["samples"], told["encoded"], told["counts"]) == (9, 4, [1, 2, 1])
    assert [shard["samples"] for shard in told["shards"].values()] == [4, 0]
    good = encode(source=home / "images", out="good")
    assert np.allclose(read.read(3), open_source(str(good)).read(4), rtol=2e-3, atol=2e-3)


def test_a_source_without_one_good_image(encode, tmp_path):
    source = image_shards(tmp_path / "images", [encoded(image(i), "PNG")[:60] for i in range(3)])
    assert "--source: none of its images can be decoded" in refusal(encode, "--on_corrupt skip", source=source)


def test_latents_that_are_not_finite_are_refused(encode, monkeypatch):
    def large(autoencoder, x, settings):
        out = torch.zeros(len(x), 4, 4, 4, 4)
        out[-1, 0, 1, 2, 3] = 1e5
        return out

    monkeypatch.setattr(encoding, "_posteriors", large)
    text = refusal(encode)
    assert re.search(r"i-00.tar: byte \d+: 's001': its latent is not finite in float16; encode as float32", text)
    assert open_source(str(encode("--dtype float32", out="wide"))).n == N


def test_each_mistake_is_one_line(encode, home, tmp_path):
    assert "--size [15, 16]: must be a multiple of 4" in refusal(encode, "--size [15,16]").replace(
        "(15, 16)", "[15, 16]"
    )
    assert "--size 0" in refusal(encode, "--size 0")
    assert "--batch 0: must be at least 1" in refusal(encode, "--batch 0")
    assert "/nowhere: no such autoencoder" in refusal(encode, autoencoder="/nowhere")
    assert "/nowhere: no such file" in refusal(encode, source="/nowhere")
    assert "synthetic: holds no images" in refusal(encode, source="synthetic")
    (tmp_path / "l").mkdir()
    latent_source(tmp_path / "l", np.ones((3, 2, 4, 5, 5), dtype=np.float32))
    assert f"{tmp_path / 'l'}: holds no images" in refusal(encode, source=tmp_path / "l")
    assert f"--out {home / 'images'}: holds other shards" in refusal(encode, out=home / "images")
    folder = encode()
    for flags, words in {
        "--dtype float32": "dtype float16, now it is float32",
        "--mirrored false": "mirrored True, now it is False",
        "--per_shard 6": "per_shard 5, now it is 6",
        "--size 20": "size [16, 16], now it is [20, 20]",
    }.items():
        assert f"{folder}/manifest.json: was begun with {words}" in refusal(encode, flags)
    assert "was begun with autoencoder" in refusal(encode, autoencoder=home / "tiny")


# -- training on them --


@pytest.mark.launch
def test_training_and_sampling_on_what_was_encoded(encode, home, tmp_path, capsys):
    """Take the flags that the command itself tells."""
    encode(autoencoder=home / "tiny")
    flags = capsys.readouterr().out.split("train on them with ")[1].split()
    out = tmp_path / "run"
    forked(*TINY, "--model.patch", 2, "--steps", 3, *flags, "--out", out).succeeded()
    assert len(metrics(out)) == 3
    assert (out / "samples.png").exists()
    _sample(["--run", str(out), "--n", "4", "--device", "cpu", "--out", str(tmp_path / "x.npz")])
    _sample(["--run", str(out), "--n", "4", "--device", "cpu", "--out", str(tmp_path / "x.png")])
    drawn = np.load(tmp_path / "x.npz")
    assert drawn["images"].shape == (4, SIZE, SIZE, 3)
    assert drawn["images"].std() > 5
    assert Image.open(tmp_path / "x.png").height >= 3 * SIZE
