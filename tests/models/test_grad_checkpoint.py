"""Test gradient checkpointing: it recomputes the blocks, saves memory, and changes no bit of the results."""

import shlex
from collections import Counter

import pytest
import torch
from kernel_checks import DEVICE, normal
from launching import TINY, averages, forked, metrics
from sd_dit_reference import randomise

from fastdit import run_parts
from fastdit.methods.denoising import Shape
from fastdit.models import AlignedDiT, DiT, Encoder, EncoderDecoder, SplitDiT, Student, Teacher, add_block_scales
from fastdit.models.dit import Block
from fastdit.parser import parse

SIZES = {"input_size": 6, "patch": 2, "channels": 3, "width": 72, "depth": 2, "heads": 3, "classes": 5}
IDS = tuple(torch.tensor(ids, device=DEVICE).expand(3, -1) for ids in ([0, 2, 3, 5, 7, 8], [1, 4, 6]))


def dit(**options):
    return DiT(**SIZES, **options), lambda network, *inputs: [network(*inputs)]


def scaled_dit(**options):
    network, call = dit(**options)
    add_block_scales(network)
    return network, call


def masked(network):
    def call(network, *inputs):
        out, stream = network.generate(*inputs, IDS)
        return [out, stream.normalize()]

    return network, call


def split_dit(**options):
    return masked(SplitDiT(split=1, **SIZES, **options))


def encoder_decoder(**options):
    encoder = Encoder(**SIZES, class_token=True, **options)
    return masked(EncoderDecoder(encoder, out_channels=3, width=36, depth=2, heads=3))


def aligned(**options):
    targets = normal(3, 9, 8, seed=3)
    network = AlignedDiT(DiT(**SIZES, **options), block=2, hidden=16, features=8)
    network.gradients.to(DEVICE)
    return network, lambda network, *inputs: network(*inputs, targets)


def step(make, grad_checkpoint):
    """Return the outputs and gradients of one batch, the bytes saved for the backward pass, and calls of each block."""
    network, call = make(grad_checkpoint=grad_checkpoint)
    randomise(network, seed=1)
    network.to(DEVICE)
    calls = Counter()
    for name, module in network.named_modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, args, name=name: calls.update([name]))
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x = normal(3, 3, 6, 6, seed=100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(network, x, torch.tensor([0.0, 999.0, 417.5], device=DEVICE), torch.tensor([0, 5, 3], device=DEVICE))
    size = sum(saved.values())
    sum((o * normal(*o.shape, seed=9)).sum() for o in out).backward()
    return out, [x.grad, *(weight.grad for weight in network.parameters())], size, calls


@pytest.mark.parametrize(
    ("make", "kernels"),
    [
        *((make, "reference") for make in (dit, scaled_dit, split_dit, encoder_decoder, aligned)),
        *((make, "triton") for make in (scaled_dit, encoder_decoder)),  # every kernel that a block calls
    ],
)
def test_results_are_the_same_to_the_bit(monkeypatch, make, kernels):
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    out, gradients, size, calls = step(make, False)
    again, gradients_again, size_again, calls_again = step(make, True)
    for a, b in zip([*out, *gradients], [*again, *gradients_again], strict=True):
        assert torch.equal(a, b)
    assert all(gradient.any() for gradient in gradients)
    assert size_again < 0.7 * size
    assert set(calls.values()) == {1}
    assert calls_again == Counter(dict.fromkeys(calls, 2))  # the decoder's blocks too


def test_a_teacher_never_checkpoints():
    """Gradients reach the input of a teacher, as for SADM, and no block runs twice."""
    network, _ = encoder_decoder(grad_checkpoint=True)
    student = Student(network, head_width=16, bottleneck=8, prototypes=12)
    randomise(student, seed=1)
    teacher = Teacher(student)
    calls = []
    for block in teacher.encoder.blocks:
        block.register_forward_pre_hook(lambda *args: calls.append(1))
    x = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    teacher.pooled_features(x, torch.zeros(3), torch.tensor([0, 5, 3])).sum().backward()
    assert x.grad.any()
    assert len(calls) == SIZES["depth"]


@pytest.mark.parametrize("flags", ["", "--method sd_dit", "--method sd_dit --sd_dit.decoder extra"])
def test_the_setting_reaches_every_block(flags):
    """It reaches the network that trains, also when it is built for sampling, where nothing is recomputed."""
    for choice in ("none", "blocks"):
        sizes = "--model.width 32 --model.heads 2 --model.depth 2"
        config = parse(shlex.split(f"{sizes} --model.grad_checkpoint {choice} {flags}"))
        network = run_parts.build_network(config, Shape(1, 8, 8, 3))
        parts = [module.grad_checkpoint for module in network.modules() if hasattr(module, "grad_checkpoint")]
        assert set(parts) == {choice == "blocks"}
        assert len(parts) == (2 if "extra" in flags else 1)


CASES = {
    "bf16": "--precision bf16 --ds_config zero2",
    "accumulated": "--micro_batch 4",
    "sd_dit, split": "--method sd_dit",
    "sd_dit, extra": "--method sd_dit --sd_dit.decoder extra --sd_dit.cls token",
    "psi_align": "--method psi_align --psi_align.psi_width 16 --psi_align.psi_features 16 --psi_align.psi_warm_steps 1",
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_to_the_bit(tmp_path, case):
    flags = [*TINY, "--steps", 4, "--save_every", 2, "--ema.decay", 0.5, *shlex.split(CASES[case])]
    forked(*flags, "--out", tmp_path / "none").succeeded()
    forked(*flags, "--out", tmp_path / "blocks", "--model.grad_checkpoint", "blocks").succeeded()
    assert metrics(tmp_path / "none", untimed=True) == metrics(tmp_path / "blocks", untimed=True)
    plain, checkpointed = (averages(tmp_path / name, 4) for name in ("none", "blocks"))
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_zero_3_gathers_the_weights_for_the_recomputation(tmp_path):
    """Every weight is sharded over two ranks, and none is kept between forward and backward pass."""
    path = tmp_path / "sharded.json"
    path.write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, '
        '"stage3_gather_16bit_weights_on_model_save": true}}'
    )
    flags = [*TINY, "--steps", 3, "--ema.decay", 0.5, "--ds_config", path]
    for choice in ("none", "blocks"):
        out = ("--out", tmp_path / choice, "--model.grad_checkpoint", choice)
        forked(*flags, *out, ranks=2).succeeded()
    assert metrics(tmp_path / "none", untimed=True) == metrics(tmp_path / "blocks", untimed=True)


def test_resuming_may_turn_it_on(tmp_path):
    """No checkpoint depends on it."""
    flags = [*TINY, "--steps", 4, "--save_every", 2, "--ema.decay", 0.5]
    forked(*flags, "--out", tmp_path / "plain").succeeded()
    forked(*flags, "--steps", 2, "--out", tmp_path / "run").succeeded()
    more = ("--steps", 4, "--model.grad_checkpoint", "blocks")
    forked("--resume", "--out", tmp_path / "run", *more).succeeded()
    assert metrics(tmp_path / "plain", untimed=True) == metrics(tmp_path / "run", untimed=True)
