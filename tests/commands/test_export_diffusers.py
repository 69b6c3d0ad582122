"""Test that diffusers draws fastdit's images from the folders that the export writes, and every refusal."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from autoencoder_helpers import diffusers_model
from data_helpers import latent_source
from launching import TINY, forked
from safetensors import safe_open
from test_pretrained import random_like

import fastdit
from fastdit import run_parts
from fastdit.commands import diffusers_export
from fastdit.commands.diffusers_export import DiffusersExport
from fastdit.errors import UserError
from fastdit.evaluation.open_run import SampledRun
from fastdit.export import _export
from fastdit.models import Autoencoder, LatentDecoder, load_checkpoint, pipeline_vae
from fastdit.models.autoencoders import open_autoencoder
from fastdit.noise.sampling import sample
from fastdit.parser import load, parse

STEPS, SCALES, SHIFTS = 20, [0.5, 2.0, 1.25, 0.75], [0.1, -0.3, 0.0, 0.2]
PIXELS = [*map(str, TINY), "--sample.guidance", "2", "--sample.steps", "7"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A tiny AutoencoderKL as diffusers saves it."""
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    diffusers_model("AutoencoderKL").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, vae) -> Path:
    """A DDPM run of a few steps on latents, each channel with a scale and a shift of its own."""
    home = tmp_path_factory.mktemp("latents")
    (home / "data").mkdir()
    means = np.random.default_rng(0).normal(0, 0.5, (6, 1, 4, 8, 8)).astype(np.float32)
    latent_source(home / "data", np.concatenate([means, np.full_like(means, 0.1)], axis=1))
    flags = ["--data.source", home / "data", "--data.size", 8, "--data.channels", 4, "--data.flip", "false"]
    flags += ["--data.latent_scale", SCALES, "--data.latent_shift", SHIFTS, "--data.autoencoder", vae]
    flags += ["--noise.name", "ddpm", "--noise.ddpm.steps", STEPS, "--model.patch", 2, "--steps", 6, "--warmup", 0]
    flags += ["--sample.guidance", 3, "--lr", 0.02, "--sample.agreement", 0, "--sample.steps", 10]
    forked(*TINY, *flags, "--out", home / "run").succeeded()
    return home / "run"


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    """The run as the command exports it."""
    out = tmp_path_factory.mktemp("exported") / "pipeline"
    _export(["--run", str(run), "--format", "diffusers", "--out", str(out)])
    return out


def code_of(folder: Path, monkeypatch, **changes) -> dict:
    """Run the code in the model card, and return its variables. changes: what replaces texts in it."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict = {}
    exec(code, names)
    return names


def drawn(network, process, shape, labels, sampler, guidance, steps) -> torch.Tensor:
    """fastdit's samples of the noise that the model card's code draws."""
    noise = torch.randn(len(labels), shape.channels, shape.height, shape.width, generator=torch.manual_seed(0))
    settings = {"sampler": sampler, "guidance": guidance, "steps": steps, "null_label": shape.classes}
    return sample(process, network, noise, torch.tensor(labels), **settings)


def levels(x: torch.Tensor) -> np.ndarray:
    """Images (n, C, H, W) in [-1, 1] as numbers from 0 to 255, (n, H, W, C)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()


# -- a pipeline --


def test_the_pipeline_draws_the_same_images(run, folder, monkeypatch):
    names = code_of(folder, monkeypatch)
    assert type(names["pipeline"]) is diffusers.DiTPipeline
    model = fastdit.load(run, device="cpu")
    latents = drawn(model.network, model.noise, model.shape, [0, 1], "ddim", 3.0, STEPS)
    expected = levels(model.decoder(latents))
    got = np.stack([np.asarray(image) for image in names["images"]]).astype(float)
    assert got.shape == (2, 32, 32, 3)
    assert expected.std() > 10
    assert abs(got - expected).max() < 0.51, "rounding to whole levels is half of one"


def test_the_time_frequencies_matter_and_the_card_says_so(run, folder, capsys):
    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    x, t, y = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(1)), torch.tensor([19, 7]), torch.tensor([0, 1])
    network = fastdit.load(run, device="cpu").network
    with torch.no_grad():
        expected = network(x, t.float(), y)
        before = pipeline.transformer(x, t, y).sample
        for block in pipeline.transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        after = pipeline.transformer(x, t, y).sample
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-5)
    assert abs(before - expected).max() > 1e-4
    assert "Set downscale_freq_shift to 0" in (folder / "README.md").read_text()


def test_the_folder_holds_classes_and_the_scheduler(run, folder):
    index = json.loads((folder / "model_index.json").read_text())
    names = fastdit.load(run, device="cpu").class_names
    assert index["id2label"] == {str(label): name for label, name in enumerate(names)}
    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    assert pipeline.get_label_ids([names[1]]) == [1]
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler
    assert not pipeline.scheduler.config.clip_sample
    with safe_open(folder / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fastdit"])["noise"]["steps"] == STEPS
    card = (folder / "README.md").read_text()
    assert "- training: 6 steps" in card
    assert str(run.parent) not in card, "no path of this machine"


def test_fastdit_reads_it_back(run, folder, vae):
    """The weights are those of the run to the bit, and sampling takes scheduler, classes and VAE from the folder."""
    model, again = fastdit.load(run, device="cpu"), fastdit.from_pretrained(folder, device="cpu")
    before, after = model.network.state_dict(), again.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (again.noise, again.class_names, again.shape) == (model.noise, model.class_names, model.shape)
    settings = {"n": 3, "seed": 2, "guidance": 2.0, "steps": 5, "sampler": "ddim"}
    difference = model.sample(**settings).astype(int) - again.sample(**settings)
    assert abs(difference).max() <= 1
    network = run_parts.build_network(model.config, model.shape)
    load_checkpoint(network, folder)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())
    with pytest.raises(UserError, match=r"take --noise\.name ddpm --noise\.ddpm\.steps 20"):
        fastdit.from_pretrained(folder, noise="edm", device="cpu")


def test_a_network_with_diffusers_time_frequencies_needs_nothing(run, tmp_path, monkeypatch):
    """A run that began with weights of diffusers has such a network."""
    config = load(run / "config.yaml")
    shape = run_parts.shape_of(config, 2)
    network = with_random_weights(config, shape)
    network.time_embed.freq_shift.fill_(1)
    folder = written(config, network, shape, tmp_path / "stock", ["a", "b"])
    assert "downscale_freq_shift" not in (folder / "README.md").read_text()
    names = code_of(folder, monkeypatch, **{"generator=": "output_type='np', generator="})
    latents = drawn(network, config.noise.process, shape, [0, 1], "ddim", 3.0, STEPS)
    expected = levels(run_parts.build_decoder(config, shape)(latents))
    assert abs(names["images"] * 255 - expected).max() < 0.02
    assert expected.std() > 10


@pytest.mark.parametrize(("scale", "shift"), [(0.3, 0.0), (0.3, 0.2), (tuple(SCALES), tuple(SHIFTS))])
@pytest.mark.parametrize("convolutions", [True, False])
def test_the_vae_decodes_and_encodes_a_runs_latents(tmp_path, scale, shift, convolutions):
    settings = {"use_quant_conv": convolutions, "use_post_quant_conv": convolutions}
    diffusers_model("AutoencoderKL", **settings).save_pretrained(tmp_path / "a")
    decoder = LatentDecoder(open_autoencoder(str(tmp_path / "a")), scale=scale, shift=shift)
    x, picture = torch.randn(2, 4, 6, 6), torch.rand(1, 3, 16, 16) * 2 - 1
    expected, (mean, std) = decoder(x), decoder.autoencoder.encode(picture)
    pipeline_vae(decoder).save_pretrained(tmp_path / "b")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(vae.decode(x / vae.config.scaling_factor).sample, expected, rtol=0, atol=2e-5)
    posterior, scaled = vae.encode(picture).latent_dist, decoder.scale * vae.config.scaling_factor**-1
    torch.testing.assert_close(posterior.mean * vae.config.scaling_factor, (mean - decoder.shift) * decoder.scale)
    torch.testing.assert_close(posterior.std, std * scaled, rtol=1e-4, atol=1e-6)


def test_a_tiny_autoencoder_is_a_vae_too(tmp_path, monkeypatch):
    diffusers_model("AutoencoderTiny", latent_channels=4).save_pretrained(tmp_path / "tiny")
    flags = (
        f"--data.size 8 --data.channels 4 --data.latent_scale 0.5 --model.patch 2 --data.autoencoder {tmp_path}/tiny"
    )
    config = parse([*PIXELS, *flags.split(), "--noise.name", "ddpm", "--noise.ddpm.steps", str(STEPS)])
    shape = run_parts.shape_of(config, 2)
    network = with_random_weights(config, shape)
    folder = written(config, network, shape, tmp_path / "pipeline", ["a", "b"])
    images = code_of(folder, monkeypatch, **{"generator=": "output_type='np', generator="})["images"]
    latents = drawn(network, config.noise.process, shape, [0, 1], "ddim", 2.0, STEPS)
    expected = levels(run_parts.build_decoder(config, shape)(latents))
    assert abs(images * 255 - expected).max() < 0.02
    assert expected.std() > 1


# -- a loop --


def with_random_weights(config, shape) -> torch.nn.Module:
    """The run's network with weights that let every part of it matter."""
    network, generator = run_parts.build_network(config, shape), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(random_like(weight.shape, generator) / 2)
    return network.eval()


def written(config, network, shape, folder: Path, names) -> Path:
    """Write a network as the command does, without a run."""
    (folder.parent / "checkpoints" / "step-00000003").mkdir(parents=True, exist_ok=True)
    checkpoint = folder.parent / "checkpoints" / "step-00000003"
    (checkpoint / "manifest.json").write_text('{"step": 3, "sha256": {}}')
    folder.mkdir()
    export = DiffusersExport(config, network, run_parts.build_decoder(config, shape))
    export.write(folder, SampledRun(config, checkpoint, shape, network), folder.parent, names, "ema", folder.name)
    return folder


@pytest.mark.parametrize(
    ("flags", "kind", "sampler", "reason"),
    [
        ("--noise.name ddpm --noise.ddpm.steps 30", "DDIMScheduler", "ddim", "this run has no autoencoder"),
        ("--noise.name edm --noise.edm.sigma_max 20", "EDMEulerScheduler", "euler", "from sigma_max"),
        ("--noise.name flow", "FlowMatchEulerDiscreteScheduler", "euler", "scale_model_input"),
        (
            "--noise.name flow --noise.flow.convention sit",
            "FlowMatchEulerDiscreteScheduler",
            "euler",
            "scale_model_input",
        ),
        (
            "--noise.name flow --noise.flow.convention repa",
            "FlowMatchEulerDiscreteScheduler",
            "euler",
            "scale_model_input",
        ),
    ],
)
def test_the_loop_in_the_card_draws_the_same_images(tmp_path, monkeypatch, flags, kind, sampler, reason):
    config = parse([*PIXELS, *flags.split()])
    shape = run_parts.shape_of(config, 3)
    network = with_random_weights(config, shape)
    folder = written(config, network, shape, tmp_path / "parts", ["a", "b", "c"])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "scheduler", "transformer"]
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == kind
    card = (folder / "README.md").read_text()
    assert "DiTPipeline cannot draw with it: it " in card
    assert reason in card
    read = fastdit.from_pretrained(
        folder, noise=config.noise.process, device="cpu"
    )  # the folder, not only its transformer
    assert all(torch.equal(weight, read.network.state_dict()[name]) for name, weight in network.state_dict().items())
    names = code_of(folder, monkeypatch)
    steps = 30 if sampler == "ddim" else 50
    assert names["steps"] == steps
    expected = drawn(network, config.noise.process, shape, [0, 1], sampler, 2.0, steps)
    assert expected.std() > 0.1
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(names["x"], expected, rtol=0, atol=2e-4 * scale)


def test_more_classes_than_the_pipeline_guides(run, tmp_path, monkeypatch):
    """DiTPipeline takes 1000 for the null label. The loop takes the network's."""
    config = load(run / "config.yaml")
    shape = run_parts.shape_of(config, 1003)
    network = with_random_weights(config, shape)
    folder = written(config, network, shape, tmp_path / "many", [str(label) for label in range(1003)])
    assert not (folder / "model_index.json").exists()
    assert "it guides with label 1000, which is one of this run's classes" in (folder / "README.md").read_text()
    names = code_of(folder, monkeypatch)
    latents = drawn(network, config.noise.process, shape, [0, 1], "ddim", 3.0, STEPS)
    torch.testing.assert_close(names["x"], run_parts.build_decoder(config, shape)(latents), rtol=0, atol=1e-3)


def test_an_autoencoder_that_diffusers_does_not_have(run, tmp_path):
    config = parse([*PIXELS, "--noise.name", "ddpm", "--data.channels", "4", "--model.patch", "7"])

    class Other(Autoencoder):
        pass

    decoder = LatentDecoder(Other("taef2", channels=4, factor=2))
    export = DiffusersExport(config, run_parts.build_network(config, run_parts.shape_of(config, 2)), decoder)
    assert (export.vae, export.reason) == (None, "it needs a VAE, and taef2 is no autoencoder of diffusers")
    diffusers_model("AutoencoderTiny", latent_channels=4).save_pretrained(tmp_path / "tiny")
    decoder = LatentDecoder(open_autoencoder(str(tmp_path / "tiny")), shift=0.5)
    with pytest.raises(UserError, match="AutoencoderTiny, which has no place for a shift of latents"):
        pipeline_vae(decoder)
    decoder = LatentDecoder(open_autoencoder(str(tmp_path / "tiny")), scale=0.5)
    assert pipeline_vae(decoder).config.scaling_factor == 0.5


# -- mistakes --


def refusal(*flags) -> str:
    with pytest.raises(UserError) as caught:
        _export([str(flag) for flag in flags])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("qk_norm: none", "qk_norm: rms", "model.qk_norm rms: diffusers' DiT has no place for it"),
        ("rope: false", "rope: true", "model.rope true: diffusers' DiT has no place for it"),
        ("mlp_ratio: 4.0", "mlp_ratio: 2.0", "model.mlp_ratio 2: diffusers' DiT has 4"),
        ("size: 8\n", "size: [8, 4]\n", "data.size [8, 4]: diffusers' DiT takes squares"),
        ("method: dit\n", "method: sd_dit\n", "the network of --method sd_dit is no plain DiT"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_before_any_work(run, tmp_path, monkeypatch, old, new, words):
    copy = tmp_path / "copy"
    copy.mkdir()  # without checkpoints, so that nothing is read before
    text = (run / "config.yaml").read_text()
    assert old in text
    text = text.replace(old, new)
    if "sd_dit" in new:
        text = re.sub(r"(sd_dit:\n(?:  .*\n)*?  decoder:) \w+", r"\1 extra", text)
    (copy / "config.yaml").write_text(text)
    assert words in refusal("--run", copy, "--format", "diffusers", "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_places_that_do_not_fit(run, folder, tmp_path, monkeypatch):
    flags = ["--run", run, "--format", "diffusers", "--out"]
    assert f"--out {folder}: is not empty; name a new folder" in refusal(*flags, folder)
    (tmp_path / "file").write_text("")
    assert f"--out {tmp_path}/file: cannot write into" in refusal(*flags, tmp_path / "file")
    assert f"--out {tmp_path}/file/x: cannot write into" in refusal(*flags, tmp_path / "file" / "x")
    assert "--card x.md: the folder for diffusers has its own" in refusal(*flags, tmp_path / "x", "--card", "x.md")
    assert "must end in .pt or .safetensors, or name a folder with --format diffusers" in refusal(
        "--run", run, "--out", tmp_path / "x"
    )
    assert "must end in .pt with --format pt" in refusal("--run", run, "--format", "pt", "--out", tmp_path / "x")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers_export, "save_tensors", full)
    (tmp_path / "empty").mkdir()
    assert "cannot be read or written (No space left on device)" in refusal(*flags, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
    assert list((tmp_path / "empty").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / ".empty.partial").mkdir()  # of a process that was killed
    _export([str(flag) for flag in (*flags, tmp_path / "empty")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_without_diffusers(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    config = tmp_path / "run" / "config.yaml"
    shutil.copytree(run, config.parent)
    config.write_text(re.sub(r"autoencoder: .*", "autoencoder: null", config.read_text()))
    text = refusal("--run", config.parent, "--format", "diffusers", "--out", tmp_path / "x")
    assert text == "--format diffusers: diffusers is not installed; pip install 'fastdit[autoencoder]'"


# -- files --


def test_raw_weights_and_a_card(run, tmp_path, capsys):
    for weights in ("ema", "raw"):
        out = tmp_path / f"{weights}.safetensors"
        _export(["--run", str(run), "--out", str(out), "--weights", weights, "--card", str(tmp_path / "README.md")])
        opened = fastdit.load(run, weights=weights, device="cpu").network.state_dict()
        with safe_open(out, "pt") as file:
            assert all(torch.equal(file.get_tensor(key), value) for key, value in opened.items())
    assert "raw weights of" in capsys.readouterr().out
    card = (tmp_path / "README.md").read_text()
    assert 'fastdit.from_pretrained("raw.safetensors", autoencoder="PATH")' in card
    assert "raw weights" in card
