"""Every ZeRO stage, launcher and accumulation against one reference: AdamW, clipping, schedules and EMA in float64.

The reference shares the network, the loss and the data with the run (they have tests of their own), but nothing of
DeepSpeed, the optimizer, the schedules or the loop. It plays all ranks itself.
"""

import json
from functools import cache

import numpy as np
import pytest
import torch
from fp64_reference import MasterWeights, rank_inputs
from launching import RECIPE, TINY, averages, forked, metrics, python, run

from fastdit import run_parts
from fastdit.parser import parse

pytestmark = pytest.mark.launch


@cache
def reference(world: int, accumulation: int = 1) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of every step of RECIPE, and its final EMA (float64)."""
    config = parse(RECIPE)
    source = run_parts.open_data(config)
    shape = run_parts.shape_of(config, source.classes)
    network, method = run_parts.build_training(config, shape)
    master, losses, norms = MasterWeights(network, warmup=5, steps=config.steps), [], []
    with rank_inputs(config, source, world, accumulation) as ranks:
        for _ in range(config.steps):
            total, grads = 0.0, master.no_gradient()
            for inputs in [inputs for inputs in ranks for _ in range(accumulation)]:
                loss, *_ = method.loss(network, *next(inputs))
                for grad, part in zip(grads, torch.autograd.grad(loss, master.params)):
                    grad += part.double() / (world * accumulation)
                total += loss.item() / (world * accumulation)
            losses.append(total)
            norms.append(master.step(grads))
    return losses, norms, master.averages["ema"]


def check(folder, world: int, accumulation: int = 1) -> None:
    losses, norms, ema = reference(world, accumulation)
    assert sum(norm > 0.5 for norm in norms) > 3, "clipping must have acted"
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [*range(3, 40, 3), 40]
    for line in lines:
        since = line["step"] - (3 if line["step"] < 40 else 1)
        assert line["loss"] == pytest.approx(np.mean(losses[since : line["step"]]), rel=2e-5)
        assert line["grad_norm"] == pytest.approx(norms[line["step"] - 1], rel=2e-4)
        assert line["skipped"] == 0
    found = averages(folder, 40)
    assert ema.keys() <= found.keys()
    for name, expected in ema.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ds_config", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_two_ranks_train_as_the_reference(straight, ds_config):
    check(straight(ds_config), world=2)


def test_one_rank_by_plain_python_trains_as_the_reference(tmp_path):
    run(python("fastdit/train.py", *RECIPE, "--out", tmp_path / "run"), tmp_path / "log").succeeded()
    check(tmp_path / "run", world=1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation_by_a_deepspeed_file_trains_as_the_reference(tmp_path, stage):
    file = tmp_path / "mine.json"
    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    file.write_text(json.dumps({**sizes, "zero_optimization": {"stage": stage}}))
    forked(*RECIPE, "--ds_config", file, "--out", tmp_path / "run").succeeded()
    check(tmp_path / "run", world=1, accumulation=2)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_is_clipped_as_by_deepspeed(tmp_path, stage):
    """Two ranks, two micro-batches, a limit that every gradient is above: ours against `compute_grad_norm`."""
    found = {}
    for theirs in (False, True):
        zero = {"stage": stage} | ({"compute_grad_norm": True} if theirs else {})
        file, out = tmp_path / f"{theirs}.json", tmp_path / str(theirs)
        file.write_text(json.dumps({"zero_optimization": zero, "gradient_accumulation_steps": 2}))
        flags = [*TINY, "--steps", 4, "--eps", "1e-2", "--grad_clip", "0.02", "--precision", "bf16"]
        forked(*flags, "--ds_config", file, "--out", out, ranks=2).succeeded()
        found[theirs] = metrics(out), averages(out, 4)
    for ours, theirs in zip(found[False][0], found[True][0], strict=True):
        assert theirs["grad_norm"] > 0.1
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    for name, average in found[True][1].items():
        torch.testing.assert_close(found[False][1][name], average, rtol=0, atol=1e-7)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_gradients_of_one_micro_batch_need_no_fp32(tmp_path, ranks):
    """ZeRO-1: to the bit what DeepSpeed's optimizer that keeps them in fp32 makes of them."""
    found = {}
    for kept in ("bf16", "fp32"):
        file, out = tmp_path / f"{kept}.json", tmp_path / kept
        types = {"data_types": {"grad_accum_dtype": "fp32"}} if kept == "fp32" else {}
        file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **types}))
        flags = [*TINY, "--steps", 6, "--grad_clip", "0.5", "--precision", "bf16"]
        forked(*flags, "--ds_config", file, "--out", out, ranks=ranks).succeeded()
        found[kept] = metrics(out, untimed=True), averages(out, 6)
    assert found["bf16"][0] == found["fp32"][0]
    for name, average in found["fp32"][1].items():
        assert torch.equal(found["bf16"][1][name], average), name


def test_bf16_gradients_are_reduced_in_fp32_where_the_file_says_so(tmp_path):
    """Four micro-batches on two ranks have then the gradient norm that they have on one rank."""
    norms, in_fp32 = {}, {"communication_data_type": "fp32"}
    for name, ranks, more in (
        ("one", 1, {"gradient_accumulation_steps": 4, **in_fp32}),
        ("bf16", 2, {"gradient_accumulation_steps": 2}),
        ("fp32", 2, {"gradient_accumulation_steps": 2, **in_fp32}),
    ):
        file, out = tmp_path / f"{name}.json", tmp_path / name
        file.write_text(json.dumps({"zero_optimization": {"stage": 1}, **more}))
        flags = [*TINY, "--steps", 4, "--lr", 0, "--precision", "bf16"]
        forked(*flags, "--ds_config", file, "--out", out, ranks=ranks).succeeded()
        norms[name] = np.array([line["grad_norm"] for line in metrics(out)])
    errors = {name: np.abs(norms[name] / norms["one"] - 1).max() for name in ("bf16", "fp32")}
    assert errors["fp32"] < 1e-6 < 1e-5 < errors["bf16"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_trains_fp32_master_weights(tmp_path, stage):
    flags = [*TINY, "--steps", 4, "--lr", "1e-5", "--ds_config", f"zero{stage}", "--precision", "bf16"]
    text = forked(*flags, "--out", tmp_path / "run").succeeded().text
    assert "bf16" in text
    found = averages(tmp_path / "run", 4)
    network = run_parts.build_network(parse(list(map(str, flags))), run_parts.Shape(1, 28, 28, 10))
    for name, p in network.named_parameters():
        assert found[name].dtype == torch.float32
        start = p.detach().bfloat16().float()  # DeepSpeed makes the masters from the cast network
        moved = (found[name] - start).abs().max()
        assert moved < 5e-5, name  # four steps of 1e-5
    # Steps of 1e-5 vanish at bf16's resolution of weights around 0.1: in fp32 masters those with a gradient move.
    weight, start = found["blocks.0.fc1.weight"], network.blocks[0].fc1.weight.detach().bfloat16().float()
    large = start.abs() > 0.05
    assert large.sum() > 100
    assert (weight != start)[large].float().mean() > 0.3


def test_zero0_in_bf16_is_refused(tmp_path):
    outcome = forked(*TINY, "--ds_config", "zero0", "--precision", "bf16", "--out", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.text.strip().endswith("use zero1, or --precision fp32")
    assert "Traceback" not in outcome.text
