"""Test SD-DiT under DeepSpeed: every ZeRO stage against AdamW, EMAs, teacher and centers in float64, and resuming.

As in test_zero.py the reference shares network, loss and data with the run, which have tests of their own, and
plays all ranks itself.
"""

import argparse
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fp64_reference import MasterWeights, rank_inputs
from launching import (
    SCRIPTS,
    TINY,
    averages,
    checkpoint,
    forked,
    free_port,
    method_state,
    metrics,
    run,
)
from safetensors.torch import load_file, save_file
from sd_dit_reference import randomise
from test_config import complaint
from test_resume import assert_same_run

from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.evaluation.open_run import open_run
from fastdit.export import _export
from fastdit.methods.self_discrimination import SDDiT
from fastdit.models import DiT, EncoderDecoder, SplitDiT, load_checkpoint
from fastdit.noise import EDM, sample
from fastdit.parser import load, parse
from fastdit.rundir.checkpoint_files import seal

launch = pytest.mark.launch

STEPS = 12
SMALL = shlex.split(
    f"{shlex.join(TINY)} --method sd_dit --sd_dit.decoder_width 24 --sd_dit.decoder_depth 1 --sd_dit.decoder_heads 2 "
    "--sd_dit.head_width 40 --sd_dit.bottleneck 20 --sd_dit.prototypes 37 --sd_dit.hidden_tokens mask_token "
    "--model.patch 4"  # every weight divides among two ranks: ZeRO-3 never sets the padding that others need
)
# Every schedule at work; momenta low, so that teacher and centres travel far; a checkpoint amid a log interval.
RECIPE = shlex.split(
    f"{shlex.join(SMALL)} --steps {STEPS} --warmup 3 --schedule cosine --weight_decay 0.1 --eps 1e-4 --grad_clip 0.5 "
    "--ema.decay 0.8 --log_every 4 --save_every 6 --sd_dit.momentum 0.8 --sd_dit.center_momentum 0.7 "
    "--sd_dit.beta 0.5 --sd_dit.mask_ratio 0.25 --sd_dit.teacher_temperature_warmup 0.5"
)
# The split decoder: a comparison every second step, and none in the last quarter, where nothing is hidden.
SPLIT = [
    *(word for pair in zip(RECIPE[::2], RECIPE[1::2]) if "decoder_" not in pair[0] for word in pair),
    *shlex.split("--sd_dit.hidden_tokens noised_patch --sd_dit.every 2 --sd_dit.until 0.75"),
]
RECIPES = {"extra": RECIPE, "split": SPLIT}
SMALL_BUCKET = {"reduce_bucket_size": 2000}  # below the largest weight's size
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **SMALL_BUCKET}}
ACCUMULATING = {
    "zero_optimization": {"stage": 2, **SMALL_BUCKET},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
}
BY_DEEPSPEED = ("zero1", "zero3")  # the others' ranks are forked: starting them is most of the work
FILES = {"partitioned": PARTITIONED, "accumulating": ACCUMULATING}


def place_of(name: str, decoder: str) -> str:
    """Return the teacher's name for a student's parameter."""
    return name.removeprefix("network.") if decoder == "extra" else name.replace("network.", "encoder.", 1)


def leading(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the leading rows of a weight in the teacher's shape."""
    return whole.flatten()[: like.numel()].view_as(like)


@cache
def reference(decoder: str, accumulation: int = 1):
    """Return the metrics of every step on two ranks, the final EMA and teacher weights (float64) and centers."""
    config = parse(RECIPES[decoder])
    source = run_parts.open_data(config)
    shape = run_parts.shape_of(config, source.classes)
    student, method = run_parts.build_training(config, shape)
    parts, teacher = 2 * accumulation, dict(method.teacher.named_parameters())
    master, lines = MasterWeights(student, warmup=3, steps=STEPS, averages=("ema", "teacher")), []
    with rank_inputs(config, source, 2, accumulation) as ranks:
        for t in range(STEPS):
            method.begin_step(t, STEPS)
            line, grads = {}, master.no_gradient()
            for inputs in [inputs for inputs in ranks for _ in range(accumulation)]:
                outcome = method.loss(student, *next(inputs))
                for grad, piece in zip(grads, torch.autograd.grad(outcome.loss, master.params)):
                    grad += piece.double() / parts
                for key, value in outcome.terms.items():
                    line[key] = line.get(key, 0.0) + value.item() / parts
            momentum = 1 - 0.2 * (1 + math.cos(math.pi * t / STEPS)) / 2
            if decoder == "split":
                momentum = momentum**2 if t % 2 == 0 and t < 9 else 1.0
            line["grad_norm"] = master.step(grads, teacher=momentum)
            with torch.no_grad():
                for name, s in master.averages["teacher"].items():
                    if (place := place_of(name, decoder)) in teacher:
                        teacher[place].copy_(leading(s, teacher[place]))
            lines.append(line | {key: value.item() for key, value in method.end_step().items()})
    slow = {place_of(name, decoder): value for name, value in master.averages["teacher"].items()}
    sampled = {name: value for name, value in master.averages["ema"].items() if name.startswith("network.")}
    return lines, {name.removeprefix("network."): value for name, value in sampled.items()}, slow, method.centers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Give `trained(ds_config, *flags)`, the folder of a recipe on 2 ranks by tests/programs/train_and_keep.py."""
    folders = {}

    def trained(ds_config: str, *flags, decoder: str = "extra") -> Path:
        if (ds_config, flags, decoder) not in folders:
            base = tmp_path_factory.mktemp(ds_config)
            if ds_config in FILES:
                (base / "ds.json").write_text(json.dumps(FILES[ds_config]))
            settings = base / "ds.json" if ds_config in FILES else ds_config
            argv = [*RECIPES[decoder], "--ds_config", settings, "--out", base / "run", *flags]
            if ds_config in BY_DEEPSPEED and not flags and decoder == "extra":
                program = str(Path(__file__).parents[1] / "programs/train_and_keep.py")
                command = [SCRIPTS / "deepspeed", "--num_gpus", "2", "--master_port", free_port(), program, *argv]
                run(list(map(str, command)), base / "log").succeeded()
            else:
                forked(*argv, ranks=2, program="train_and_keep").succeeded()
            folders[ds_config, flags, decoder] = base / "run"
        return folders[ds_config, flags, decoder]

    return trained


def final_state(folder: Path) -> dict:
    """Return the final state of the ranks, and check that it is the same on both to the bit."""
    one, two = (torch.load(folder / f"held-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one["centers"], two["centers"])
    for kind in ("teacher", "averages"):
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(one[kind][name], two[kind][name]) for name in one[kind])
    return one


@launch
@pytest.mark.parametrize(
    ("decoder", "ds_config"),
    [
        *(("extra", name) for name in ("zero0", "zero1", "zero2", "zero3", "zero3_offload", *FILES)),
        *(("split", name) for name in ("zero0", "zero1", *FILES)),
    ],
)
def test_two_ranks_train_as_the_reference(trained, decoder, ds_config):
    folder = trained(ds_config, decoder=decoder)
    lines, final, slow, centers = reference(decoder, 2 if ds_config == "accumulating" else 1)
    assert sum(line["grad_norm"] > 0.5 for line in lines) > 3, "clipping must have acted"
    logged = metrics(folder)
    assert [line["step"] for line in logged] == [4, 8, 12]
    for line in logged:
        for key in lines[0].keys() - {"grad_norm"}:
            expected = np.mean([one[key] for one in lines[line["step"] - 4 : line["step"]] if key in one])
            assert line[key] == pytest.approx(expected, rel=1e-4), key
        if ds_config != "zero0":  # without ZeRO, DeepSpeed does not tell it
            assert line["grad_norm"] == pytest.approx(lines[line["step"] - 1]["grad_norm"], rel=5e-4)
        assert line["skipped"] == 0
    found, state = averages(folder, STEPS), final_state(folder)
    assert final.keys() <= found.keys()
    assert not any(name.startswith("head.fc") for name in found), "the projection head is not sampled"
    for name, expected in final.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=4e-6, msg=name)
    for name, weight in state["teacher"].items():
        assert torch.equal(weight, leading(state["averages"][name], weight)), name
        torch.testing.assert_close(weight.double(), leading(slow[name], weight), rtol=0, atol=4e-6, msg=name)
    torch.testing.assert_close(state["centers"], centers, rtol=0, atol=2e-5)
    assert centers.norm(dim=1).min() > 0.1
    assert (state["persistent"] == []) == (ds_config == "partitioned")


@launch
@pytest.mark.parametrize(("stage", "micro_batch"), [(1, 4), (1, 2), (3, 4)])
def test_in_bf16_the_teacher_follows_fp32_averages(trained, stage, micro_batch):
    """At momentum 0.996 a step is far below bf16's resolution. ZeRO-1 has another optimizer where it accumulates."""
    slow = ("--eps", "1e-8", "--lr", "1e-4", "--sd_dit.momentum", "0.996", "--micro_batch", str(micro_batch))
    folder = trained(f"zero{stage}", "--precision", "bf16", *slow)
    state = final_state(folder)
    start, _ = run_parts.build_training(parse(RECIPE), run_parts.Shape(1, 28, 28, 10))
    start = {name.removeprefix("network."): p.detach().bfloat16() for name, p in start.named_parameters()}
    for name, weight in state["teacher"].items():
        average = state["averages"][name]
        assert weight.dtype == torch.bfloat16
        assert average.dtype == torch.float32
        assert torch.equal(weight, average.bfloat16()), name
    name = "head.fc2.weight"
    assert (state["averages"][name] != start[name].float()).float().mean() > 0.9
    assert (state["teacher"][name] == start[name]).float().mean() > 0.5, "the average moves below bf16's resolution"
    assert all(line["loss"] > 0 for line in metrics(folder))


@launch
def test_two_ranks_killed_after_a_checkpoint(trained, tmp_path, monkeypatch):
    """This is ZeRO-1. tests/methods/test_sadm_training.py tests ZeRO-3, with both methods."""
    ds_config, folder = "zero1", tmp_path / "run"
    flags = [*RECIPE, "--ds_config", ds_config, "--out", folder]
    monkeypatch.setenv("CUT_AT", "step 7")
    assert forked(*flags, ranks=2, program="cut_short").code == -signal.SIGKILL
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    outcome = forked(*flags, "--resume", ranks=2).succeeded()
    assert "steps 6 to 12" in outcome.text
    assert_same_run(folder, trained(ds_config), STEPS)


def without_its_end(folder: Path, copy: Path) -> Path:
    """Return a copy of a run's folder as a crash after step 6 leaves it."""
    shutil.copytree(folder, copy)
    shutil.rmtree(checkpoint(copy, STEPS))
    return copy


@launch
def test_a_split_run_goes_on_to_the_bit(trained, tmp_path):
    """The checkpoint of step 6 lies between two comparisons, and the run's last quarter is a plain DiT's."""
    folder = trained("partitioned", decoder="split")
    copy = without_its_end(folder, tmp_path / "run")
    outcome = forked("--resume", "--out", copy, ranks=2, program="train_and_keep").succeeded()
    assert "steps 6 to 12" in outcome.text
    assert_same_run(copy, folder, STEPS)
    ends = [final_state(run) for run in (copy, folder)]
    assert all(torch.equal(ends[0]["teacher"][name], value) for name, value in ends[1]["teacher"].items())


@launch
def test_a_run_with_a_frozen_teacher_goes_on_to_the_bit(tmp_path):
    """No EMA of the teacher is kept: the checkpoint holds the teacher itself."""
    forked(*SPLIT, "--sd_dit.momentum", 1, "--out", tmp_path / "run").succeeded()
    copy = without_its_end(tmp_path / "run", tmp_path / "copy")
    forked("--resume", "--out", copy).succeeded()
    assert_same_run(copy, tmp_path / "run", STEPS)
    start, _ = run_parts.build_training(parse(SPLIT), run_parts.Shape(1, 28, 28, 10))
    state = method_state(copy, STEPS)["teacher"]
    assert torch.equal(state["encoder.blocks.0.fc1.weight"], start.network.blocks[0].fc1.weight)
    moving = forked("--resume", "--out", copy, "--steps", 13, "--sd_dit.momentum", 0.9)
    assert moving.code == 2
    assert "was written with sd_dit.teacher frozen, this run has moving" in moving.text.splitlines()[-1]


@launch
def test_a_run_of_before_the_split_decoder_goes_on_as_extra(trained, tmp_path):
    """Its config.yaml names no decoder but has the sizes of one, and so has its manifest."""
    copy = without_its_end(trained("zero1", "--sd_dit.beta", "0.4"), tmp_path / "run")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    for recent in ("decoder", "split", "every", "share", "until", "momentum_share"):
        del config["sd_dit"][recent]
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    path = checkpoint(copy, 6)
    written = json.loads((path / "manifest.json").read_text())
    assert written.pop("sd_dit.decoder") == "extra"
    assert written.pop("sd_dit.teacher") == "moving"
    seal(path, {key: value for key, value in written.items() if key not in ("sha256", "seal")})
    _export(["--run", str(copy), "--out", str(tmp_path / "x.safetensors")])
    opened = open_run(argparse.Namespace(run=str(copy), checkpoint=None), load(copy / "config.yaml"))
    assert isinstance(opened.network, EncoderDecoder)
    outcome = forked("--resume", "--out", copy, ranks=2, program="train_and_keep").succeeded()
    assert "steps 6 to 12" in outcome.text
    assert_same_run(copy, trained("zero1", "--sd_dit.beta", "0.4"), STEPS)


@launch
@pytest.mark.parametrize("decoder", RECIPES)
def test_samples_and_exports(trained, tmp_path, decoder):
    folder = trained("zero3" if decoder == "extra" else "partitioned", decoder=decoder)
    command = [sys.executable, "fastdit/sample.py", "--run", folder, "--device", "cpu", "--n", "3"]
    root = Path(__file__).parents[2]
    subprocess.run([*command, "--out", tmp_path / "x.npz"], cwd=root, check=True, capture_output=True)
    images = np.load(tmp_path / "x.npz")["images"]
    assert images.shape == (3, 28, 28, 1)
    assert images.std() > 1

    _export(["--run", str(folder), "--out", str(tmp_path / "x.safetensors")])
    assert load_file(tmp_path / "x.safetensors").keys() == averages(folder, STEPS).keys()
    network = run_parts.build_network(parse(RECIPES[decoder]), run_parts.Shape(1, 28, 28, 10))
    assert isinstance(network, EncoderDecoder if decoder == "extra" else SplitDiT)
    load_checkpoint(network, tmp_path / "x.safetensors")
    for name, value in averages(folder, STEPS).items():
        assert torch.equal(network.state_dict()[name], value), name


@launch
def test_only_the_split_decoder_has_the_official_layout(trained, tmp_path):
    """A plain DiT reads the file and draws the same, and it starts another run by `--init_from`."""
    with pytest.raises(UserError, match=r"x\.pt: .*decoder.*\.safetensors") as refused:
        _export(["--run", str(trained("partitioned")), "--out", str(tmp_path / "x.pt")])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "x.pt").exists()

    folder, shape = trained("partitioned", decoder="split"), run_parts.Shape(1, 28, 28, 10)
    _export(["--run", str(folder), "--out", str(tmp_path / "x.pt")])
    plain = run_parts.build_network(parse([*SPLIT, "--method", "dit"]), shape)
    assert type(plain) is DiT
    load_checkpoint(plain, tmp_path / "x.pt")
    opened = open_run(argparse.Namespace(run=str(folder), checkpoint=None), load(folder / "config.yaml"))
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = [sample(EDM(), net.eval(), noise, torch.arange(4), steps=3) for net in (plain, opened.network)]
    assert torch.equal(*drawn)
    assert drawn[0].std() > 0.1
    student, method = run_parts.build_training(parse([*SPLIT, "--init_from", str(tmp_path / "x.pt")]), shape)
    for network in (student.network, method.teacher.encoder):
        assert torch.equal(network.blocks[0].qkv.weight, plain.blocks[0].qkv.weight)


@launch
@pytest.mark.parametrize("decoder", RECIPES)
@pytest.mark.parametrize("psi", ["latent_resnet", "teacher"])
def test_together_with_sadm(tmp_path, decoder, psi):
    """Both gradient ratios are logged, and SADM works in steps without comparison, too."""
    sadm = ["--sadm.psi", psi, "--sadm.structure", "fixed" if psi == "teacher" else "adversarial"]
    sadm += ["--sadm.start", 0, "--sadm.psi_warm_steps", 0, "--sadm.psi_width", 16, "--sadm.psi_features", 12]
    flags = [*RECIPES[decoder], "--method", "sd_dit+sadm", *sadm, "--ds_config", "zero3", "--out", tmp_path / "run"]
    forked(*flags, ranks=2).succeeded()
    lines = metrics(tmp_path / "run")
    for line in lines:
        for key in ("structure_loss", "gradient_ratio", "discriminative_gradient_ratio", "discriminative_loss"):
            assert isinstance(line[key], float), key
            assert line[key] > 0, key
    assert lines[-1]["discriminative_gradient_ratio"] < 50


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    forked(*SMALL, "--steps", 2, "--out", folder).succeeded()
    return folder


@launch
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("method", "dit"),
        ("sd_dit.decoder_width", 32),
        ("sd_dit.cls", "token"),
        ("sd_dit.prototypes", 38),
    ],
)
def test_another_method_or_size_is_not_resumed(finished, flag, value):
    before = sorted(finished.rglob("*"))
    outcome = forked("--resume", "--out", finished, "--steps", 3, f"--{flag}", value)
    assert outcome.code == 2
    assert f"was written with {flag} " in outcome.text.splitlines()[-1]
    assert f"this run has {value}" in outcome.text.splitlines()[-1]
    assert "Traceback" not in outcome.text
    assert sorted(finished.rglob("*")) == before


def test_a_dit_is_the_start_of_encoder_and_teacher(tmp_path):
    shape, path = run_parts.Shape(1, 28, 28, 10), tmp_path / "dit.safetensors"
    dit = run_parts.build_network(parse([*SMALL, "--method", "dit"]), shape)
    randomise(dit, seed=1)
    save_file(dit.state_dict(), path)
    student, method = run_parts.build_training(parse([*SMALL, "--init_from", str(path)]), shape)
    for encoder in (student.network.encoder, method.teacher.encoder):
        for name, value in encoder.state_dict().items():
            assert name == "class_token.weight" or torch.equal(value, dit.state_dict()[name]), name


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("XL", 675)])
def test_the_published_sizes_can_be_laid_out(size, millions):
    config = parse(["--preset", "imagenet256_sd_dit", "--model.size", size])
    assert config.sd_dit == SDDiT(decoder="extra"), "the defaults are the published settings, where known"
    with torch.device("meta"):
        student, method = run_parts.build_training(config, run_parts.Shape(4, 32, 32, 1000))
    count = sum(p.numel() for p in student.network.encoder.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    more = sum(p.numel() for p in student.parameters()) - count
    assert more / 1e6 == pytest.approx({"S": 3.8, "B": 13, "XL": 64}[size], rel=0.1), "decoder and head"
    assert method.keep == 205


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("mask_ratio=1", ["0.95", "got 1"]),
        ("mask_ratio=-0.1", ["from 0", "got -0.1"]),
        ("hidden_tokens=mask", ["noised_patch", "mask_token", "zeros"]),
        ("cls=both", ["token", "mean"]),
        ("centering=mean", ["ema", "sinkhorn", "none"]),
        ("beta=-1", ["at least 0"]),
        ("student_temperature=0", ["at least 0.025"]),
        ("teacher_temperature=0.02", ["at least 0.025"]),
        ("teacher_temperature_start=0", ["at least 0.025"]),
        ("teacher_temperature_warmup=2", ["from 0 to 1"]),
        ("center_momentum=1.1", ["from 0 to 1"]),
        ("momentum=-1", ["from 0 to 1"]),
        ("momentum_end=2", ["from 0 to 1"]),
        ("decoder_width=26", ["multiple of sd_dit.decoder_heads (1)", "of 4"]),
        ("decoder_heads=5", ["sd_dit.decoder_width", "192", "(5)"]),
        ("decoder_depth=0", ["at least 1"]),
        ("head_width=0", ["at least 1"]),
        ("bottleneck=0", ["at least 1"]),
        ("prototypes=0", ["at least 1"]),
        ("prototype=5", ["no such setting", "--sd_dit.prototypes?"]),
    ],
)
def test_each_bad_setting_is_one_line(setting, words):
    text = complaint("--method", "sd_dit", f"--sd_dit.{setting}")
    field = setting.partition("=")[0]
    words = [*words, "sd_dit." if field == "decoder_heads" else f"sd_dit.{field}"]
    assert [word for word in words if word not in text] == [], text
