"""The sample command on a real, tiny run: pictures, arrays, the same pixels for the same seed, and every mistake."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoder_helpers import diffusers_model
from data_helpers import latent_source
from launching import averages, forked, pieces
from PIL import Image

from fastdit import from_pretrained, run_parts
from fastdit.errors import UserError
from fastdit.evaluation import draw_samples
from fastdit.export import _export
from fastdit.models import DiT, save_official
from fastdit.parser import load
from fastdit.sample import _sample

FASTDIT = Path(__file__).parents[2] / "fastdit"
TINY = (
    "--preset=quickstart --ds_config=zero1 --steps=2 --warmup=0 --save_every=1 --log_every=1 --sample_every=0",
    "--batch=4 --lr=0.02 --model.depth=2 --model.width=32 --model.heads=2 --data.threads=1 --threads=1",
    "--sample.steps=2 --sample.guidance=2 --sample.per_class=1 --sample.agreement=0",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of training, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    subprocess.run(
        [sys.executable, FASTDIT / "train.py", *" ".join(TINY).split(), "--out", folder],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def sample(run, tmp_path):
    """sample("--n 3 ...", name="x.npz"): what the command wrote, an archive or an image."""

    def sample(flags: str = "", name: str = "x.npz", run: Path = run):
        out = tmp_path / "new" / name
        out.unlink(missing_ok=True)
        _sample(["--run", str(run), "--device", "cpu", "--out", str(out), *flags.split()])
        return Image.open(out) if name.endswith(".png") else dict(np.load(out))

    return sample


@pytest.fixture(scope="module")
def two(run, tmp_path_factory) -> np.ndarray:
    """The images of `--n 2`."""
    out = tmp_path_factory.mktemp("two") / "x.npz"
    _sample(["--run", str(run), "--device", "cpu", "--out", str(out), "--n", "2"])
    return np.load(out)["images"]


def refusal(run, flags: str, out: str = "x.npz") -> str:
    with pytest.raises(UserError) as caught:
        _sample(["--run", str(run), "--device", "cpu", "--out", out, *flags.split()])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_archive(sample, capsys):
    drawn = sample("--n 23")
    assert set(drawn) == {"images", "labels"}
    assert (drawn["images"].shape, drawn["images"].dtype) == ((23, 28, 28, 1), np.uint8)
    assert (drawn["labels"].shape, drawn["labels"].dtype) == ((23,), np.int64)
    assert np.array_equal(drawn["labels"], np.arange(23) % 10), "balanced: counts differ by at most one"
    assert len(np.unique(drawn["images"].reshape(23, -1), axis=0)) == 23
    assert "23 samples of" in capsys.readouterr().out


def test_a_grid_shows_what_the_archive_holds(sample):
    page = np.asarray(sample("--n 4 --classes 3,5", "x.png"))
    images = sample("--n 4 --classes 3,5")["images"]
    scale, cell = 2, 2 * 28 + 2
    left = page.shape[1] - 2 * cell
    for i, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        tile = page[2 + row * cell :, left + column * cell :][: 28 * scale, : 28 * scale, 0]
        assert np.array_equal(tile[::scale, ::scale], images[i, :, :, 0])


def test_a_sample_depends_on_its_seed_index_and_class_alone(sample, two):
    nine = sample("--n 9")
    assert np.array_equal(nine["images"][:2], two)
    assert np.array_equal(sample("--n 1")["images"], two[:1])
    some = sample("--n 9 --classes 0,1,5")
    assert some["labels"].tolist() == [0, 1, 5] * 3
    same = [np.array_equal(a, b) for a, b in zip(some["images"], nine["images"])]
    assert same == (some["labels"] == nine["labels"]).tolist()


@pytest.mark.parametrize(
    "flags", ["--steps 3", "--sampler euler", "--guidance 1", "--guidance 4", "--interval [0.01,1]", "--seed 3"]
)
def test_every_setting_changes_the_picture(sample, two, flags):
    assert not np.array_equal(sample(f"--n 2 {flags}")["images"], two)


def test_flags_default_to_the_runs_settings(sample, two):
    assert np.array_equal(sample("--n 2 --steps 2 --guidance 2 --sampler heun --guided_channels 1")["images"], two)


def test_an_earlier_checkpoint(sample, run, two):
    older = run / "checkpoints/step-00000001"
    assert not np.array_equal(sample(f"--n 2 --checkpoint {older}")["images"], two)


def test_the_checkpoint_holds_an_average(run):
    """The power average of step 2 is neither the weights of step 1 nor of step 2."""
    one, two = averages(run, 1), averages(run, 2)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    raw = pieces(run, 2)
    assert any(not torch.equal(raw[name], two[name]) for name in raw)


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_corrupt_newest_checkpoint_falls_back_and_says_so(copied, sample, run, capsys):
    newest = copied / "checkpoints/step-00000002"
    shard = newest / "shards/ema-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 8
    shard.write_bytes(data)
    fallen = sample("--n 2", run=copied)["images"]
    said = capsys.readouterr().out
    assert f"{newest}: {shard.relative_to(newest)} is not what was written; falling back" in said
    assert f"2 samples of {copied / 'checkpoints/step-00000001'}" in said
    assert np.array_equal(fallen, sample(f"--n 2 --checkpoint {run / 'checkpoints/step-00000001'}")["images"])
    assert "is not what was written" in refusal(copied, f"--checkpoint {newest}")


def test_a_run_trained_with_a_kernel_that_is_not_here(copied, sample, two):
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("attention: auto", "attention: cudnn"))
    assert np.array_equal(sample("--n 2", run=copied)["images"], two)


def test_without_the_training_data_classes_have_names(copied, sample, two):
    """The run keeps the names. A run of an older version does not: its classes are numbers then."""
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("source: fashion_mnist", "source: /gone"))
    assert sample("--n 2", "x.png", run=copied).width == sample("--n 2", "x.png").width
    assert sample("--n 3 --classes Sandal,9,Bag", run=copied)["labels"].tolist() == [5, 9, 8]
    (copied / "classes.json").unlink()
    assert sample("--n 2", "x.png", run=copied).width < sample("--n 2", "x.png").width
    assert np.array_equal(sample("--n 2", run=copied)["images"], two)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--n 0", ["--n 0", "from 1"]),
        ("--seed -1", ["--seed -1", "from 0"]),
        ("--n x", ["n:", "expected a whole number", "x"]),
        ("--classes 10", ["--classes 10", "10 is out of range", "0 to 9"]),
        ("--classes 1,-1", ["--classes 1,-1", "-1 is out of range"]),
        ("--classes a", ["--classes a", "0,3,7", "T-shirt"]),
        ("--classes 1,,2", ["--classes 1,,2", "0,3,7"]),
        ("--steps 0", ["steps", "at least 1", "0"]),
        ("--sampler ddim", ["sampler", "ddim", "heun, euler"]),
        ("--guidance x", ["guidance:", "expected", "x"]),
        ("--interval [3,1]", ["interval", "[3.0, 1.0]", "below"]),
        ("--interval 3", ["interval:", "a pair [a, b]", "3"]),
        ("--guided_channels 2", ["guided_channels", "2"]),
        ("--device tpux", ["--device tpux", "cannot be used", "cpu"]),
        ("--checkpoint /nowhere", ["--checkpoint /nowhere", "manifest.json", "step-"]),
        ("--sede 1", ["--sede", "--seed?"]),
        ("stray", ["stray"]),
    ],
)
def test_each_mistake_is_one_line(run, flags, words):
    text = refusal(run, flags)
    assert [word for word in words if word not in text] == [], text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(run):
    assert "--device cuda: torch sees no CUDA device here" in refusal(run, "--device cuda")


def test_places_that_do_not_fit(run, copied, tmp_path):
    assert "--out x.jpg: must end in .png or .npz" in refusal(run, "", out="x.jpg")
    assert f"{tmp_path}/none/config.yaml: cannot be read" in refusal(tmp_path / "none", "")
    (tmp_path / "none").mkdir()
    assert "give a run" in refusal(tmp_path / "none", "")
    config = copied / "config.yaml"
    settings = config.read_text()
    config.write_text(settings.replace("depth: 2", "depth: 3"))
    text = refusal(copied, "")
    assert "step-00000002: has model.depth 2" in text
    assert f"{copied} has 3" in text
    config.write_text(settings + "nonsense: 1\n")
    assert f"{config}: nonsense: no such setting" in refusal(copied, "")
    config.write_text(settings)
    shutil.rmtree(copied / "checkpoints")
    assert f"{copied}: holds no checkpoint yet" in refusal(copied, "")


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory) -> Path:
    """Two steps on latents of 2x2 pixels, (12, 6, 4), of two classes."""
    home = tmp_path_factory.mktemp("latents")
    (home / "data").mkdir()
    posteriors = np.random.default_rng(0).normal(0, 0.2, (6, 2, 12, 6, 4)).astype(np.float32)
    latent_source(home / "data", np.abs(posteriors))
    flags = "--data.size [6,4] --data.channels 12 --data.latent_scale 2.5 --data.latent_shift 0.125 --data.flip false"
    shown = f"--data.autoencoder space_to_depth:2 --model.patch 2 --sample.agreement 9 --data.source {home}/data"
    forked(*" ".join(TINY).split(), *flags.split(), *shown.split(), "--out", home / "run").succeeded()
    return home / "run"


def test_latents_are_drawn_as_pictures(latent_run, sample):
    drawn, config = sample("--n 11", run=latent_run), load(latent_run / "config.yaml")
    assert (drawn["images"].shape, drawn["labels"].tolist()) == ((11, 12, 8, 3), [i % 2 for i in range(11)])
    assert np.array_equal(sample("--n 3", run=latent_run)["images"], drawn["images"][:3])
    shape = run_parts.shape_of(config, 2)
    network = run_parts.build_network(config, shape)
    network.load_state_dict(averages(latent_run, 2))
    latents = draw_samples.draw(
        network.eval(),
        run_parts.build_noise(config),
        config.sample,
        shape,
        drawn["labels"],
        indices=range(11),
        seed=0,
        device=torch.device("cpu"),
    )
    pixels = torch.nn.functional.pixel_shuffle(latents / 2.5 + 0.125, 2)
    assert np.array_equal(drawn["images"], draw_samples.to_uint8(pixels))
    assert drawn["images"].std() > 10


def test_the_run_shows_them_too(latent_run, sample):
    grid = Image.open(latent_run / "samples.png")
    assert np.array_equal(np.asarray(grid), np.asarray(sample("--n 2", "x.png", run=latent_run)))
    assert "class agreement" not in (latent_run / "report.html").read_text(), "that compares pixels"


def test_another_autoencoder_or_none(latent_run, sample, tmp_path):
    text = refusal(latent_run, "--autoencoder identity")
    assert "data.autoencoder: latents of identity have 3 channels, data.channels is 12" in text
    assert "/nowhere: no such autoencoder; give identity" in refusal(latent_run, "--autoencoder /nowhere")
    diffusers_model("AutoencoderTiny", latent_channels=12).save_pretrained(tmp_path / "vae")
    other = sample(f"--n 2 --autoencoder {tmp_path / 'vae'}", run=latent_run)["images"]
    mine = sample("--n 2", run=latent_run)["images"]
    assert other.shape == mine.shape
    assert not np.array_equal(other, mine)
    bare = Path(shutil.copytree(latent_run, tmp_path / "bare"))
    config = bare / "config.yaml"
    config.write_text(config.read_text().replace("autoencoder: space_to_depth:2", "autoencoder: null"))
    text = refusal(bare, "")
    assert f"{bare}: samples are latents of 12 channels; a picture needs their autoencoder" in text
    assert "--data.autoencoder" in text
    assert np.array_equal(sample("--n 2 --autoencoder space_to_depth:2", run=bare)["images"], mine)


def test_images_are_not_decoded(tmp_path):
    flags = ["--data.autoencoder", "space_to_depth:2"]
    outcome = forked(*" ".join(TINY).split(), *flags, "--out", tmp_path / "run")
    assert outcome.code == 2
    line = outcome.text.splitlines()[-1]
    assert line.startswith("error: data.autoencoder: space_to_depth:2 decodes latents, and fashion_mnist holds images;")


def test_the_command_itself_without_deepspeed(run, tmp_path):
    """Exit codes, and what it need not load: sampling starts faster, and works, where DeepSpeed does not import."""
    code = (
        "import sys; sys.modules['deepspeed'] = None; sys.argv[0] = 'sample.py'\n"
        "import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    flags = ["--run", run, "--device", "cpu", "--n", "2", "--out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    good = subprocess.Popen([sys.executable, "-c", code, FASTDIT / "sample.py", *flags, tmp_path / "x.png"], **pipes)
    bad = subprocess.Popen([sys.executable, FASTDIT / "sample.py", *flags, "x.gif"], **pipes)
    said, complaint = good.communicate()
    assert good.returncode == 0, complaint
    assert said == f"2 samples of {run / 'checkpoints/step-00000002'} in {tmp_path / 'x.png'}\n"
    assert (tmp_path / "x.png").is_file()
    said, complaint = bad.communicate()
    assert (bad.returncode, said) == (2, "")
    assert complaint.strip().startswith("error: --out x.gif: must end in .png or .npz, be a name of shards such as")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """The EMA weights of the run, as a file that tells its noise process."""
    path = tmp_path_factory.mktemp("weights") / "it.safetensors"
    _export(["--run", str(run), "--out", str(path)])
    return path


def test_weights_without_a_run_draw_what_the_run_draws(exported, two, tmp_path):
    flags = ["--weights", str(exported), "--device", "cpu", "--n", "2", "--steps", "2", "--guidance", "2"]
    _sample([*flags, "--out", str(tmp_path / "x.npz")])
    assert np.array_equal(np.load(tmp_path / "x.npz")["images"], two)


def test_files_of_other_weights_are_not_mixed(exported, tmp_path):
    """A folder of samples goes on with the same file only."""
    weights = shutil.copy(exported, tmp_path / "mine.safetensors")
    command = [
        "--weights",
        str(weights),
        "--device",
        "cpu",
        "--steps",
        "2",
        "--n",
        "2",
        "--out",
        str(tmp_path / "made"),
    ]
    _sample(command)
    _sample(command)
    weights.touch()
    with pytest.raises(UserError, match=r"samples.json: was begun with identity"):
        _sample(command)


def test_an_original_file_needs_its_noise_process(tmp_path, capsys):
    network = DiT(input_size=(4, 4), patch=2, channels=3, out_channels=6, width=384, depth=12, heads=6, classes=10)
    save_official(network.state_dict(), tmp_path / "dit.pt", grid=network.grid)
    flags = ["--weights", str(tmp_path / "dit.pt"), "--device", "cpu", "--n", "2", "--out", str(tmp_path / "x.npz")]
    with pytest.raises(UserError, match=r"dit.pt: does not tell its noise process; give --noise, as ddpm for a DiT$"):
        _sample(flags)
    _sample([*flags, "--noise", "ddpm", "--steps", "2"])
    drawn = np.load(tmp_path / "x.npz")["images"]
    expected = from_pretrained(tmp_path / "dit.pt", noise="ddpm", device="cpu").sample(n=2, steps=2)
    assert np.array_equal(drawn, expected)
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith(f"2 samples of {tmp_path / 'dit.pt'} in {tmp_path / 'x.npz'}")
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ["--run: name the folder of a run", "--weights FILE"]),
        ("--weights nowhere.pt", ["nowhere.pt", "no such file", "fastdit-data weights"]),
        ("--weights dit-xl-2-256", ["holds no verified weights", "run: fastdit-data weights dit-xl-2-256"]),
        ("--weights x --checkpoint y", ["--checkpoint: belongs to a run"]),
        ("--run RUN --noise ddpm", ["--noise: is for weights without a run"]),
    ],
)
def test_weights_and_runs_that_do_not_fit(run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        _sample(["--device", "cpu", *flags.replace("RUN", str(run)).split()])
    assert [word for word in words if word not in str(refused.value)] == [], refused.value
