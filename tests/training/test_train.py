"""Test what a run does and leaves behind, with every kind of data, noise and failure. One rank unless said."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import encode, latent_source, picture
from launching import TINY, averages, checkpoint, deepspeed, forked, metrics, pieces, run
from PIL import Image
from report_helpers import Page
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdit.parser import load
from fastdit.rundir.checkpoint_files import damage

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 6 steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    text = forked(*TINY, "--steps", 6, "--sample_every", 4, "--sample.agreement", 20, "--out", folder).succeeded().text
    return folder, text


def test_leaves_its_settings_and_versions(trained):
    folder, _ = trained
    config = load(folder / "config.yaml")
    assert (config.steps, config.batch, config.lr) == (6, 8, 2e-3)
    assert (config.model.width, config.data.size, config.sample.steps) == (32, 28, 2)
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert {"python", "deepspeed", "fastdit", "commit", "device"} <= versions.keys()


def test_leaves_the_same_scalars_in_both_records(trained):
    folder, _ = trained
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = {tag for tag in board.Tags()["scalars"] if not tag.startswith("final/")}
    assert tags == lines[0].keys() - {"step"}
    assert {"loss", "grad_norm", "lr", "images_per_sec", "seconds_per_step", "skipped"} <= lines[0].keys()
    for key in tags:
        events = [(event.step, event.value) for event in board.Scalars(key)]
        assert events == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines], key
    assert [line["images"] for line in lines] == [8, 16, 24, 32, 40, 48]
    assert all(line["seconds_per_step"] * line["images_per_sec"] == pytest.approx(8) for line in lines)
    assert [event.step for event in board.Images("samples")] == [4, 6]
    assert [event.step for event in board.Images("training images")] == [0]
    assert [event.value for event in board.Scalars("final/loss")] == [pytest.approx(lines[-1]["loss"], rel=1e-6)]
    assert board.Scalars("final/class agreement")
    assert lines[-1]["memory_gb"] > 0.1


def test_leaves_pictures_and_a_report_that_fetches_nothing(trained):
    folder, text = trained
    for name in ("samples.png", "curves.png", "samples/step-00000004.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 100
    with Image.open(folder / "real.png") as real, Image.open(folder / "samples.png") as samples:
        assert real.size == samples.size
    source = (folder / "report.html").read_text()
    page = Page(source)
    assert len(page.links("img")) == 2, "training images and samples"
    assert all(link.startswith("data:") for link in page.links())
    assert "location.reload" not in source
    assert [text for text in ("Finished: 6 steps", "class agreement", "width: 32") if text not in page.text] == []
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["command"].startswith("fastdit/train.py --device cpu")
    assert facts["command"] in page.text
    assert (facts["seed"], facts["fine-tuning"], facts["initial weights"]) == ("0", "none", "random")
    assert not (folder / "plotly.min.js").exists()
    for line in (f"pictures: {folder / 'samples.png'}", f"report: {folder / 'report.html'}", "what to run next:"):
        assert line in text


def test_leaves_a_checkpoint_with_hashes(trained):
    folder, _ = trained
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    last = checkpoint(folder, 6)
    manifest = json.loads((last / "manifest.json").read_text())
    assert (manifest["step"], manifest["world"], manifest["classes"]) == (6, 1, 10)
    written = {str(path.relative_to(last)) for path in last.rglob("*") if path.is_file()}
    assert manifest["sha256"].keys() == written - {"manifest.json"}
    assert damage(last) is None


def test_refuses_a_folder_that_holds_a_run(trained):
    folder, _ = trained
    before = (folder / "metrics.jsonl").read_bytes()
    outcome = forked(*TINY, "--steps", 6, "--out", folder)
    assert outcome.code == 2
    assert "already holds a run; go on with --resume" in outcome.text
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("noise", ["edm", "ddpm", "flow"])
def test_every_noise_process_learns(tmp_path, noise):
    flags = ["--noise.name", noise, "--steps", 80, "--batch", 16, "--ema.decay", 0.5, "--out", tmp_path / "run"]
    forked(*TINY, *flags).succeeded()
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert np.mean(losses[-20:]) < 0.75 * np.mean(losses[:10])
    assert (tmp_path / "run" / "samples.png").exists()


def latents(folder: Path, n: int = 24, spoiled=()) -> list[str]:
    """Posteriors (2, 4, 6, 6) in shards, those in `spoiled` with a NaN; the flags to train on them."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(0, 3, (n, 1, 4, 6, 6)), rng.uniform(0.1, 0.2, (n, 1, 4, 6, 6))
    posteriors = np.concatenate([mean, std], axis=1).astype(np.float32)
    posteriors[list(spoiled), 0, 0, 0, 0] = np.nan
    folder.mkdir()
    latent_source(folder, posteriors)
    flags = "--data.size 6 --data.channels 4 --data.flip false --data.latent_scale 0.3 --model.patch 2"
    return [*TINY, *flags.split(), "--data.source", str(folder)]


def test_latent_shards_train(tmp_path):
    out = tmp_path / "run"
    forked(*latents(tmp_path / "data"), "--steps", 120, "--lr", "5e-3", "--out", out).succeeded()
    losses = [line["loss"] for line in metrics(out)]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:10])
    assert not (out / "samples.png").exists(), "latents are no pictures"
    assert (out / "report.html").exists()


def image_tree(folder: Path) -> list[str]:
    """Two classes of 6 colour images each, one of them corrupt; the flags to train on them."""
    for i in range(12):
        path = folder / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encode(picture(33, 41, seed=i), "PNG")
        path.write_bytes(data[: len(data) // 2] if i == 7 else data)
    return [*TINY, "--data.source", str(folder), "--data.size", "14", "--data.channels", "3"]


def test_class_folders_train_past_a_corrupt_image(tmp_path):
    flags = image_tree(tmp_path / "data")
    outcome = forked(*flags, "--data.on_corrupt", "skip", "--steps", 4, "--out", tmp_path / "run").succeeded()
    assert "07.png" in outcome.text
    assert "2 classes" in outcome.text
    assert metrics(tmp_path / "run")[-1]["corrupt_skipped"] == 1


def test_two_ranks_stop_at_a_corrupt_image_that_one_of_them_meets(tmp_path):
    outcome = run(deepspeed(*image_tree(tmp_path / "data"), "--steps", 9, "--out", tmp_path / "run"), tmp_path / "log")
    assert outcome.code != 0
    (error,) = [line for line in outcome.text.splitlines() if line.startswith("error: ")]
    assert "07.png" in error
    assert "Traceback" not in outcome.text, outcome.text


STEPS = [(0, "fp32", 1), (1, "fp32", 1), (1, "fp32", 2), (1, "bf16", 1), (2, "bf16", 2), (3, "bf16", 1)]


@pytest.mark.parametrize(("stage", "precision", "ranks"), STEPS)
def test_a_poisoned_batch_is_skipped(tmp_path, stage, precision, ranks):
    # 24 samples, 8 a step: one step in three meets the bad one, on one rank.
    flags = [*latents(tmp_path / "data", spoiled=[5]), "--ds_config", f"zero{stage}", "--precision", precision]
    forked(*flags, "--steps", 9, "--grad_clip", 1, "--out", tmp_path / "run", ranks=ranks).succeeded()
    lines = metrics(tmp_path / "run")
    assert [sum(line["loss"] is None for line in lines[at : at + 3]) for at in (0, 3, 6)] == [1, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [line["loss"] is None for line in lines]
    assert [line["skipped"] for line in lines] == list(np.cumsum([line["loss"] is None for line in lines]))
    assert all(value.isfinite().all() for value in averages(tmp_path / "run", 9).values())
    assert all(value.isfinite().all() for value in pieces(tmp_path / "run", 9).values())


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (3, "bf16")])
def test_losses_that_stay_nonfinite_stop_the_run(tmp_path, stage, precision):
    out = tmp_path / "run"
    flags = ["--lr", "1e30", "--steps", 50, "--save_every", 1, "--max_nonfinite", 4, "--log_every", 5, "--out", out]
    outcome = forked(*TINY, *flags, "--ds_config", f"zero{stage}", "--precision", precision)
    assert outcome.code == 2
    (error,) = [line for line in outcome.text.splitlines() if line.startswith("error: ")]
    found = re.match(r"error: step (\d+): loss or gradient not finite.* for (\d+) steps in a row.*; (.*)", error)
    first, streak = int(found[1]), int(found[2])
    assert 2 <= first <= 3
    assert 4 <= streak <= 9
    assert "no checkpoint is from before; start a new run with a lower --lr" in error
    for saved in (out / "checkpoints").glob("step-*"):
        assert damage(saved) is None
        assert all(value.isfinite().all() for value in averages(out, int(saved.name[5:])).values())
    assert "Traceback" not in outcome.text


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_that_never_sees_a_finite_loss_stops(tmp_path, stage):
    out = tmp_path / "run"
    flags = [*latents(tmp_path / "data", spoiled=range(24)), "--ds_config", f"zero{stage}", "--save_every", 1]
    outcome = forked(*flags, "--steps", 9, "--out", out)
    assert outcome.code == 2, outcome.text
    assert "error: step 1: loss or gradient not finite" in outcome.text
    assert "no checkpoint is from before" in outcome.text
    assert all(value.isfinite().all() for value in averages(out, 2).values())
    again = forked("--resume", "--out", out)
    assert again.code == 2
    assert f"resumed {checkpoint(out, 2)}" in again.text
    assert "error: step 3: loss or gradient not finite" in again.text
    assert "Traceback" not in outcome.text + again.text


def test_two_ranks_stop_at_a_nonfinite_loss_of_one(tmp_path):
    flags = [*latents(tmp_path / "data", spoiled=[5]), "--max_nonfinite", 1, "--steps", 9, "--out", tmp_path / "run"]
    outcome = run(deepspeed(*flags), tmp_path / "log")
    assert outcome.code == 2, outcome.text
    lines = metrics(tmp_path / "run")
    (error,) = [line for line in outcome.text.splitlines() if line.startswith("error: ")]
    assert f"error: step {len(lines)}: loss or gradient not finite" in error
    assert "no checkpoint is from before" in error
    assert [line["loss"] is None for line in lines] == [False] * (len(lines) - 1) + [True]
    assert "Traceback" not in outcome.text, outcome.text


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_quickstart_stopped_early_goes_on_and_draws_the_classes_it_is_asked_for(tmp_path):
    """The README's first command with its documented flag, in an environment that is set up already; then a longer one.

    At a fifth of the quickstart's length, a judge must recognise half of 200 samples (69 % seen).
    """
    command = [*make_quickstart(tmp_path), "ARGS=--steps 6 --sample.steps 2 --sample.agreement 20 --device cpu"]
    text = run(command, tmp_path / "log").succeeded().text
    assert [line["step"] for line in metrics(tmp_path / "run")] == [6]
    assert "class agreement: " in text
    assert "[INFO]" not in text  # the launcher's log lines
    assert "[WARNING]" not in text
    assert "class agreement" in (tmp_path / "run" / "report.html").read_text()
    assert load(tmp_path / "run" / "config.yaml").data.source == "fashion_mnist"

    command[-1] = "ARGS=--steps 200"
    text = run(command, tmp_path / "log2", patience=3600).succeeded().text
    assert "resumed" in text
    assert metrics(tmp_path / "run")[0]["step"] == 6
    agreement = float(re.search(r"class agreement: ([\d.]+)% of 200 samples", text)[1])
    print(f"class agreement {agreement} %, {metrics(tmp_path / 'run')[-1]['seconds']:.0f} s of training")
    assert agreement >= 50


def make_quickstart(tmp_path: Path) -> list[str]:
    ready = tmp_path / "venv"
    ready.mkdir()
    (ready / "bin").symlink_to(Path(sys.executable).parent)
    (ready / "ready").touch()
    return ["make", "quickstart", f"VENV={ready}", f"RUN={tmp_path / 'run'}"]
