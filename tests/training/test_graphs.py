"""Training with CUDA graphs is training without, to the bit; here graphs are played by train_with_graphs.py."""

import copy
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from launching import TINY, averages, forked, metrics
from sd_dit_reference import randomise
from test_self_discrimination import CLASSES, batch, make
from train_with_graphs import stand_in

from fastdit.errors import UserError
from fastdit.methods.denoising import Denoising
from fastdit.models import DiT
from fastdit.noise import EDM
from fastdit.training import cuda_graphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU")

STEPS = 6
RUN = [*TINY, *shlex.split(f"--steps {STEPS} --grad_clip 0.5 --ema.decay 0.5 --save_every 3")]
SD_DIT = "--sd_dit.decoder_width 16 --sd_dit.decoder_depth 1 --sd_dit.decoder_heads 2 --sd_dit.prototypes 32 "
SD_DIT += "--sd_dit.head_width 32 --sd_dit.bottleneck 16"
SADM = "--sadm.psi_width 32 --sadm.psi_features 16"
PSI_ALIGN = "--psi_align.psi_width 16 --psi_align.psi_features 16"
CASES = {  # flags, and networks that a step calls: those that learn, others
    "dit": ("", 1, 0),
    "bf16": ("--precision bf16", 1, 0),
    "zero2": ("--ds_config zero2", 1, 0),
    "sd_dit": (f"--method sd_dit {SD_DIT}", 2, 1),
    "sd_dit, nothing hidden": (f"--method sd_dit {SD_DIT} --sd_dit.mask_ratio 0 --sd_dit.cls token", 2, 1),
    "sd_dit, split": ("--method sd_dit", 1, 1),
    "sd_dit, split, nothing hidden": ("--method sd_dit --sd_dit.mask_ratio 0", 1, 1),
    "sd_dit+sadm": (f"--method sd_dit+sadm {SD_DIT} {SADM}", 2, 1),
    "dit, recomputing": ("--model.grad_checkpoint blocks", 1, 0),
    "sd_dit, split, recomputing": ("--method sd_dit --model.grad_checkpoint blocks", 1, 1),
    "psi_align, for a share of the run": (f"--method psi_align {PSI_ALIGN} --psi_align.until 0.5", 1, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_graphs_change_nothing(tmp_path, case):
    flags, learning, others = CASES[case]
    plain, graphed = ([*RUN, *shlex.split(flags), "--out", tmp_path / name] for name in ("plain", "graphed"))
    forked(*plain).succeeded()
    told = forked(*graphed, "--cuda_graphs", "true", program="train_with_graphs").succeeded().text
    counts = [int(n) for n in re.search(r"replayed: (\d+) forward, (\d+) backward", told).groups()]
    assert counts == [STEPS * (learning + others), STEPS * learning]
    assert metrics(tmp_path / "plain", untimed=True) == metrics(tmp_path / "graphed", untimed=True)
    mine, theirs = (averages(tmp_path / name, STEPS) for name in ("plain", "graphed"))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def test_a_resumed_run_replays_on_the_weights_it_loaded(tmp_path):
    flags = [*RUN, "--cuda_graphs", "true", "--out", tmp_path / "run"]
    forked(*RUN, "--out", tmp_path / "plain").succeeded()
    forked(*flags, "--steps", 3, program="train_with_graphs").succeeded()
    forked("--resume", "--out", tmp_path / "run", "--steps", STEPS, program="train_with_graphs").succeeded()
    assert metrics(tmp_path / "plain", untimed=True) == metrics(tmp_path / "run", untimed=True)


def test_calls_unlike_the_recorded_run_as_before(monkeypatch):
    """Another batch size, no gradients, gradients for an input; and a missing argument is not one of the graph's."""
    seen = []

    def make(passes, samples, allow_unused_input):
        return lambda *args: seen.append(len(args)) or passes(*args)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    network = DiT(input_size=8, patch=4, channels=1, width=32, depth=1, heads=2, classes=3)
    inputs = {n: (torch.zeros(n, 1, 8, 8), torch.zeros(n), torch.zeros(n, dtype=torch.int64)) for n in (2, 3)}
    cuda_graphs.record(network, inputs[2])
    network(*inputs[3])
    with torch.no_grad():
        network(*inputs[2])
    network(inputs[2][0].requires_grad_(), *inputs[2][1:])
    assert seen == []
    network(inputs[2][0].detach(), *inputs[2][1:])
    assert seen == [3 + len(list(network.parameters()))]


@pytest.mark.parametrize("method", ["dit", "dit, recomputing", "sd_dit"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_losses_and_gradients_are_those_without_graphs(monkeypatch, device, method):
    """Step after step, while the weights change in place. On a GPU the graphs are real."""
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    found = make(cls="token") if method == "sd_dit" else plain(grad_checkpoint=method == "dit, recomputing")
    pair = [found, copy.deepcopy(found)]
    for method, module in pair:
        method.to(torch.device(device), torch.float32)
        module.to(device)
    for part, samples in method.graphed(module, 4):
        cuda_graphs.record(part, samples)
    for step in range(3):
        x0, y = (tensor.to(device) for tensor in batch(seed=step))
        losses = []
        for method, module in pair:
            module.zero_grad()
            losses.append(method.loss(module, x0, y, torch.Generator(device).manual_seed(step)).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(*(module.parameters() for _, module in pair), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
            with torch.no_grad():
                mine.sub_(0.01 * mine.grad)
                theirs.copy_(mine)


def plain(grad_checkpoint: bool) -> tuple[Denoising, DiT]:
    sizes = {"patch": 2, "channels": 2, "width": 32, "depth": 2, "heads": 2, "classes": CLASSES}
    network = DiT(input_size=(6, 10), grad_checkpoint=grad_checkpoint, **sizes)
    randomise(network, seed=1)
    return Denoising(EDM(), CLASSES, 0.1), network


@pytest.mark.parametrize(
    ("device", "changes", "words"),
    [
        ("cpu", {}, ["cuda_graphs", "no GPU", "leave it out"]),
        ("cuda", {"stage": 3}, ["cuda_graphs", "ZeRO-3", "zero1"]),
        ("cuda", {"accumulation": 2}, ["cuda_graphs", "the 2 accumulated", "micro_batch"]),
    ],
)
def test_where_graphs_cannot_serve(device, changes, words):
    plan = SimpleNamespace(**{"stage": 1, "accumulation": 1} | changes)
    with pytest.raises(UserError) as error:
        cuda_graphs.check(plan, torch.device(device))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("choice", "device", "changes", "parameters", "wanted"),
    [
        ("auto", "cuda", {}, 200_000_000, True),
        ("auto", "cuda", {}, 200_000_001, False),
        (True, "cuda", {}, 200_000_001, True),
        (False, "cuda", {}, 1, False),
        ("auto", "cpu", {}, 1, False),
        ("auto", "cuda", {"stage": 3}, 1, False),
        ("auto", "cuda", {"accumulation": 2}, 1, False),
    ],
)
def test_where_graphs_are_wanted(choice, device, changes, parameters, wanted):
    plan = SimpleNamespace(**{"stage": 1, "accumulation": 1} | changes)
    assert cuda_graphs.wanted(choice, plan, torch.device(device), parameters) is wanted


def test_a_failed_capture_ends_a_run_only_if_graphs_were_asked_for(monkeypatch):
    """A capture that runs out of memory may be reported by the error that ends it."""
    network = DiT(input_size=8, patch=4, channels=1, width=32, depth=1, heads=2, classes=3)
    samples = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)

    def fail_with(error, cause):
        def make(*args, **options):
            try:
                raise cause or error
            finally:
                if cause:
                    raise error

        monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)

    memory = torch.OutOfMemoryError("CUDA out of memory.")
    for error, cause, words in (
        (memory, None, "not enough memory"),
        (RuntimeError("capture ended"), memory, "not enough memory"),
        (RuntimeError("an operation cannot be captured\nand more"), None, "an operation cannot be captured)"),
    ):
        fail_with(error, cause)
        assert words in cuda_graphs.record_all([(network, samples)], required=False)
        with pytest.raises(UserError if words == "not enough memory" else RuntimeError):
            cuda_graphs.record_all([(network, samples)], required=True)
    assert network(*samples).shape == (2, 1, 8, 8)  # it runs as before


def test_a_run_without_a_gpu_says_so_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    outcome = forked(*RUN, "--out", tmp_path / "run", "--cuda_graphs", "true")
    assert outcome.code == 2
    assert "cuda_graphs: there is no GPU" in outcome.text
    assert "Traceback" not in outcome.text
