"""Test the Python API: what it draws is what the commands draw, to the bit, and every mistake is one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoder_helpers import KL, diffusers_model
from launching import TINY, averages, checkpoint, forked, metrics, pieces
from PIL import Image
from safetensors.torch import save_file
from test_pretrained import make_diffusers, make_official

import fastdit
from fastdit.evaluate import _evaluate
from fastdit.evaluation import draw_samples
from fastdit.export import _export
from fastdit.noise import DDPM
from fastdit.rundir import eval_log
from fastdit.sample import _sample

PUBLIC = {"DiT", "Model", "Pretrained", "Run", "UserError", "from_pretrained", "load"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two steps of flow matching, a checkpoint after each."""
    home = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--noise.name", "flow", "--save_every", 1, "--sample.guidance", 2, "--warmup", 0, "--lr", 0.05]
    forked(*TINY, *flags, "--sample.agreement", 0, "--steps", 2, "--out", home).succeeded()
    return home


@pytest.fixture(scope="module")
def run(folder) -> fastdit.Run:
    return fastdit.load(folder, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keep references out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_importing_is_fast_and_names_are_there():
    code = (
        "import sys, fastdit\n"
        f"assert set(fastdit.__all__) == {PUBLIC} <= set(dir(fastdit))\n"
        "assert issubclass(fastdit.UserError, Exception)\n"
        "loaded = {'torch', 'numpy', 'PIL', 'deepspeed', 'matplotlib'} & sys.modules.keys()\n"
        "assert not loaded, loaded\n"
        "from fastdit import load, DiT\n"
        "assert 'torch' in sys.modules and not {'deepspeed', 'matplotlib.pyplot'} & sys.modules.keys()\n"
        "try:\n    fastdit.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "module 'fastdit' has no attribute 'nothing'" in ended.stdout


# -- samples --

CASES = {
    "nothing": ({"n": 5}, "--n 5"),
    "classes": ({"classes": ["Coat", 3], "n": 13, "seed": 7}, "--classes Coat,3 --n 13 --seed 7"),
    "sampler": (
        {"n": 2, "sampler": "euler", "steps": 3, "guidance": 1.5},
        "--n 2 --sampler euler --steps 3 --guidance 1.5",
    ),
    "interval": (
        {"n": 2, "interval": (0.1, 2), "guided_channels": 1, "steps": 4},
        "--n 2 --interval [0.1,2] --guided_channels 1 --steps 4",
    ),
    "sde": (
        {"n": 2, "sampler": "euler_maruyama", "diffusion_form": "constant", "diffusion_norm": 2, "last_step_size": 0.1},
        "--n 2 --sampler euler_maruyama --diffusion_form constant --diffusion_norm 2 --last_step_size 0.1",
    ),
}


@pytest.mark.parametrize(("settings", "flags"), CASES.values(), ids=CASES)
def test_the_same_images_as_the_command(folder, run, tmp_path, settings, flags):
    out = tmp_path / "x.npz"
    _sample(["--run", str(folder), "--device", "cpu", "--out", str(out), *flags.split()])
    drawn, images = np.load(out), run.sample(**settings)
    assert (images.dtype, images.shape[1:]) == (np.uint8, (28, 28, 1))
    assert images.std() > 1
    assert np.array_equal(images, drawn["images"])
    assert np.array_equal(run.labels(settings.get("classes"), settings["n"]), drawn["labels"])


def test_an_earlier_checkpoint_by_its_step_or_its_folder(folder, run, tmp_path):
    older = checkpoint(folder, 1)
    _sample(
        ["--run", str(folder), "--device", "cpu", "--out", f"{tmp_path}/x.npz", "--n", "2", "--checkpoint", str(older)]
    )
    expected = np.load(tmp_path / "x.npz")["images"]
    for named in (1, older, str(older)):
        opened = fastdit.load(folder, checkpoint=named, device="cpu")
        assert (opened.step, opened.checkpoint, run.step) == (1, older, 2)
        assert np.array_equal(opened.sample(n=2), expected)
    assert not np.array_equal(run.sample(n=2), expected)


def test_other_forms_of_images(folder, run, tmp_path):
    images = run.sample([4, 0], 3, seed=1)
    pictures = run.sample([4, 0], 3, seed=1, output="pil")
    assert [picture.mode for picture in pictures] == ["L"] * 3
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), images[..., 0])
    raw = run.sample([4, 0], 3, seed=1, output="latents", progress=True)
    assert (raw.dtype, raw.shape) == (np.float32, (3, 1, 28, 28))
    assert np.array_equal(((raw.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)[:, 0], images[..., 0])
    _sample(["--run", str(folder), "--device", "cpu", "--out", f"{tmp_path}/x.png", "--n", "4", "--classes", "1,2"])
    assert np.array_equal(np.asarray(run.grid([1, 2], 4)), np.asarray(Image.open(tmp_path / "x.png")))
    assert run.sample().shape == (10, 28, 28, 1), "one of each class"
    assert run.sample("Bag", 2).shape == (2, 28, 28, 1)


def test_raw_and_ema_weights(folder, run):
    raw = fastdit.load(folder, weights="raw", device="cpu")
    expected = pieces(folder, 2)
    for name, value in raw.network.named_parameters():
        assert torch.equal(value, expected[name]), name
    average = averages(folder, 2)
    assert all(torch.equal(value, average[name]) for name, value in run.network.state_dict().items())
    assert any(not torch.equal(average[name], expected[name]) for name in expected)


def test_a_run_tells_of_itself(folder, run):
    assert run.class_names[4] == "Coat"
    assert (run.config.noise.name, run.config.batch, run.noise.name) == ("flow", 8, "flow")
    assert not run.network.training
    assert run.metrics() == metrics(folder)
    assert run.evaluations() == eval_log.read(folder)
    assert repr(run) == f"<fastdit.Run {folder}: 1x28x28, 10 classes, flow, on cpu>"


# -- figures --


def test_the_same_figures_as_the_command(folder, run):
    flags = ["--n", "8", "--n_real", "12", "--labels", "random", "--seed", "3", "--steps", "3"]
    _evaluate(["--run", str(folder), "--device", "cpu", *flags])
    written = run.evaluations()[-1]
    figures = run.evaluate(8, n_real=12, labels="random", seed=3, steps=3)
    assert figures == written["figures"]
    assert {"FD-lite0", "class agreement"} <= figures.keys()
    assert len(run.evaluations()) == 1, "the API adds nothing to the run"


# -- files of weights --


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("exported")
    for name in ("w.safetensors", "w.pt"):
        _export(["--run", str(folder), "--out", str(home / name)])
    return home


def test_an_export_draws_what_its_run_draws(run, exported):
    model = fastdit.from_pretrained(exported / "w.safetensors", device="cpu")
    assert (model.class_names, model.noise, model.shape) == (run.class_names, run.noise, run.shape)
    settings = {"classes": ["Coat"], "n": 2, "guidance": 2.0, "seed": 5, "steps": 2}
    assert np.array_equal(model.sample(**settings), run.sample(**settings))


def test_a_file_of_the_original_layout(run, exported, monkeypatch):
    path = exported / "w.pt"
    with pytest.raises(fastdit.UserError, match="no number of attention heads is known for depth 2 and width 32; give"):
        fastdit.from_pretrained(path)
    silent = fastdit.from_pretrained(path, heads=2, device="cpu")
    with pytest.raises(fastdit.UserError, match="does not tell its noise process; open it with noise=, one of edm"):
        silent.sample(n=1)
    model = fastdit.from_pretrained(path, heads=2, noise="flow", device="cpu")
    settings = {"n": 2, "guidance": 2.0, "steps": 2}
    assert np.array_equal(model.sample(**settings), run.sample(**settings))
    assert model.class_names == tuple(map(str, range(10)))


def test_published_layouts_of_others(tmp_path):
    """Sizes come from the tensors, and from config.json; a file without a null class is sampled without guidance."""
    case = {"input_size": 12, "patch": 2, "channels": 3, "width": 72, "depth": 3, "heads": 3, "classes": 7}
    make_diffusers(case, out_channels=6).save_pretrained(tmp_path / "transformer")
    model = fastdit.from_pretrained(tmp_path / "transformer", noise=DDPM(steps=50), device="cpu")
    assert (model.shape.height, model.shape.classes, model.network.heads) == (12, 7, 3)
    assert model.sample(n=2, guidance=3.0, steps=2, sampler="ddim").shape == (2, 12, 12, 3)

    state = make_official(case | {"out_channels": 6})
    torch.save({"model": state, "ema": state}, tmp_path / "x.pt")
    network = fastdit.from_pretrained(tmp_path / "x.pt", heads=3, device="cpu").network
    assert (network.grid, network.out_channels, network.classes) == ((6, 6), 6, 7)
    larger = fastdit.from_pretrained(tmp_path / "x.pt", heads=3, size=(16, 12), device="cpu").network
    assert larger(torch.zeros(1, 3, 16, 12), torch.zeros(1), torch.tensor([7])).shape == (1, 6, 16, 12)

    torch.save(make_official(case | {"out_channels": 6, "classes": 9}), tmp_path / "ten.pt")  # ten rows
    model = fastdit.from_pretrained(tmp_path / "ten.pt", heads=3, noise="ddpm", device="cpu")
    assert (model.shape.classes, model.network.null_class) == (10, False)
    assert model.sample(n=2, steps=2).shape == (2, 12, 12, 3)
    with pytest.raises(fastdit.UserError, match="has no null class to guide with; draw with guidance=1"):
        model.sample(n=2, steps=2, guidance=2)


def test_sits_weights_keep_the_first_half_of_their_outputs(tmp_path):
    case = {"input_size": 8, "patch": 2, "channels": 4, "width": 32, "depth": 2, "heads": 2, "classes": 3}
    state = make_official(case | {"out_channels": 8})
    for leaf in ("weight", "bias"):
        state[f"final_layer.linear.{leaf}"].unflatten(0, (4, 2, 4))[:, 1] = 0
    torch.save({"model": state, "args": {"path_type": "Linear", "prediction": "velocity"}}, tmp_path / "sit.pt")
    model = fastdit.from_pretrained(tmp_path / "sit.pt", heads=2, device="cpu")
    assert (model.noise.name, model.noise.convention, model.network.out_channels) == ("flow", "sit", 4)
    assert model.sample(n=2, steps=2, output="latents").shape == (2, 4, 8, 8)
    with pytest.raises(fastdit.UserError, match=r"samples are latents of 4 channels; open it with autoencoder="):
        model.sample(n=2)


def test_latents_without_a_description_have_the_autoencoders_own_scale_and_shift(tmp_path):
    diffusers_model("AutoencoderKL").save_pretrained(tmp_path / "vae")
    case = {"input_size": 8, "patch": 2, "channels": 4, "width": 32, "depth": 2, "heads": 2, "classes": 3}
    torch.save(make_official(case | {"out_channels": 8}), tmp_path / "dit.pt")
    settings = {"heads": 2, "noise": "ddpm", "device": "cpu", "autoencoder": tmp_path / "vae"}
    model, drawn = fastdit.from_pretrained(tmp_path / "dit.pt", **settings), {"n": 2, "steps": 3, "sampler": "ddim"}
    latents = torch.from_numpy(model.sample(**drawn, output="latents"))
    pictures = model.decoder.autoencoder.decode(latents / KL["scaling_factor"] + KL["shift_factor"])
    assert np.array_equal(model.sample(**drawn), draw_samples.to_uint8(pictures))


def test_a_network_of_ones_own():
    network = fastdit.DiT(input_size=8, patch=2, channels=3, width=32, depth=2, heads=2, classes=4)
    assert network(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 4])).shape == (2, 3, 8, 8)


# -- mistakes --


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": ["Coatt"]}, "classes: there is no class 'Coatt'; the names are T-shirt/top, Trouser"),
        ({"classes": [10]}, "classes: 10 is out of range; labels are 0 to 9"),
        ({"classes": [-1]}, "classes: -1 is out of range"),
        ({"classes": [1.5]}, "classes: expected a whole number, got 1.5"),
        ({"classes": []}, "classes: is empty"),
        ({"classes": [True]}, "classes: expected a whole number, got True"),
        ({"precision": "fp8"}, "precision: 'fp8' is unknown; give one of auto, bf16, tf32, fp32"),
        ({"precision": "tf32"}, "tf32 is for GPUs"),
        ({"batch": 0}, "batch: must be at least 1, got 0"),
        ({"n": 0}, "n: must be at least 1, got 0"),
        ({"n": "x"}, "n: expected a whole number, got 'x'"),
        ({"seed": -1}, "seed: must be at least 0"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"steps": 2.5}, "steps: expected a whole number, got 2.5"),
        ({"guidance": "x"}, "guidance: expected a number, got 'x'"),
        ({"guidance": float("nan")}, "guidance: must be a finite number"),
        ({"interval": 3}, "interval: expected a pair (lo, hi), got 3"),
        ({"interval": (3, 1)}, "the first must be below the second"),
        ({"sampler": "ddim"}, "sampler: flow has no 'ddim'; choose one of heun"),
        ({"sampler": 3}, "sampler: "),
        ({"guided_channels": 2}, "guided_channels: 2; samples have 1 channels"),
        ({"diffusion_norm": 2.0}, "needs the SDE sampler"),
        ({"output": "jpg"}, "output: 'jpg' is unknown; give one of uint8, pil, latents"),
    ],
)
def test_each_mistake_is_one_line(run, settings, words):
    with pytest.raises(fastdit.UserError) as caught:
        run.sample(**settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_of_opening_and_evaluating(folder, run, tmp_path):
    mistakes = {
        lambda: fastdit.load(tmp_path / "none"): "config.yaml: cannot be read",
        lambda: fastdit.load(folder, checkpoint=9): "step-00000009: manifest.json is missing",
        lambda: fastdit.load(
            folder, weights="average", device="cpu"
        ): "has no EMA 'average' of the sampled network; take",
        lambda: fastdit.load(folder, device="tpux"): "device tpux: cannot be used here",
        lambda: fastdit.load(folder, device="cpu", autoencoder="/nowhere").sample(): "/nowhere: no such autoencoder",
        lambda: fastdit.from_pretrained(tmp_path / "none.pt"): "none.pt: no such file",
        lambda: fastdit.from_pretrained(folder): "it is a run",
        lambda: fastdit.from_pretrained(folder, noise="vp"): "noise: unknown process 'vp'; choose one of edm",
        lambda: run.evaluate(8, stps=2): "stps: no such setting of a sampler",
        lambda: run.evaluate(8, features="fid"): "features: 'fid' is unknown; give one of lite0, inception",
        lambda: run.evaluate(8, data=tmp_path / "none"): "none: no such file or folder",
        lambda: run.evaluate(1): "eval.n: must be at least 2",
    }
    for work, words in mistakes.items():
        with pytest.raises(fastdit.UserError) as caught:
            work()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_noise_process_with_another_number_of_outputs(exported):
    with pytest.raises(fastdit.UserError, match=r"has 1 outputs, and the noise process ddpm has 2; give another"):
        fastdit.from_pretrained(exported / "w.pt", noise="ddpm", heads=2, device="cpu")


def test_an_export_of_another_noise_process_or_none(exported, tmp_path):
    with pytest.raises(fastdit.UserError, match=r"trained with the noise process flow, this run has edm"):
        fastdit.from_pretrained(exported / "w.safetensors", noise="edm")
    state = fastdit.from_pretrained(exported / "w.safetensors", device="cpu").network.state_dict()
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(fastdit.UserError, match=r"it does not tell the size of its samples; give size="):
        fastdit.from_pretrained(tmp_path / "bare.safetensors", heads=2)
    network = fastdit.from_pretrained(tmp_path / "bare.safetensors", heads=2, size=28, device="cpu").network
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
