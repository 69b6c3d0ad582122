"""Images made elsewhere: the same figures in every form, without a run, and each mismatch in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import encode, picture
from launching import Launched, forked, torchrun
from PIL import Image
from test_evaluate import cheap_net

from fastdit.data import UNFINISHED, write_shards
from fastdit.errors import UserError
from fastdit.evaluate import _evaluate
from fastdit.evaluation import class_agreement, evaluator
from fastdit.metrics.moments import Moments, frechet_distance

pytestmark = pytest.mark.launch
N, CLASSES = 13, ("cat", "dog")
SIDE = 28  # of cheap_net


@pytest.fixture(autouse=True)
def cheap(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluator, "feature_net", lambda *args: cheap_net())
    monkeypatch.setattr(class_agreement, "KNOWN_IMAGES", 400)
    return cheap_net()


def images(n: int, first: int = 0, channels: int = 3) -> np.ndarray:
    return np.stack([picture(SIDE, SIDE, channels, seed=first + i).reshape(SIDE, SIDE, channels) for i in range(n)])


def folder(root: Path, pixels: np.ndarray, form: str = "png", classes=CLASSES) -> Path:
    """Write image i as class i % 2; without classes, all into one folder."""
    for i, image in enumerate(pixels):
        path = root / (classes[i % len(classes)] if classes else "") / f"{i:03}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(path)
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """real/: 20 images; samples/, flat/, samples.npz, adm.npz and shards/: N others, in each form."""
    home = tmp_path_factory.mktemp("home")
    folder(home / "real", images(20, first=100))
    samples = images(N)
    folder(home / "samples", samples)
    folder(home / "flat", samples, classes=())
    np.savez(home / "samples.npz", images=samples, labels=np.arange(N) % 2)
    np.savez(home / "adm.npz", arr_0=samples)
    (home / "shards").mkdir()
    files = ((f"{i:03}", {"png": encode(x, "PNG"), "cls": str(i % 2).encode()}) for i, x in enumerate(samples))
    write_shards(home / "shards" / "s-%02d.tar", files, 5)
    return home


def judged(home: Path, samples: str, *flags) -> dict:
    """Return the record that the command adds to its file."""
    path = home / f"{samples}.json"
    path.unlink(missing_ok=True)
    _evaluate(["--samples_from", str(home / samples), "--data", str(home / "real"), "--save", str(path), *flags])
    (record,) = json.loads(path.read_text())
    return record


def refusal(*flags) -> str:
    with pytest.raises(UserError) as caught:
        _evaluate([*map(str, flags)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("samples", ["samples", "flat", "samples.npz", "adm.npz", "shards"])
def test_every_form_has_the_figures_of_its_images(home, cheap, capsys, samples):
    record = judged(home, samples)
    mine, real = (
        Moments.of(cheap(torch.from_numpy(x).permute(0, 3, 1, 2)).features) for x in (images(N), images(20, first=100))
    )
    assert record["figures"]["FD-cheap"]["value"] == pytest.approx(frechet_distance(mine, real), rel=1e-6)
    assert (record["n"], record["real"]["n"], record["size"], record["sampling"]) == (N, 20, [SIDE, SIDE], None)
    assert ("class agreement" in record["figures"]) == (samples == "samples"), "where both sides name the same classes"
    text = capsys.readouterr().out
    assert f"| FD-cheap | {record['figures']['FD-cheap']['value']:.4g} | " in text
    assert f"- n: {N} samples against 20 images of {home / 'real'} at 28x28" in text
    assert "- sampling: samples made elsewhere" in text
    assert "- protocol: KID is the mean over 100 subsets" in text


def test_a_part_of_them(home):
    some = judged(home, "samples", "--n", "9")
    assert some["n"] == 9
    assert some["figures"]["FD-cheap"] != judged(home, "samples")["figures"]["FD-cheap"]
    assert some["figures"] == judged(home, "samples", "--n", "9")["figures"]
    text = refusal("--samples_from", home / "samples", "--data", home / "real", "--n", 14)
    assert text == f"--samples_from {home / 'samples'}: has 13 images, 14 are asked for (--n)"


def test_figures_are_added_to_a_file(home, tmp_path):
    for _ in range(2):
        flags = ["--samples_from", home / "flat", "--data", home / "real", "--save", tmp_path / "new" / "x.json"]
        _evaluate([*map(str, flags)])
    assert len(json.loads((tmp_path / "new/x.json").read_text())) == 2
    (tmp_path / "x.json").write_text("{}")
    assert "is no list of evaluations" in refusal(*flags[:4], "--save", tmp_path / "x.json")


def test_each_mismatch_is_one_line(home, tmp_path):
    def tried(samples, *flags) -> str:
        return refusal("--samples_from", samples, "--data", home / "real", *flags)

    odd = folder(tmp_path / "odd", images(3), classes=())
    Image.fromarray(picture(SIDE, 30)).save(odd / "zz.png")
    assert f"{odd}/zz.png is 28x30 with 3 channels, {odd}/000.png is 28x28 with 3 channels; make them" in tried(odd)
    Image.fromarray(picture(SIDE, SIDE, 1).squeeze()).save(odd / "zz.png")
    assert "zz.png is 28x28 with 1 channels" in tried(odd)
    gray = folder(tmp_path / "gray", images(3, channels=1), classes=())
    assert f"is color, and --samples_from {gray} is gray; convert one of the two sets" in tried(gray)
    clear = folder(tmp_path / "clear", np.dstack([images(1)[0], np.full((SIDE, SIDE), 9, np.uint8)])[None], classes=())
    assert "000.png has 4 channels" in tried(clear)
    damaged = folder(tmp_path / "damaged", images(3), classes=())
    (damaged / "001.png").write_bytes(b"no image")
    assert f"{damaged}/001.png is no image that can be read" in tried(damaged)
    (damaged / "001.png").write_bytes((damaged / "002.png").read_bytes()[:-40])
    assert f"{damaged}/001.png is damaged" in tried(damaged)
    alone = folder(tmp_path / "alone", images(1), classes=())
    assert "has 1 image; a comparison takes 2 or more" in tried(alone)
    for arrays in ({"images": np.zeros((3, 4), np.uint8)}, {"arr_0": np.zeros((3, 4, 4, 3))}, {"x": np.zeros(3)}):
        np.savez(tmp_path / "bad.npz", **arrays)
        assert "bad.npz: holds no images (images or arr_0) of uint8 (n, H, W, 1 or 3), but " in tried(
            tmp_path / "bad.npz"
        )
    assert "/gone: no such file or folder" in tried("/gone")
    assert "/gone.npz: no such file; give an .npz" in tried("/gone.npz")
    (tmp_path / "text.npz").write_text("no archive")
    assert "text.npz: is no .npz file of plain arrays; give an .npz" in tried(tmp_path / "text.npz")
    part = folder(tmp_path / "part", images(3), classes=())
    (part / UNFINISHED).mkdir()
    assert "not all of its samples are written yet; run again what writes them" in tried(part)
    assert "--guidance: is for sampling a run" in tried(odd, "--guidance", 2)
    assert "needs the real images to compare with; give --data" in refusal("--samples_from", odd)
    assert "--run: names the run to evaluate; or give --samples_from" in refusal("--data", odd)
    assert "and no --run" in refusal("--samples_from", odd, "--run", odd)
    assert "--save: is for --samples_from" in refusal("--run", odd, "--save", "x.json")


def test_what_moves_the_figures_is_told(home, tmp_path, capsys):
    lossy = folder(tmp_path / "lossy", images(5), form="jpg", classes=())
    _evaluate(["--samples_from", str(lossy), "--data", str(home / "real")])
    assert "- note: 5 samples are compressed with loss, which moves the figures" in capsys.readouterr().out
    small = tmp_path / "small"
    small.mkdir()
    for i in range(5):
        Image.fromarray(picture(14, 20, seed=i)).save(small / f"{i}.png")
    _evaluate(["--samples_from", str(home / "flat"), "--data", str(small)])
    assert "are enlarged to 28x28" in capsys.readouterr().out


def test_the_crop_of_real_images(home, tmp_path, capsys):
    """References of different crops are not taken for one another, and the block names what is not the default."""
    large = tmp_path / "large"
    large.mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (90, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(large / f"{i}.png")
    found = {}
    for crop in ("center", "adm", "center"):
        flags = ["--samples_from", home / "flat", "--data", large, "--crop", crop, "--save", tmp_path / "x.json"]
        _evaluate([*map(str, flags)])
        assert ("at 28x28, cropped as adm" in capsys.readouterr().out) == (crop == "adm")
        record = json.loads((tmp_path / "x.json").read_text())[-1]
        assert record["real"]["crop"] == crop
        assert found.setdefault(crop, record["figures"]) == record["figures"]
    assert found["center"] != found["adm"]


def test_figures_do_not_depend_on_the_number_of_ranks(home, tmp_path):
    flags = ["--samples_from", home / "shards", "--data", home / "real", "--device", "cpu", "--threads", 1]
    forked(*flags, "--save", tmp_path / "one.json", program="fastdit.evaluate").succeeded()
    command = torchrun(*flags, "--save", tmp_path / "two.json", ranks=2, script="fastdit/evaluate.py")
    with Launched(command, tmp_path / "log") as launched:
        launched.wait().succeeded()
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())[0]["figures"] for name in ("one", "two"))
    for name, figure in one.items():
        assert two[name] == pytest.approx(figure, rel=1e-6, abs=1e-9)
