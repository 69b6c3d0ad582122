"""SD-DiT under DeepSpeed: every ZeRO stage against AdamW, averages, teacher and centres in float64, and resuming.

As in tests/test_zero.py the reference shares network, loss and data with the run, which have tests of their own, and
plays all ranks itself.
"""

import json
import math
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fp64_reference import MasterWeights, rank_inputs
from launching import SCRIPTS, TINY, Launched, averages, checkpoint, deepspeed, forked, free_port, metrics, run
from safetensors.torch import load_file, save_file
from sd_dit_reference import randomise
from test_config import complaint
from test_resume import assert_same_run

from fastdit.config import parse
from fastdit.engine import build
from fastdit.errors import UserError
from fastdit.export import _export
from fastdit.methods.self_discrimination import SDDiT
from fastdit.models import EncoderDecoder, load_checkpoint

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
SMALL_BUCKET = {"reduce_bucket_size": 2000}  # below the largest weight's size
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **SMALL_BUCKET}}
ACCUMULATING = {
    "zero_optimization": {"stage": 2, **SMALL_BUCKET},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
}
BY_DEEPSPEED = ("zero1", "zero3")  # the others' ranks are forked: starting them is most of the work
FILES = {"partitioned": PARTITIONED, "accumulating": ACCUMULATING}


@cache
def reference(accumulation: int = 1):
    """Metrics of every step of RECIPE on two ranks, its final EMA, teacher (float64) and centres."""
    config = parse(RECIPE)
    source = build.open_data(config)
    shape = build.shape_of(config, source.classes)
    student, method = build.build_training(config, shape)
    parts, teacher = 2 * accumulation, dict(method.teacher.named_parameters())
    master, lines = MasterWeights(student, warmup=3, steps=STEPS, averages=("ema", "teacher")), []
    with rank_inputs(config, source, 2, accumulation) as (loaders, noises):
        for t in range(STEPS):
            method.begin_step(t, STEPS)
            line, grads = {}, master.no_gradient()
            for loader, noise in [pair for pair in zip(loaders, noises) for _ in range(accumulation)]:
                outcome = method.loss(student, *next(loader), noise)
                for grad, piece in zip(grads, torch.autograd.grad(outcome.loss, master.params)):
                    grad += piece.double() / parts
                for key, value in outcome.terms.items():
                    line[key] = line.get(key, 0.0) + value.item() / parts
            momentum = 1 - 0.2 * (1 + math.cos(math.pi * t / STEPS)) / 2
            line["grad_norm"] = master.step(grads, teacher=momentum)
            with torch.no_grad():
                for name, s in master.averages["teacher"].items():
                    if (place := name.removeprefix("network.")) in teacher:
                        teacher[place].copy_(s)
            lines.append(line | {key: value.item() for key, value in method.end_step().items()})
    slow = master.averages["teacher"]
    final = {name.removeprefix("network."): (e, slow[name]) for name, e in master.averages["ema"].items()}
    return lines, final, method.centers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(ds_config, *flags)`: the folder of RECIPE on 2 ranks by tests/train_and_keep.py."""
    folders = {}

    def trained(ds_config: str, *flags) -> Path:
        if (ds_config, flags) not in folders:
            base = tmp_path_factory.mktemp(ds_config)
            if ds_config in FILES:
                (base / "ds.json").write_text(json.dumps(FILES[ds_config]))
            settings = base / "ds.json" if ds_config in FILES else ds_config
            argv = [*RECIPE, "--ds_config", settings, "--out", base / "run", *flags]
            if ds_config in BY_DEEPSPEED and not flags:
                program = str(Path(__file__).parent / "train_and_keep.py")
                command = [SCRIPTS / "deepspeed", "--num_gpus", "2", "--master_port", free_port(), program, *argv]
                run(list(map(str, command)), base / "log").succeeded()
            else:
                forked(*argv, ranks=2, program="train_and_keep").succeeded()
            folders[ds_config, flags] = base / "run"
        return folders[ds_config, flags]

    return trained


def held(folder: Path) -> dict:
    """What both ranks hold at the end, which is the same to the bit."""
    one, two = (torch.load(folder / f"held-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one["centers"], two["centers"])
    for kind in ("teacher", "averages"):
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(one[kind][name], two[kind][name]) for name in one[kind])
    return one


@launch
@pytest.mark.parametrize(
    "ds_config", ["zero0", "zero1", "zero2", "zero3", "zero3_offload", "partitioned", "accumulating"]
)
def test_two_ranks_train_as_the_reference(trained, ds_config):
    folder = trained(ds_config)
    lines, final, centers = reference(2 if ds_config == "accumulating" else 1)
    assert sum(line["grad_norm"] > 0.5 for line in lines) > 3, "clipping must have acted"
    told = metrics(folder)
    assert [line["step"] for line in told] == [4, 8, 12]
    for line in told:
        for key in lines[0].keys() - {"grad_norm"}:
            expected = np.mean([one[key] for one in lines[line["step"] - 4 : line["step"]]])
            assert line[key] == pytest.approx(expected, rel=1e-4), key
        if ds_config != "zero0":  # DeepSpeed does not tell it without ZeRO
            assert line["grad_norm"] == pytest.approx(lines[line["step"] - 1]["grad_norm"], rel=5e-4)
        assert line["skipped"] == 0
    found, kept = averages(folder, STEPS), held(folder)
    sampled = {name for name in final if not name.startswith("head.")}
    assert sampled <= found.keys()
    assert not any(name.startswith("head.") for name in found), "the projection head is not sampled"
    for name in sampled:
        torch.testing.assert_close(found[name].double(), final[name][0], rtol=0, atol=4e-6, msg=name)
    for name, weight in kept["teacher"].items():
        assert torch.equal(weight, kept["averages"][name]), name
        torch.testing.assert_close(weight.double(), final[name][1], rtol=0, atol=4e-6, msg=name)
    torch.testing.assert_close(kept["centers"], centers, rtol=0, atol=2e-5)
    assert centers.norm(dim=1).min() > 0.1
    assert (kept["persistent"] == []) == (ds_config == "partitioned")


@launch
@pytest.mark.parametrize(("stage", "micro_batch"), [(1, 4), (1, 2), (3, 4)])
def test_in_bf16_the_teacher_follows_fp32_averages(trained, stage, micro_batch):
    """At momentum 0.996 a step is far below bf16's resolution. ZeRO-1 has another optimizer where it accumulates."""
    slow = ("--eps", "1e-8", "--lr", "1e-4", "--sd_dit.momentum", "0.996", "--micro_batch", str(micro_batch))
    folder = trained(f"zero{stage}", "--precision", "bf16", *slow)
    kept = held(folder)
    start, _ = build.build_training(parse(RECIPE), build.Shape(1, 28, 28, 10))
    start = {name.removeprefix("network."): p.detach().bfloat16() for name, p in start.named_parameters()}
    for name, weight in kept["teacher"].items():
        average = kept["averages"][name]
        assert weight.dtype == torch.bfloat16
        assert average.dtype == torch.float32
        assert torch.equal(weight, average.bfloat16()), name
    name = "head.fc2.weight"
    assert (kept["averages"][name] != start[name].float()).float().mean() > 0.9
    assert (kept["teacher"][name] == start[name]).float().mean() > 0.5, "the average moves below bf16's resolution"
    assert all(line["loss"] > 0 for line in metrics(folder))


@launch
def test_two_ranks_killed_after_a_checkpoint(trained, tmp_path):
    """By ZeRO-1; tests/test_sadm_training.py has ZeRO-3, with both methods."""
    ds_config, folder = "zero1", tmp_path / "run"
    flags = [*RECIPE, "--ds_config", ds_config, "--out", folder]
    # Drawing pictures at step 7 takes so long that the kill falls between two checkpoints.
    with Launched(deepspeed(*flags, "--sample_every", 7, "--sample.steps", 2000), tmp_path / "log") as launched:
        launched.until(checkpoint(folder, 6).exists, "step 6")
        launched.kill()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    outcome = run(deepspeed(*flags, "--resume"), tmp_path / "log").succeeded()
    assert "steps 6 to 12" in outcome.text
    assert_same_run(folder, trained(ds_config), STEPS)


@launch
def test_samples_and_exports(trained, tmp_path):
    folder = trained("zero3")
    command = [sys.executable, "fastdit/sample.py", "--run", folder, "--device", "cpu", "--n", "3"]
    root = Path(__file__).parents[1]
    subprocess.run([*command, "--out", tmp_path / "x.npz"], cwd=root, check=True, capture_output=True)
    images = np.load(tmp_path / "x.npz")["images"]
    assert images.shape == (3, 28, 28, 1)
    assert images.std() > 1

    _export(["--run", str(folder), "--out", str(tmp_path / "x.safetensors")])
    assert load_file(tmp_path / "x.safetensors").keys() == averages(folder, STEPS).keys()
    config = parse(RECIPE)
    network = build.build_network(config, build.Shape(1, 28, 28, 10))
    assert isinstance(network, EncoderDecoder)
    load_checkpoint(network, tmp_path / "x.safetensors")
    for name, value in averages(folder, STEPS).items():
        assert torch.equal(network.state_dict()[name], value), name
    with pytest.raises(UserError, match=r"x\.pt: .*decoder.*\.safetensors") as refused:
        _export(["--run", str(folder), "--out", str(tmp_path / "x.pt")])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "x.pt").exists()


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
    shape, path = build.Shape(1, 28, 28, 10), tmp_path / "dit.safetensors"
    dit = build.build_network(parse([*SMALL, "--method", "dit"]), shape)
    randomise(dit, seed=1)
    save_file(dit.state_dict(), path)
    student, method = build.build_training(parse([*SMALL, "--init_from", str(path)]), shape)
    for encoder in (student.network.encoder, method.teacher.encoder):
        for name, value in encoder.state_dict().items():
            assert name == "class_token.weight" or torch.equal(value, dit.state_dict()[name]), name


@pytest.mark.parametrize(("size", "millions"), [("s", 33), ("b", 130), ("xl", 675)])
def test_the_published_sizes_can_be_laid_out(size, millions):
    config = parse(["--preset", f"imagenet256_sd_dit_{size}2"])
    assert config.sd_dit == SDDiT(), "the defaults are the published settings, where known"
    with torch.device("meta"):
        student, method = build.build_training(config, build.Shape(4, 32, 32, 1000))
    count = sum(p.numel() for p in student.network.encoder.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    assert sum(p.numel() for p in student.parameters()) > count + 30e6, "decoder and head"
    assert method.keep == 205


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("mask_ratio=1", ["0.95", "got 1"]),
        ("mask_ratio=-0.1", ["from 0", "got -0.1"]),
        ("teacher_noise=0", ["0.0001", "got 0"]),
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
        ("decoder_width=26", ["multiple of sd_dit.decoder_heads (16)", "of 4"]),
        ("decoder_heads=5", ["sd_dit.decoder_width", "512", "(5)"]),
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
