"""benchmarks/convergence.py: prices, budgets, resumption, the judge, and its table."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, TINY

sys.path.insert(0, str(ROOT / "benchmarks"))
import convergence

from fastdit.config import parse
from fastdit.engine import build
from fastdit.errors import UserError


def row(name, seed, loss, share):
    return {"contender": name, "seed": seed, "steps": 7, "step_seconds": 0.25, "loss": loss, "agreement": {"1": share}}


def test_table_shows_every_seed_mean_and_spread():
    rows = [row("dit", 0, 1.0, 0.5), row("dit", 1, 2.0, 0.7), row("sadm", 0, 3.0, 0.25), row("sadm", 1, 3.0, 0.25)]
    head, _, dit, sadm = convergence.lines({"settings": {"guidance": [1.0]}, "rows": rows})
    assert "agreement, guidance 1" in head
    assert "250" in dit
    assert "1.0000 2.0000" in dit
    assert "1.5000 ± 0.7071" in dit
    assert "50.0% 70.0%: 60.0% ± 14.1%" in dit
    assert "3.0000 ± 0.0000" in sadm


def test_contenders():
    class Args:
        set, contender = "sadm", ["mine=--lr 1e-3"]

    found = convergence._contenders(Args)
    assert list(found) == ["dit", "sadm fixed", "sadm adversarial", "mine"]
    assert found["mine"] == "--lr 1e-3"
    Args.set = "nothing"
    with pytest.raises(UserError, match="--set nothing: unknown; choose of sd_dit, sadm, both"):
        convergence._contenders(Args)
    Args.set, Args.contender = "", ["mine"]
    with pytest.raises(UserError, match="--contender mine: give NAME=FLAGS"):
        convergence._contenders(Args)


@pytest.mark.parametrize("flags", ["", "--method sd_dit", "--method sd_dit+sadm"])
def test_every_shipped_contender_parses(flags):
    for members in convergence.SETS.values():
        for own in members.values():
            parse(["--preset", "quickstart", *own.split()])


def test_loss_is_the_methods_own_at_all_patches():
    """A network that answers with the target's mean has the loss that the noise process says."""
    noise = build.build_noise(parse(["--preset", "quickstart"]))
    x0 = torch.randn(150, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    zeros = lambda x, t, y: torch.zeros_like(x)  # noqa: E731
    found = convergence._loss(zeros, noise, x0, torch.zeros(150, dtype=torch.int64), torch.device("cpu"))
    assert found == pytest.approx(2.0, rel=0.05)  # flow: |eps - x0|^2 of two unit normals
    again = convergence._loss(zeros, noise, x0, torch.zeros(150, dtype=torch.int64), torch.device("cpu"))
    assert found == again


@pytest.mark.launch
def test_a_benchmark_and_its_continuation(tmp_path, capfd):
    out, record = tmp_path / "out", tmp_path / "record.json"
    out.mkdir()
    prices = {"dit": 1.0, "other": 0.5}
    (out / "prices.json").write_text(json.dumps(prices))
    common = " ".join(map(str, TINY)) + " --sd_dit.decoder_width 16 --sd_dit.decoder_depth 1 --sd_dit.decoder_heads 2"
    other = "other=--method sd_dit --sd_dit.head_width 16 --sd_dit.bottleneck 8 --sd_dit.prototypes 16"
    argv = ["--set", "", "--contender", json.dumps([other]), "--common", common, "--budget", "3", "--seeds", "1"]
    argv += ["--samples", "8", "--guidance", "1", "--out", str(out), "--json", str(record)]
    with pytest.raises(SystemExit) as ended:
        convergence.main(argv)
    assert ended.value.code == 0, capfd.readouterr().err
    rows = json.loads(record.read_text())["rows"]
    assert [(r["contender"], r["steps"], r["images"]) for r in rows] == [("dit", 3, 24), ("other", 6, 48)]
    assert all(0 <= r["agreement"]["1"] <= 1 and 0 < r["loss"] < 10 for r in rows)
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        convergence.main(argv)
    assert ended.value.code == 0
    assert json.loads(record.read_text())["rows"] == rows
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


@pytest.mark.launch
def test_prices_are_kept(tmp_path):
    common = " ".join(map(str, TINY))
    path = Path(tmp_path) / "prices.json"
    path.write_text(json.dumps({"dit": 5.0, "sadm": 6.0}))
    assert convergence._prices({"dit": "", "sadm": "--method sadm"}, common, path) == {"dit": 5.0, "sadm": 6.0}
