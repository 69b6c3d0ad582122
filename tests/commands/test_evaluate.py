"""Evaluation: figures that are those of the samples, whatever the ranks; what it leaves behind; and every mistake."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import encode, latent_source, picture
from launching import TINY, Launched, checkpoint, deepspeed, forked, python, run, torchrun
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdit import run_parts
from fastdit.config import EvalConfig
from fastdit.data import open_source, sources
from fastdit.distributed import Runtime
from fastdit.errors import UserError
from fastdit.evaluate import _evaluate
from fastdit.evaluation import class_agreement, draw_samples, evaluator
from fastdit.evaluation.evaluator import Evaluator, draw_labels
from fastdit.metrics.feature_nets import FeatureNet
from fastdit.metrics.moments import Moments, frechet_distance
from fastdit.metrics.summary import Output
from fastdit.parser import load, parse
from fastdit.rundir import eval_log
from fastdit.rundir.checkpoint_files import sampled_weights

pytestmark = pytest.mark.launch
CPU = torch.device("cpu")
ALONE = Runtime(rank=0, world=1, local_rank=0, device=CPU)
SCRIPT = "fastdit/evaluate.py"
TINY = [*TINY, "--sample.agreement", "0"]


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    """Not the user's: for runs that several tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("shared")))
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """No test sees another's references."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "fastdit"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two steps of training, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    forked(*TINY, "--steps", 2, "--save_every", 1, "--out", folder).succeeded()
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def cheap_net(label: str = "cheap") -> FeatureNet:
    """A random projection of pixels, in the place of a network."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3 * 28 * 28, 24, generator=generator) / 255 / 28

    def run(images: torch.Tensor) -> Output:
        x = (images.float().flatten(1) @ matrix).tanh()
        return Output(x[:, :8], x[:, 8:12], x[:, 12:])

    return FeatureNet("cheap", label, "none 0", "none", run)


@pytest.fixture
def cheap(monkeypatch) -> FeatureNet:
    monkeypatch.setattr(evaluator, "feature_net", lambda *args: cheap_net())
    monkeypatch.setattr(class_agreement, "KNOWN_IMAGES", 400)
    return cheap_net()


class Opened:
    """A run and its network, as the command opens them."""

    def __init__(self, folder: Path, **settings):
        self.config = replace(load(folder / "config.yaml"), eval=EvalConfig(**{"n": 21, "n_real": 40} | settings))
        self.shape = run_parts.shape_of(self.config, 10)
        self.network = run_parts.build_network(self.config, self.shape)
        self.network.load_state_dict(sampled_weights(checkpoint(folder, 2)))
        self.network.eval()

    def evaluator(self, runtime: Runtime = ALONE) -> Evaluator:
        return Evaluator(self.config, self.shape, runtime, live=False)

    def figures(self) -> dict[str, dict]:
        return self.evaluator()(self.network, 2)["figures"]

    def images(self, n: int, labels: np.ndarray) -> np.ndarray:
        """The first n samples, uint8 (n, 28, 28, 1)."""
        noise = run_parts.build_noise(self.config)
        settings = {"indices": range(n), "seed": self.config.eval.seed, "device": CPU}
        drawn = draw_samples.draw(self.network, noise, self.config.sample, self.shape, labels, **settings)
        return draw_samples.to_uint8(drawn)


# -- the figures --


def test_figures_are_those_of_the_samples_and_the_data(trained, cheap, monkeypatch):
    """Compute them by hand: all samples at once, the data of three shards read again."""
    monkeypatch.setattr(class_agreement, "KNOWN_IMAGES", 3_000)
    part = str(Path(sources.__file__).parents[1] / "assets/fashion_mnist/fashion-mnist-{00..02}.tar")
    opened = Opened(trained, n_real=3_000, seed=3, data=part)
    found = opened.figures()
    labels = draw_samples.balanced_labels(21, range(10))
    samples = opened.images(21, labels)
    source = open_source(part)
    known = class_agreement.known_images(opened.config, source)
    everything = ((known[0] + 1) * 127.5).round().to(torch.uint8)
    real = Moments.of(cheap(everything).features)
    mine = Moments.of(cheap(torch.from_numpy(samples).permute(0, 3, 1, 2)).features)
    assert real.n == 3_000
    assert found["FD-cheap"]["value"] == pytest.approx(frechet_distance(mine, real), rel=1e-6)
    assert 0 < found["FD-cheap"]["floor"] < found["FD-cheap"]["value"]
    assert found["class agreement"]["value"] == pytest.approx(
        class_agreement.agreement(samples, labels, known), abs=1e-6
    )
    assert found["class agreement"]["floor"] > 0.7
    assert found["KID-cheap"].keys() == found["IS-cheap"].keys() == {"value", "std", "floor"}
    names = {"FD-cheap", "sFD-cheap", "KID-cheap", "IS-cheap", "precision-cheap", "recall-cheap", "class agreement"}
    assert found.keys() == names


def test_the_floor_is_between_two_halves_of_the_data(trained, cheap):
    record = (evaluator := Opened(trained, n_real=41).evaluator())(Opened(trained).network, 2)
    assert record["real"] == {"data": "fashion_mnist", "n": 41, "floor_n": [21, 20], "crop": "center"}
    whole = evaluator.reference.summary
    assert whole.moments.n == 41
    assert whole.kept.shape == (41, 8)
    a, b = whole.kept[:21], whole.kept[21:]
    assert record["figures"]["FD-cheap"]["floor"] == pytest.approx(
        frechet_distance(Moments.of(a), Moments.of(b)), rel=1e-9
    )


def test_a_record_says_what_the_figures_depend_on(trained, cheap):
    opened = Opened(trained, labels="random", seed=5)
    record = opened.evaluator()(opened.network, 2, "here")
    assert (record["step"], record["checkpoint"], record["n"], record["size"]) == (2, "here", 21, [28, 28])
    assert record["features"] == {"name": "cheap", "weights": "none 0", "resize": "none"}
    assert record["sampling"] == {
        "sampler": "heun",
        "steps": 2,
        "guidance": 1.0,
        "interval": None,
        "guided_channels": None,
        "labels": "random",
        "seed": 5,
        "ema": "fixed 0.9999",
        "precision": "fp32",
    }
    assert record["nonfinite"] == 0
    assert json.loads(json.dumps(record)) == record
    line = eval_log.conditions(record)
    words = "21 samples, 40 images of fashion_mnist, 28x28, 20 and 20, heun, 2 steps, random labels, seed 5, EMA fixed"
    assert [word for word in words.split(", ") if word not in line] == [], line


@pytest.mark.parametrize("changed", [{"seed": 1}, {"labels": "random"}, {"n": 20}])
def test_every_setting_changes_the_figures(trained, cheap, changed):
    assert Opened(trained, **changed).figures()["FD-cheap"] != Opened(trained).figures()["FD-cheap"]


def test_random_labels():
    labels = draw_labels("random", 5000, 7, 0)
    assert labels.dtype == np.int64
    assert np.array_equal(draw_labels("random", 50, 7, 0), labels[:50])
    assert np.bincount(labels, minlength=7).min() > 600
    assert len(np.bincount(labels)) == 7
    assert not np.array_equal(draw_labels("random", 50, 7, 1), labels[:50])


def test_samples_that_are_not_finite_are_counted(trained, cheap):
    opened = Opened(trained)
    with torch.no_grad():
        next(opened.network.parameters()).fill_(float("nan"))
    record = opened.evaluator()(opened.network, 2)
    assert record["nonfinite"] == 21
    assert "21 samples not finite" in eval_log.conditions(record)


# -- the data's side --


def test_the_reference_is_made_once(trained, cheap, cache):
    first = Opened(trained).figures()
    (kept,) = cache.iterdir()
    written = kept.stat().st_mtime_ns
    assert Opened(trained).figures() == first
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(kept.read_bytes()[:1000])
    assert Opened(trained).figures() == first, "a damaged one is made again"
    assert kept.stat().st_mtime_ns > written
    Opened(trained, n_real=30).figures()
    assert len(list(cache.iterdir())) == 2


def test_a_reference_of_an_older_version_gets_its_radii(trained, cheap, cache):
    """They are cached with it, because computing them takes most of the time of a small evaluation."""
    first = Opened(trained).figures()
    (kept,) = cache.iterdir()
    arrays = dict(np.load(kept))
    assert len(arrays.pop("radii")) == 40
    np.savez(kept, **arrays)
    assert Opened(trained).figures() == first
    assert len(np.load(kept)["radii"]) == 40


def test_other_weights_and_batches(trained, cheap):
    """The record names the weights; another batch changes nothing but rounding."""
    opened = Opened(trained)
    evaluator = Evaluator(opened.config, opened.shape, ALONE, live=False, weights="raw", batch=24)
    record = evaluator(opened.network, 2)
    assert record["sampling"]["ema"] == "none (raw weights)"
    assert "EMA none (raw weights)" in eval_log.conditions(record)
    assert record["figures"]["FD-cheap"]["value"] == pytest.approx(opened.figures()["FD-cheap"]["value"], rel=1e-3)


def test_a_cache_that_cannot_be_written(trained, cheap, monkeypatch, tmp_path, capsys):
    first = Opened(trained).figures()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Opened(trained).figures() == first
    assert "cannot keep the reference there" in capsys.readouterr().out


def test_images_of_ones_own(trained, cheap, tmp_path):
    """A folder, with other classes than the run's: no class agreement then."""
    for name, shade in (("cat", 0), ("dog", 1)):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(5):
            image = picture(28, 28, 1, seed=10 * shade + i)
            (tmp_path / "tree" / name / f"{i}.png").write_bytes(encode(image, "PNG"))
    opened = Opened(trained, data=str(tmp_path / "tree"), n_real=None)
    record = opened.evaluator()(opened.network, 2)
    assert record["real"] == {"data": str(tmp_path / "tree"), "n": 10, "floor_n": [5, 5], "crop": "center"}
    assert "class agreement" not in record["figures"]


def test_a_folder_of_images_without_classes(trained, cheap, tmp_path):
    """The figures are those of the same images in class folders."""
    for folder in ("flat", "tree/all"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(8):
            (tmp_path / folder / f"{i}.png").write_bytes(encode(picture(28, 28, 1, seed=i), "PNG"))
    flat, tree = (Opened(trained, data=str(tmp_path / name), n_real=None).figures() for name in ("flat", "tree"))
    assert flat == tree
    assert "class agreement" not in flat


def test_images_from_elsewhere_are_converted(trained, cheap, tmp_path):
    for i, mode in enumerate(("RGB", "RGBA", "CMYK", "L")):
        Image.fromarray(picture(28, 28, 3, seed=i)).convert(mode).save(tmp_path / f"{i}.tif")
    assert "FD-cheap" in Opened(trained, data=str(tmp_path), n_real=None).figures()


def archive(folder: Path, **arrays) -> str:
    np.savez(folder / "reference.npz", **arrays)
    return str(folder / "reference.npz")


def some_images(n: int) -> np.ndarray:
    return np.stack([picture(28, 28, 1, seed=i) for i in range(n)])[..., None]


def test_an_adm_reference_batch(trained, cheap, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluator, "feature_net", lambda *args: cheap_net(""))
    images, others = some_images(11), cheap(torch.from_numpy(some_images(60)).permute(0, 3, 1, 2))
    given = {"mu": others.features.mean(0).numpy(), "sigma": np.cov(others.features.numpy(), rowvar=False)}
    spatial = {"mu_s": others.spatial.mean(0).numpy(), "sigma_s": np.cov(others.spatial.numpy(), rowvar=False)}
    opened = Opened(trained, data=archive(tmp_path, **given, **spatial))
    bare = opened.evaluator()(opened.network, 2)
    assert bare["figures"].keys() == {"FID", "sFID", "IS"}
    assert bare["real"] == {"data": opened.config.eval.data, "n": None, "floor_n": [0, 0]}
    assert "21 samples against statistics of" in eval_log.conditions(bare)
    samples = cheap(
        torch.from_numpy(opened.images(21, draw_samples.balanced_labels(21, range(10)))).permute(0, 3, 1, 2)
    )
    mine = Moments.of(samples.features)
    expected = frechet_distance(mine, Moments.of(others.features))
    assert bare["figures"]["FID"] == {"value": pytest.approx(expected, rel=1e-5)}

    opened = Opened(trained, data=archive(tmp_path, **given, **spatial, arr_0=images))
    full = opened.evaluator()(opened.network, 2)
    assert full["figures"]["FID"]["value"] == bare["figures"]["FID"]["value"], "of all images, not of those inside"
    assert full["figures"]["FID"]["floor"] > 0
    assert {"KID", "precision", "recall"} <= full["figures"].keys()
    assert full["real"]["floor_n"] == [6, 5]

    opened = Opened(trained, data=archive(tmp_path, arr_0=images))
    own = opened.evaluator()(opened.network, 2)
    assert own["real"]["n"] == 11
    theirs = Moments.of(cheap(torch.from_numpy(images).permute(0, 3, 1, 2)).features)
    assert own["figures"]["FID"]["value"] == pytest.approx(frechet_distance(mine, theirs), rel=1e-6)


# -- the command --

FLAGS = ("--device", "cpu", "--threads", "1", "--samples", "21", "--n_real", "20", "--seed", "2")


def flat(record: dict) -> dict[str, float]:
    return {f"{name} {key}": x for name, figure in record["figures"].items() for key, x in figure.items()}


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The command under plain python: its run, and what it said."""
    home = tmp_path_factory.mktemp("command")
    folder = Path(shutil.copytree(trained, home / "run"))
    ended = run(python(SCRIPT, "--run", folder, *FLAGS), home / "log").succeeded()
    return folder, ended.text


def test_the_command_leaves_figures_everywhere(evaluated):
    folder, text = evaluated
    (record,) = eval_log.read(folder)
    figures = {f"{name}-lite0" for name in ("FD", "KID", "IS", "precision", "recall")} | {"class agreement"}
    assert record["figures"].keys() == figures
    assert record["checkpoint"] == str(checkpoint(folder, 2))
    for name, figure in record["figures"].items():
        value, floor = eval_log.shown(name, figure).removesuffix(")").split(" (floor ")
        assert f"\n| {name} | {value} | {floor} |\n" in text
    assert "21 samples against 20 images of fashion_mnist at 28x28" in text
    assert "resize bicubic with antialiasing, to 224" in text
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name, figure in record["figures"].items():
        (event,) = board.Scalars(f"eval/{name}")
        assert (event.step, event.value) == (2, pytest.approx(figure["value"], rel=1e-6))
    page = (folder / "report.html").read_text()
    assert "<h2>Evaluations</h2>" in page
    assert "FD-lite0" in page
    assert "trained" in page, "what training wrote there is kept"
    assert "FID" not in text
    assert "FID" not in page.partition("<h2>Evaluations</h2>")[2].partition("<h2>Run</h2>")[0]


def test_the_figures_do_not_depend_on_the_number_of_ranks(evaluated, trained, tmp_path):
    """21 samples in batches of 8: the last round leaves ranks without a sample of their own."""
    two, three = (Path(shutil.copytree(trained, tmp_path / name)) for name in ("two", "three"))
    with (
        Launched(deepspeed("--run", two, *FLAGS, ranks=2, script=SCRIPT), tmp_path / "log2") as first,
        Launched(torchrun("--run", three, *FLAGS, ranks=3, script=SCRIPT), tmp_path / "log3") as second,
    ):
        first.wait().succeeded()
        second.wait().succeeded()
    (alone,) = eval_log.read(evaluated[0])
    for folder in (two, three):
        (together,) = eval_log.read(folder)
        assert flat(together) == pytest.approx(flat(alone), rel=1e-9, abs=1e-12)
        for key in ("n", "real", "features", "sampling"):
            assert together[key] == alone[key]


def refusal(*flags) -> str:
    with pytest.raises(UserError) as caught:
        _evaluate([*map(str, flags)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--n 1", ["eval.n:", "at least 2", "1"]),
        ("--n_real 3", ["eval.n_real:", "at least 4"]),
        ("--seed -1", ["eval.seed:", "at least 0"]),
        ("--n x", ["n:", "expected a whole number"]),
        ("--labels none", ["labels:", "balanced"]),
        ("--features vgg", ["features:", "lite0", "inception"]),
        ("--steps 0", ["steps", "at least 1"]),
        ("--sampler ddim", ["sampler", "heun, euler"]),
        ("--feature lite0", ["--feature", "no such setting"]),
    ],
)
def test_each_mistake_is_one_line(trained, flags, words):
    text = refusal("--run", trained, *flags.split())
    assert [word for word in words if word not in text] == [], text


def mistake(folder: Path, **settings) -> str:
    with pytest.raises(UserError) as caught:
        Opened(folder, **settings).figures()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_data_that_does_not_fit(trained, cheap, tmp_path):
    assert "config.yaml: cannot be read" in refusal("--run", tmp_path)
    assert "/gone: no such file or folder" in mistake(trained, data="/gone")
    assert "/gone.npz: no such file" in mistake(trained, data="/gone.npz")
    assert "has 10000 images, 10001 are asked for (n_real)" in mistake(trained, n_real=10_001)
    assert "holds neither mu and sigma nor images" in mistake(trained, data=archive(tmp_path, a=np.zeros(3)))
    cut = archive(tmp_path, arr_0=some_images(11)[:, :27])
    assert "images are uint8 (11, 27, 28, 1); the samples are uint8 (11, 28, 28, 1)" in mistake(trained, data=cut)
    assert "statistics of the 2015 Inception network's features, not of cheap's" in mistake(
        trained, data=archive(tmp_path, mu=np.zeros(8), sigma=np.eye(8))
    )


def test_samples_of_latents_are_decoded(trained, cheap, tmp_path):
    """Do it by hand: draw latents, put them in order as pixels, and compare them with images."""
    rng = np.random.default_rng(0)
    latent_source(tmp_path, rng.random((6, 2, 12, 14, 14)).astype(np.float32))
    assert "give the autoencoder that decodes them" in mistake(trained, data=str(tmp_path), n_real=None)
    data = {"source": tmp_path, "size": 14, "channels": 12, "latent_scale": 2.5, "autoencoder": "space_to_depth:2"}
    config = parse([*TINY, *(f"--data.{key}={value}" for key, value in data.items()), "--eval.n", "21"])
    shape = run_parts.shape_of(config, 2)
    network, decoder = run_parts.build_network(config, shape).eval(), run_parts.build_decoder(config, shape)
    torch.nn.init.normal_(network.head.weight, std=0.02)
    with pytest.raises(UserError, match="give images, or an ADM reference"):
        Evaluator(config, shape, ALONE, decoder=decoder)
    images = np.repeat(some_images(40), 3, axis=3)
    config = replace(config, eval=replace(config.eval, data=archive(tmp_path, arr_0=images)))
    record = Evaluator(config, shape, ALONE, decoder=decoder, live=False)(network, 2)
    settings = {"indices": range(21), "seed": 0, "device": CPU}
    labels = draw_samples.balanced_labels(21, range(2))
    latents = draw_samples.draw(network, run_parts.build_noise(config), config.sample, shape, labels, **settings)
    samples = torch.from_numpy(draw_samples.to_uint8(torch.nn.functional.pixel_shuffle(latents / 2.5, 2)))
    assert samples.float().std() > 1
    mine, real = (Moments.of(cheap(x.permute(0, 3, 1, 2)).features) for x in (samples, torch.from_numpy(images)))
    assert record["figures"]["FD-cheap"]["value"] == pytest.approx(frechet_distance(mine, real), rel=1e-6)
    assert record["size"] == [28, 28]


def test_a_damaged_list_of_evaluations(copied):
    (copied / "eval.json").write_text("{")
    assert "eval.json: cannot be read (it is no JSON); move it away" in refusal("--run", copied)
