"""Samples in files for other tools: folders and shards that go on, ranks, sweeps, precision, and what is in the way."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from launching import TINY, Launched, deepspeed, forked, torchrun
from PIL import Image

from fastdit.data import open_source
from fastdit.errors import UserError
from fastdit.evaluation import draw_samples
from fastdit.sample import _sample

pytestmark = pytest.mark.launch
SCRIPT = "fastdit/sample.py"
N = 30  # in batches of 12: 12, 12, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of training."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    forked(*TINY, "--steps", 2, "--sample.agreement", 0, "--ema.kind", "power", "--out", folder).succeeded()
    return folder


def sample(run: Path, out: Path, flags: str = "") -> Path:
    _sample(["--run", str(run), "--device", "cpu", "--out", str(out), *flags.split()])
    return out


def refusal(run: Path, out: Path, flags: str = "") -> str:
    with pytest.raises(UserError) as caught:
        sample(run, out, flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> dict[str, np.ndarray]:
    """The samples as one archive."""
    return dict(np.load(sample(run, tmp_path_factory.mktemp("whole") / "x.npz", f"--n {N}")))


def pictures(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of a source in the order of their indices, uint8 (n, H, W, 1), and their classes' names."""
    source = open_source(folder)
    named = []
    for i in range(source.n):
        text = source.where(i)
        index = int(text.split("'")[1]) if "'" in text else int(Path(text).stem)
        image = np.asarray(Image.open(io.BytesIO(source.read(i).tobytes())))[..., None]
        named.append((index, image, source.class_names[source.labels[i]]))
    named.sort(key=lambda item: item[0])
    return np.stack([image for _, image, _ in named]), np.array([name for *_, name in named])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- forms --


def test_a_folder_of_pictures(run, whole, tmp_path):
    folder = sample(run, tmp_path / "p", f"--n {N}")
    images, classes = pictures(str(folder))
    assert np.array_equal(images, whole["images"])
    assert classes[0] == "0 T-shirt_top"
    assert [int(name[0]) for name in classes] == whole["labels"].tolist()
    record = json.loads((folder / "samples.json").read_text())
    assert (record["n"], record["seed"], record["guidance"], record["precision"]) == (N, 0, 1.0, "fp32")
    assert not (folder / ".unfinished").exists()


def test_shards(run, whole, tmp_path):
    sample(run, tmp_path / "s" / "x-{000000..}.tar", f"--n {N} --per_shard 13")
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == ["classes.json", "manifest.json", "x-000000.tar", "x-000001.tar"], "13 are 2 batches of 12"
    images, classes = pictures(str(tmp_path / "s"))
    assert np.array_equal(images, whole["images"])
    known = json.loads((tmp_path / "s/classes.json").read_text())
    assert [known.index(name) for name in classes] == whole["labels"].tolist()
    sample(run, tmp_path / "f", f"--n {N} --per_shard 13 --format shards")
    assert contents(tmp_path / "f")["samples-000001.tar"] == contents(tmp_path / "s")["x-000001.tar"]


def test_adms_names_of_arrays(run, whole, tmp_path):
    written = np.load(sample(run, tmp_path / "x.npz", f"--n {N} --format adm"))
    assert written.files == ["arr_0", "arr_1"]
    assert np.array_equal(written["arr_0"], whole["images"])
    assert np.array_equal(written["arr_1"], whole["labels"])


def test_other_weights_and_other_arithmetic(run, whole, tmp_path):
    raw = np.load(sample(run, tmp_path / "raw.npz", f"--n {N} --weights raw"))["images"]
    assert not np.array_equal(raw, whole["images"])
    half = np.load(sample(run, tmp_path / "half.npz", f"--n {N} --precision bf16"))["images"]
    difference = np.abs(half.astype(int) - whole["images"])
    assert 0 < difference.max() < 16
    assert np.array_equal(
        np.load(sample(run, tmp_path / "x.npz", f"--n {N} --precision fp32"))["images"], whole["images"]
    )
    assert "has no EMA 'ema2' of the sampled network; take ema, raw" in refusal(
        run, tmp_path / "x.png", "--weights ema2"
    )
    assert "exp_avg" in refusal(run, tmp_path / "x.png", "--weights exp_avg")
    assert "sample.precision: tf32 is for GPUs" in refusal(run, tmp_path / "x.png", "--precision tf32")


def test_the_batch(run, whole, tmp_path):
    """A sample may be rounded otherwise in another batch; here, on a CPU, at most by a level."""
    for size in (5, 24):
        images = np.load(sample(run, tmp_path / f"{size}.npz", f"--n {N} --batch {size}"))["images"]
        assert np.abs(images.astype(int) - whole["images"]).max() <= 1
    assert "--batch 0: must be at least 1" in refusal(run, tmp_path / "x.png", "--batch 0")


def test_a_sweep(run, tmp_path):
    """Each picture of the table is the one that its own command draws."""
    page = sample(run, tmp_path / "sweep.png", "--classes 3 --guidance 1,4 --seed 0,5,6")
    found = np.asarray(Image.open(page))
    for row, scale in enumerate((1, 4)):
        for column, seed in enumerate((0, 5, 6)):
            out = sample(run, tmp_path / f"{scale}-{seed}.npz", f"--classes 3 --n 1 --guidance {scale} --seed {seed}")
            tile = np.load(out)["images"][0].repeat(2, 0).repeat(2, 1)
            windows = np.lib.stride_tricks.sliding_window_view(found[..., 0], tile.shape[:2])
            ((y, x),) = np.argwhere((windows == tile[..., 0]).all((2, 3))).tolist()
            assert (y // 58, x > 58 * column) == (row, True)
    sample(run, tmp_path / "scales.png", "--classes 0-4 --guidance 1,2")
    sample(run, tmp_path / "seeds.png", "--classes 3,4 --n 4 --seed 1,2")
    assert Image.open(tmp_path / "scales.png").width > 5 * 58
    for flags in ("--seed 0,1", "--guidance 1,2"):
        assert "make a grid; name a .png" in refusal(run, tmp_path / "x.npz", flags)


# -- going on, and files in the way --


@pytest.mark.parametrize("out", ["p", "x-{000000..}.tar"])
def test_it_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch, capsys, out):
    flags = f"--n {N} --per_shard 12"
    place = (tmp_path / "begun" / out).parent if out.endswith("tar") else tmp_path / "begun" / out
    sample(run, tmp_path / "whole" / out, flags)
    expected = contents(tmp_path / "whole")
    plain, drawn = draw_samples.draw, []

    def draw(*args, **kwargs):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(list(kwargs["indices"]))
        return plain(*args, **kwargs)

    monkeypatch.setattr(draw_samples, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        sample(run, tmp_path / "begun" / out, flags)
    assert (place / ".unfinished/settings.json").is_file()
    assert "seed 0, now it is 1" in refusal(run, tmp_path / "begun" / out, f"{flags} --seed 1")
    drawn.clear()
    capsys.readouterr()
    sample(run, tmp_path / "begun" / out, flags)
    assert drawn == [list(range(24, 30))], "what is there is not drawn again"
    assert f"goes on after 24 of {N} samples" in capsys.readouterr().out
    assert contents(tmp_path / "begun") == expected
    drawn.clear()
    sample(run, tmp_path / "begun" / out, flags)
    assert drawn == []


def test_what_is_not_ours_stays(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "holds other files, such as notes.txt; choose another folder" in refusal(run, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "full" / "a.tar").write_text("mine")
    assert "such as a.tar" in refusal(run, tmp_path / "full" / "x-{000..}.tar")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    np.savez(tmp_path / "data.npz", images=np.zeros(3))
    for name in ("photo.png", "data.npz"):
        before = (tmp_path / name).read_bytes()
        assert "not made by this command; remove it, or choose another name" in refusal(run, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    for name in ("own.png", "own.npz"):
        for _ in range(2):
            sample(run, tmp_path / name, "--n 2")


def test_an_archive_begins_anew_and_says_so(run, tmp_path, capsys):
    (tmp_path / ".x.npz.partial").write_bytes(b"half")
    sample(run, tmp_path / "x.npz", "--n 2")
    assert "x.npz: was interrupted and begins anew; a folder or shards would go on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--per_shard 0", "--per_shard 0: must be at least 1"),
        ("--samples 0", "take n from 1"),
        ("--format tiff", "format: expected one of"),
        ("--seed 1,x", "seed: expected a whole number, or several"),
        ("--seed 1,1", "--seed 1,1: has a number twice"),
    ],
)
def test_mistakes(run, tmp_path, flags, words):
    assert words in refusal(run, tmp_path / "x", flags)


# -- ranks --


def test_any_number_of_ranks_writes_the_same(run, whole, tmp_path):
    flags = ("--run", run, "--device", "cpu", "--threads", "1", "--samples", N, "--out")
    sample(run, tmp_path / "alone", f"--n {N} --threads 1")
    with (
        Launched(deepspeed(*flags, tmp_path / "two", ranks=2, script=SCRIPT), tmp_path / "log2") as first,
        Launched(torchrun(*flags, tmp_path / "x.npz", ranks=2, script=SCRIPT), tmp_path / "log3") as second,
    ):
        assert f"{N} samples of" in first.wait().succeeded().text
        second.wait().succeeded()
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")
    together = np.load(tmp_path / "x.npz")
    assert np.array_equal(together["images"], whole["images"])
    assert np.array_equal(together["labels"], whole["labels"])


def test_a_part_of_the_work_of_other_ranks(run, tmp_path):
    """A folder that several ranks began is finished by one."""
    sample(run, tmp_path / "x", f"--n {N}")
    expected = contents(tmp_path / "x")
    settings = json.loads((tmp_path / "x/samples.json").read_text())
    (tmp_path / "x/.unfinished").mkdir()
    (tmp_path / "x/.unfinished/settings.json").write_text(json.dumps(settings))
    (tmp_path / "x/samples.json").unlink()
    shutil.rmtree(tmp_path / "x/3 Dress")
    sample(run, tmp_path / "x", f"--n {N}")
    assert contents(tmp_path / "x") == expected
