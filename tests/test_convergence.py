"""benchmarks/convergence.py: prices, budgets, continuation, the judge, and what is made of a record."""

import json
import math
import os
import sys

import pytest
import torch
from launching import ROOT, TINY, python, run

sys.path.insert(0, str(ROOT / "benchmarks"))
import convergence
import convergence_judge
import convergence_tables as tables

from fastdit.config import parse
from fastdit.engine import build
from fastdit.errors import UserError


def rows(name, seed, losses, share=0.5, health=None):
    """A run of one step a second."""
    own = {"contender": name, "flags": "", "seed": seed, "step_seconds": 0.25}
    found = [
        own
        | {"step": at, "seconds": at / 4, "images": at * 8, "loss": loss, "fd": None, "agreement": None, "health": None}
        for at, loss in enumerate(losses)
    ]
    found[-1] |= {"agreement": {"1": share}, "health": health or {"grad_norm": [1.0, 2.0, 1.5]}}
    return found


def record(*runs):
    return {"settings": {"guidance": [1.0]}, "device": "a machine", "rows": [row for run in runs for row in run]}


def test_table_shows_every_seed_mean_and_spread():
    dit = [rows("dit", 0, [4, 2, 1.0], 0.5), rows("dit", 1, [4, 3, 2.0], 0.7)]
    sadm = [rows("sadm", 0, [4, 4, 3.0], 0.25), rows("sadm", 1, [4, 4, 3.0], 0.25)]
    head, _, plain, other = tables.lines(record(*dit, *sadm))
    assert "agreement, guidance 1" in head
    assert "250" in plain
    assert "1.0000 2.0000" in plain
    assert "1.5000 ± 0.7071" in plain
    assert "50.0% 70.0%: 60.0% ± 14.1%" in plain
    assert "3.0000 ± 0.0000" in other


def test_health_is_shown_where_a_method_has_signals():
    health = {"grad_norm": [0.1, 2.0, 0.5], "psi_grad_norm": [1.0, 46.25, 3.0]}
    text = "\n".join(tables.lines(record(rows("dit", 0, [4, 1.0]), rows("sadm", 0, [4, 1.0], health=health))))
    assert "1..46.2, 3" in text
    assert "psi grad norm" in text
    assert text.count("\n| dit") == 2


def test_time_to_a_loss():
    curve = [(0.0, 4.0), (10.0, 2.0), (20.0, 1.0)]
    assert tables.time_to(curve, 4.0) == 0.0
    assert tables.time_to(curve, 2.0) == pytest.approx(10.0)
    assert tables.time_to(curve, math.sqrt(2)) == pytest.approx(15.0)  # halfway in the logarithm
    assert tables.time_to(curve, 0.5) == math.inf
    bump = [(0.0, 4.0), (10.0, 2.0), (20.0, 3.0), (30.0, 1.0)]
    assert tables.time_to(bump, 2.5) < 10  # the first time


def test_time_ratio_and_its_interval():
    fast, slow = [(0.0, 4.0), (10.0, 1.0)], [(0.0, 4.0), (10.0, 2.0)]
    assert tables.time_ratio([slow], [fast]) == pytest.approx((2.0, 2.0, 2.0))  # to loss 2: 10 s against 5
    assert tables.time_ratio([fast], [slow]) == pytest.approx((0.5, 0.5, 0.5))
    middle, low, high = tables.time_ratio([slow, slow, slow], [fast, slow, fast])
    assert low >= 1.0
    assert low < middle < high <= 2.0 + 1e-9
    assert tables.time_ratio([slow] * 7, [fast] * 7) == pytest.approx((2.0, 2.0, 2.0))


def test_readme_and_charts_come_from_the_records(tmp_path):
    from record import RECORDS, Section, write_charts, write_readme

    readme, section = ROOT / "benchmarks" / "README.md", tables.CONVERGENCE
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    write_readme(RECORDS, copy, section)
    assert copy.read_text() == readme.read_text()
    kept = [path for path in RECORDS.glob("*.json") if json.loads(path.read_text())["benchmark"] == "convergence"]
    assert all(path.with_suffix(".png").exists() for path in kept)
    for name, benchmark in (("mine", "convergence"), ("other", "kernels")):
        full = record(rows("dit", 0, [4, 1.0])) | {"benchmark": benchmark, "kind": "cpu", "versions": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps(full))
    write_charts(section, tmp_path)
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "other.png").exists()
    assert isinstance(section, Section)


def parsed(*argv):
    return convergence._parser().parse(list(argv))


def test_contenders():
    found = convergence._contenders(parsed("--set", "sadm", "--contender", '["mine=--lr 1e-3"]'))
    assert list(found) == ["dit", "sadm fixed", "sadm adversarial", "mine"]
    assert found["mine"] == "--lr 1e-3"
    with pytest.raises(UserError, match="--set nothing: unknown; choose of sd_dit, sadm, both"):
        convergence._contenders(parsed("--set", "nothing"))
    with pytest.raises(UserError, match="--contender mine: give NAME=FLAGS"):
        convergence._contenders(parsed("--set", "", "--contender", '["mine"]'))


@pytest.mark.parametrize("name", convergence.SETS)
def test_every_shipped_contender_parses(name):
    for flags in convergence.SETS[name].values():
        assert parse(["--preset", "quickstart", *flags.split()]).method != "dit"


class Zeros(torch.nn.Module):
    def forward(self, x, t, y):
        return torch.zeros_like(x)


def test_loss_is_the_noise_processes_own():
    """A network that answers with the target's mean has the loss that the noise process says."""
    noise = build.build_noise(parse(["--preset", "quickstart"]))
    x0 = torch.randn(150, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = convergence_judge.loss(Zeros(), noise, x0, torch.zeros(150, dtype=torch.int64))
    assert found == pytest.approx(2.0, rel=0.05)  # flow: |eps - x0|^2 of two unit normals
    assert found == convergence_judge.loss(Zeros(), noise, x0, torch.zeros(150, dtype=torch.int64))


def test_health_of_metrics():
    lines = [{"step": 1, "grad_norm": 3.0}, {"step": 2, "grad_norm": 5.0, "structure_loss": 0.5}, {"grad_norm": 4.0}]
    assert convergence_judge.health(lines) == {"grad_norm": [3.0, 5.0, 4.0], "structure_loss": [0.5, 0.5, 0.5]}


def benchmark(tmp_path, *flags):
    """The real command on two small contenders, prices given."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / "prices.json").write_text(json.dumps({"dit": 1.0, "other": 0.5}))
    common = " ".join(map(str, TINY)) + " --sd_dit.decoder_width 16 --sd_dit.decoder_depth 1 --sd_dit.decoder_heads 2"
    other = "other=--method sd_dit --sd_dit.head_width 16 --sd_dit.bottleneck 8 --sd_dit.prototypes 16"
    argv = ["--set", "", "--contender", json.dumps([other]), "--common", common, "--budget", "3", "--seeds", "1"]
    argv += ["--guidance", "1", "--points", "2", "--out", str(out), "--json", str(tmp_path / "record.json")]
    argv += ["--csv", str(tmp_path / "rows.csv"), "--png", str(tmp_path / "curves.png"), *flags]
    return run(python("benchmarks/convergence.py", *argv), tmp_path / "log")


@pytest.mark.launch
def test_a_benchmark_and_its_continuation(tmp_path):
    asked = ["--samples", "8", "--fd", "6"]
    stopped = benchmark(tmp_path, *asked, "--stop_after", "0")
    assert stopped.code == 0, stopped.text
    assert "dit seed 1: not finished; the same command goes on" in stopped.text
    ended = benchmark(tmp_path, *asked)
    assert ended.code == 0, ended.text
    found = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [(row["contender"], row["step"], row["seconds"], row["images"]) for row in found] == [
        ("dit", 0, 0, 0), ("dit", 2, 2.0, 16), ("dit", 3, 3.0, 24),
        ("other", 0, 0, 0), ("other", 3, 1.5, 24), ("other", 6, 3.0, 48),
    ]  # fmt: skip
    assert all(0 < row["loss"] < 10 for row in found)
    assert all(row["fd"]["value"] > row["fd"]["floor"] > 0 for row in found)
    assert "FD-lite0 of 6" in ended.text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(found)
    assert all((row["agreement"] is not None) == (row["seconds"] == 3.0) for row in found)
    assert "teacher_entropy" in found[-1]["health"]
    assert len(list((tmp_path / "out" / "dit-seed1" / "checkpoints").iterdir())) == 1
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/**/*") if path.is_file()}
    assert benchmark(tmp_path, *asked).code == 0
    assert json.loads((tmp_path / "record.json").read_text())["rows"] == found
    assert written == {path: path.stat().st_mtime_ns for path in written}
    refused = benchmark(tmp_path, *asked, "--samples", "9")
    assert refused.code == 2
    assert "dit-seed1: was trained or judged with other flags; choose another --out" in refused.text


def test_a_command_is_stopped_at_the_deadline(tmp_path):
    import time

    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert convergence._ask(command, dict(os.environ), time.monotonic() + 0.5, tmp_path) is None
    assert convergence._ask(command, dict(os.environ), time.monotonic() - 1, tmp_path) is None
    with pytest.raises(UserError, match=r"failed: .*boom"):
        convergence._ask([sys.executable, "-c", "raise SystemExit('boom')"], dict(os.environ), None, tmp_path)


@pytest.mark.launch
def test_prices(tmp_path):
    """Measured in one process of their own, then kept."""
    code = (
        "import sys, json; sys.path.insert(0, 'benchmarks'); import convergence; from pathlib import Path;"
        f"print(json.dumps(convergence._prices({{'dit': '', 'sadm': '--method sadm --sadm.psi_width 16'}}, "
        f"{' '.join(map(str, TINY))!r}, Path({str(tmp_path / 'prices.json')!r}))))"
    )
    done = run(python("-c", code), tmp_path / "log").succeeded()
    prices = json.loads(done.text.strip().splitlines()[-1])
    assert 0 < prices["dit"] < prices["sadm"]
    assert json.loads((tmp_path / "prices.json").read_text()) == prices
