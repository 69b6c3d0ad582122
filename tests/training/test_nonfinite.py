"""Test that what is not finite reaches neither weights nor checkpoints, and that the run names the way on."""

import hashlib
import json
from itertools import pairwise

import pytest
import torch
from launching import TINY, averages, checkpoint, forked, metrics

from fastdit.data.order import Order
from fastdit.rundir.checkpoint_files import damage

pytestmark = pytest.mark.launch


def saved(folder) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def content(folder) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("stage", "precision", "ranks"), [(0, "fp32", 2), (1, "bf16", 1), (2, "fp32", 2), (3, "bf16", 2)]
)
def test_a_step_with_an_infinite_loss_and_finite_gradients_is_skipped(tmp_path, monkeypatch, stage, precision, ranks):
    monkeypatch.setenv("POISONED_STEPS", "3")
    out = tmp_path / "run"
    flags = ["--ds_config", f"zero{stage}", "--precision", precision, "--save_every", 1, "--keep_checkpoints", 9]
    text = forked(*TINY, *flags, "--steps", 5, "--out", out, ranks=ranks, program="poison_loss").succeeded().text
    assert [line["skipped"] for line in metrics(out)] == [0, 0, 1, 1, 1]
    assert saved(out) == [1, 2, 3, 4, 5]
    emas = [averages(out, step) for step in saved(out)]
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(emas)]
    assert moved == [True, False, True, True], "step 3 changed nothing"
    assert all(value.isfinite().all() for ema in emas for value in ema.values())
    assert "skipped 1 of 5 steps, whose loss or gradient was not finite" in text
    ids = Order(10_000, 8 // ranks, rank=ranks - 1, world=ranks).request(2 * 8).ids
    where = f"step 3 is skipped: the loss is not finite in the micro-batch of rank {ranks - 1}, samples "
    assert f"{where}{', '.join(map(str, ids))} (fastdit-data check fashion_mnist looks for bad ones)\n" in text
    assert text.count("is skipped") == 1
    assert text.index("step 2/5") < text.index("step 3 is skipped") < text.index("step 4/5")
    assert "skipped 1 of 5 steps" in json.loads((out / "facts.json").read_text())["trained"]


NAMES = {"weights": "the weights", "exp_avg_sq": "the second moments", "ema": "the EMA 'ema'"}


@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "poisoned"),
    [(0, "fp32", 1, "ema"), (1, "bf16", 2, "exp_avg_sq"), (3, "fp32", 1, "weights")],
)
def test_no_checkpoint_that_is_not_finite_is_kept(tmp_path, monkeypatch, stage, precision, ranks, poisoned):
    out = tmp_path / "run"
    flags = [*TINY, "--save_every", 2, "--ds_config", f"zero{stage}", "--precision", precision, "--out", out]
    flags += ["--keep_checkpoints", 1, "--steps"]
    forked(*flags, 2, ranks=ranks).succeeded()
    before = content(out / "checkpoints")
    monkeypatch.setenv("POISONED_STATE", poisoned)
    outcome = forked(*flags, 8, "--resume", ranks=ranks, program="poison_loss")
    assert outcome.code == 2
    error = next(line for line in outcome.text.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: step 4: not finite: {NAMES[poisoned]}; no checkpoint of this step is kept; ")
    assert f"last good checkpoint: {checkpoint(out, 2)}; go on with --resume and a lower --lr" in error
    assert "Traceback" not in outcome.text
    assert content(out / "checkpoints") == before


def test_a_learning_rate_that_overflows_the_moments(tmp_path):
    """Case R7: weights and moments overflow within four steps, before any loss does."""
    out = tmp_path / "run"
    outcome = forked(*TINY, "--grad_clip", 0, "--lr", 1e6, "--save_every", 4, "--steps", 12, "--out", out)
    assert outcome.code == 2
    assert "error: step 4: not finite: the weights, the second moments, the EMA 'ema'; no checkpoint" in outcome.text
    assert "no checkpoint is from before; start a new run with a lower --lr" in outcome.text
    assert saved(out) == []


def test_the_last_checkpoint_from_before_a_streak_is_kept_and_named(tmp_path, monkeypatch):
    monkeypatch.setenv("POISONED_STEPS", "4,5,6,7")
    out = tmp_path / "run"
    flags = ["--save_every", 1, "--keep_checkpoints", 2, "--max_nonfinite", 3, "--steps", 9, "--out", out]
    outcome = forked(*TINY, *flags, program="poison_loss")
    assert outcome.code == 2
    assert "error: step 4: loss or gradient not finite, and so for 3 steps in a row" in outcome.text
    # With the weights of step 3 the loss was not finite; with those of step 2 it was.
    remedy = f"last good checkpoint: {checkpoint(out, 2)}; remove those after it, then go on with --resume"
    assert remedy in outcome.text
    assert saved(out) == [2, 3, 4, 5]
    assert all(damage(checkpoint(out, step)) is None for step in saved(out))
    assert "Traceback" not in outcome.text


def test_pruning_goes_on_after_a_streak(tmp_path, monkeypatch):
    monkeypatch.setenv("POISONED_STEPS", "3,4")
    out = tmp_path / "run"
    flags = ["--save_every", 1, "--keep_checkpoints", 2, "--steps", 6, "--out", out]
    forked(*TINY, *flags, program="poison_loss").succeeded()
    assert saved(out) == [5, 6]
