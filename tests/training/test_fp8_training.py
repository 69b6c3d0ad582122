"""Training with --precision fp8: how well, from checkpoints of either precision, and which settings it refuses."""

import shlex

import pytest
import torch
from launching import TINY, averages, forked, metrics
from test_resume import assert_same_run

from fastdit.errors import UserError
from fastdit.models import SplitDiT, Student, Teacher, use_fp8
from fastdit.models.dit import Block
from fastdit.parser import parse
from fastdit.training import session

pytestmark = pytest.mark.launch
FLAGS = [*TINY, "--threads", 2, "--grad_clip", 1, "--ema.decay", 0.9]
# The quickstart's recipe and data in small: its depth is 6, its width 128, its patches have 4 pixels.
SHRUNK = shlex.split(
    "--preset quickstart --device cpu --threads 2 --data.threads 1 --model.depth 2 --model.width 64 --model.heads 2 "
    "--model.patch 7 --batch 32 --steps 60 --warmup 10 --log_every 10 "
    "--sample.agreement 0 --sample.per_class 1 --sample.steps 2"
)


def test_a_small_run_learns_as_well_as_in_bf16(tmp_path):
    """60 steps on the shipped data. Both losses start at the same value, and the last fifty steps' end within 3 %."""
    losses = {}
    for precision in ("bf16", "fp8"):
        outcome = forked(*SHRUNK, "--precision", precision, "--out", tmp_path / precision).succeeded()
        assert ("fp8 products in blocks" in outcome.text) == (precision == "fp8")
        losses[precision] = [line["loss"] for line in metrics(tmp_path / precision)]
    first, last = (tuple(losses[name][place] for name in losses) for place in (0, -1))
    assert last[0] < 0.7 * first[0]
    assert last[1] == pytest.approx(last[0], rel=0.03)
    assert losses["bf16"] != losses["fp8"]


@pytest.mark.parametrize("stage", [1, 3])
def test_resumes_to_the_bit(tmp_path, stage):
    flags = [*FLAGS, "--precision", "fp8", "--ds_config", f"zero{stage}", "--log_every", 3]
    forked(*flags, "--steps", 6, "--out", tmp_path / "straight").succeeded()
    forked(*flags, "--steps", 3, "--out", tmp_path / "run").succeeded()
    forked("--resume", "--out", tmp_path / "run", "--steps", 6).succeeded()  # the run's own config.yaml
    assert_same_run(tmp_path / "run", tmp_path / "straight", 6)


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp8"), ("fp8", "bf16")])
def test_goes_on_in_the_other_precision(tmp_path, first, second):
    """Checkpoints have the same layout. Without a learning rate the weights stay."""
    flags = [*FLAGS, "--out", tmp_path / "run", "--ema.decay", 0]
    forked(*flags, "--precision", first, "--steps", 3).succeeded()
    before = averages(tmp_path / "run", 3)
    outcome = forked(*flags, "--precision", second, "--steps", 4, "--lr", 0, "--resume").succeeded()
    assert ("fp8 products" in outcome.text) == (second == "fp8")
    after = averages(tmp_path / "run", 4)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_with_masked_tokens_and_its_samples(tmp_path):
    """SD-DiT's encoder sees a number of tokens that is no multiple of 16, and its teacher stays in bf16."""
    flags = [*FLAGS, "--method", "sd_dit", "--model.patch", 4, "--batch", 3, "--precision", "fp8"]
    outcome = forked(*flags, "--steps", 2, "--out", tmp_path / "run").succeeded()
    assert "fp8 products" in outcome.text
    out = tmp_path / "grid.png"
    forked(
        "--run", tmp_path / "run", "--n", 4, "--steps", 2, "--out", out, "--device", "cpu", program="fastdit.sample"
    ).succeeded()
    assert out.exists()


def test_teachers_stay_in_bf16():
    sizes = {"input_size": 8, "patch": 2, "channels": 1, "width": 32, "depth": 2, "heads": 2, "classes": 3}
    network = SplitDiT(split=1, out_channels=1, **sizes)
    use_fp8(network)
    student = Student(network, head_width=32, bottleneck=16, prototypes=32)

    def layers(module):
        return [getattr(b, name).fp8 for b in module.modules() if isinstance(b, Block) for name in ("qkv", "proj")]

    assert layers(student) == [True] * 4
    assert layers(Teacher(student)) == [False] * 2
    assert not student.head.fc2.fp8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model.width 72 --model.heads 3", ["model.width: 72 is not a multiple of 16"]),
        ("--model.width 32 --model.heads 2 --model.mlp_ratio 3.2", ["model.mlp_ratio", "102 is not a multiple of 16"]),
        (
            "--method sd_dit --sd_dit.decoder extra --sd_dit.decoder_width 72 --sd_dit.decoder_heads 3",
            ["sd_dit.decoder_width: 72", "--precision bf16"],
        ),
        ("--precision fp4", ["precision"]),
    ],
)
def test_settings_that_do_not_fit(flags, words):
    with pytest.raises(UserError) as caught:
        parse(["--precision", "fp8", *flags.split()])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    if "fp4" not in flags:
        parse(["--precision", "bf16", *flags.split()])


@pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_needs_a_hopper_gpu(monkeypatch, capability, works):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if works:
        session._check_fp8(torch.device("cuda:0"))
        return
    with pytest.raises(UserError) as caught:
        session._check_fp8(torch.device("cuda:0"))
    assert f"capability 9.0 (Hopper) or later, and cuda:0 has {capability[0]}.{capability[1]}" in str(caught.value)
