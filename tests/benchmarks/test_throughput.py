"""Test benchmarks/throughput.py: it measures what trains, its rows add up, and records, tables and RESULTS.md agree."""

import contextlib
import csv
import io
import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from throughput_helpers import ROOT, RUN, SAME

from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.parser import parse

LATENTS = shlex.split("--model S/4 --size 16 --channels 3 --classes 7")
NAMED = ("sd_dit", "graphs")
PEER = """
import os
import torch

class DiT(torch.nn.Module):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, num_classes,
                 learn_sigma):
        super().__init__()
        assert (input_size, patch_size, in_channels, hidden_size, depth, num_heads) == (16, 4, 3, 32, 2, 2)
        assert (mlp_ratio, num_classes, learn_sigma) == (4.0, 7, False)
        self.table = torch.nn.Embedding(num_classes + 1, in_channels)
        self.mix = torch.nn.Conv2d(in_channels, in_channels, 1)
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, t, y):
        assert self.training and t.shape == y.shape == x.shape[:1]
        assert os.environ["FASTDIT_KERNELS"] == "reference"
        return self.mix(x) + self.table(y)[:, :, None, None]
"""


@pytest.fixture(scope="module", autouse=True)
def surroundings(as_it_was):
    """Put benchmarks/ on the path, and let all runs share one process group, because DeepSpeed keeps the first's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
        yield


def benchmark(*argv) -> str:
    """Run the benchmark, and return the text that it prints."""
    from throughput import _benchmark

    with contextlib.redirect_stdout(io.StringIO()) as out:
        _benchmark([str(word) for word in argv])
    return out.getvalue()


def clone(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "models.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return (record, printed text, folder) of SD-DiT beside dit, eager, a peer, and a peer that fails."""
    folder = tmp_path_factory.mktemp("throughput")
    good = clone(folder / "good", PEER)
    bad = clone(folder / "bad", PEER.replace("self.mix(x)", "self.nothing(x)"))
    against = f"eager,peer:facebookresearch:{good},peer:fast-dit:{bad}"
    files = ("--json", folder / "r.json", "--csv", folder / "r.csv")
    printed = benchmark(*RUN, *LATENTS, "--method", "sd_dit", "--steps", 3, "--against", against, *files)
    return json.loads((folder / "r.json").read_text()), printed, folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the record of dit alone, on the shipped images."""
    path = tmp_path_factory.mktemp("plain") / "r.json"
    images = shlex.split("--model S/7 --size 28 --channels 1 --data fashion_mnist --steps 2 --zero 0 --json")
    benchmark(*RUN, *images, path)
    return json.loads(path.read_text())


def parts(record: dict, contender: str, table: str) -> list[dict]:
    return [row for row in record["rows"] if (row["contender"], row["table"]) == (contender, table)]


def test_every_contender_has_its_rows(measured, plain):
    from step_tables import COLUMNS, COMPONENTS, PHASES

    record = measured[0]
    assert all(tuple(row) == COLUMNS for row in record["rows"] + plain["rows"])
    phases = [*PHASES, "rest"]
    games = ("denoiser", "Psi of clean samples", "structure, both players", "Psi's step")
    components = [part for part in COMPONENTS if part not in games] + ["rest"]
    for name in ("dit", "sd_dit", "eager", "facebookresearch"):
        assert [row["part"] for row in parts(record, name, "phase")] == phases
        assert len(parts(record, name, "step")) == 1
        assert [row["part"] for row in parts(record, name, "component")] == (components if name == "sd_dit" else [])
    assert [row["part"] for row in plain["rows"]] == ["whole step", *phases]
    assert record["settings"]["ranks"] == 1
    assert record["settings"]["zero"] == "zero1"
    assert plain["settings"]["zero"] == "zero0"


@pytest.mark.parametrize("name", ["dit", "sd_dit", "eager", "facebookresearch"])
def test_figures_of_a_step(measured, name):
    record = measured[0]
    (row,) = parts(record, name, "step")
    assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    assert row["steps"] == 3
    assert 0 < row["ratio_p20"] <= row["ratio_p50"] <= row["ratio_p80"]
    assert row["images_per_s"] == pytest.approx(3 / row["ms_p50"] * 1e3)
    achieved = row["flops_per_image"] * 3 / row["ms_p50"] * 1e3
    assert row["mfu_gemm"] == pytest.approx(achieved / record["settings"]["gemm_flops"])
    assert row["mfu_datasheet"] is None  # a CPU
    assert row["peak_bytes"] > row["held_bytes"] > 0
    for part in parts(record, name, "phase") + parts(record, name, "component"):
        assert math.isfinite(part["ms_p50"])
        if part["part"] not in ("rest", "method extras"):
            assert part["ms_p50"] > 0 or (name, part["part"]) == ("dit", "method extras"), part


def test_parts_and_rest_are_the_whole(measured, plain):
    for record, name, table in [
        *((measured[0], name, "phase") for name in ("dit", "sd_dit", "eager", "facebookresearch")),
        (measured[0], "sd_dit", "component"),
        (plain, "dit", "phase"),
    ]:
        (whole,) = parts(record, name, "step")
        assert sum(row["ms_p50"] for row in parts(record, name, table)) == pytest.approx(whole["ms_p50"], abs=1e-6)


def test_rest_hides_nothing():
    """Compute the parts from known laps, and check that time outside every part is the rest."""
    from step_tables import step_rows
    from stopwatch import Contender, Stopwatch

    contender = Contender(Stopwatch(torch.device("cpu")))
    contender.flops = {"network": 5.0}
    laps = {"data": 1.0, "forward": 2.0, "forward/encoder": 4.0, "optimizer": 8.0, "extras/refresh": 16.0, "rest": 32.0}
    base = [[{"forward": 7.0}], [{"forward": 70.0}]]
    settings = {"batch": 4, "ranks": 2, "datasheet_flops": 1e4, "gemm_flops": 1e3}
    step, *phases = step_rows("x", contender, [[laps], [{**laps, "rest": 95.0}]], base, settings)
    assert {row["part"]: row["ms_p50"] for row in phases} == {
        "data": 1.0, "forward": 6.0, "backward": 0.0, "optimizer + averages": 8.0, "method extras": 16.0, "rest": 63.5,
    }  # fmt: skip
    assert step["ms_p50"] == 94.5  # median of 63 and 126
    assert step["ratio_p50"] == pytest.approx((63 / 7 + 126 / 70) / 2)  # turn by turn
    assert step["mfu_gemm"] == pytest.approx(4 / 94.5e-3 * 5 / 2 / 1e3)
    assert step["mfu_datasheet"] == pytest.approx(step["mfu_gemm"] / 10)


def test_flops_are_the_methods(measured):
    counted = {}
    for name in ("dit", "sd_dit"):
        config = parse([*RUN, *SAME, "--method", name])
        module, method = run_parts.build_training(config, run_parts.shape_of(config, 7))
        counted[name] = method.flops(module)
    for name, flops in {**counted, "eager": counted["dit"], "facebookresearch": counted["dit"]}.items():
        (row,) = parts(measured[0], name, "step")
        assert row["flops_per_image"] == sum(flops.values())
    rows = {row["part"]: row["flops_per_image"] for row in parts(measured[0], "sd_dit", "component")}
    assert {part: value for part, value in rows.items() if value} == {
        "student encoder": counted["sd_dit"]["encoder"],
        "decoder": counted["sd_dit"]["decoder"],
        "teacher": counted["sd_dit"]["teacher"],
        "head and prototypes": counted["sd_dit"]["head"],
    }


def test_a_contender_that_raises_is_shown_and_the_run_goes_on(measured):
    (row,) = [row for row in measured[0]["rows"] if row["contender"] == "fast-dit"]
    assert row["ran"].startswith("failed: AttributeError")
    assert row["ms_p50"] is None
    assert "failed: AttributeError" in measured[1]


def test_json_csv_and_printed_table_agree(measured):
    from step_tables import COLUMNS, GOALS, step_lines

    record, printed, folder = measured
    assert "\n".join(step_lines(record)) in printed
    assert GOALS["sd_dit"] in printed
    with (folder / "r.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{key: "" if row[key] is None else str(row[key]) for key in COLUMNS} for row in record["rows"]]
    assert str(folder / "good") not in record["command"]  # where a clone lies is nobody's business
    assert "peer:facebookresearch:FOLDER" in record["command"]


def test_the_tables_come_from_the_records(measured, tmp_path):
    from record import RECORDS, read, write_results
    from step_tables import THROUGHPUT, step_lines

    page, begin, end = ROOT / "benchmarks" / "RESULTS.md", *THROUGHPUT.markers
    copy = tmp_path / "README.md"
    copy.write_text(page.read_text())
    write_results(RECORDS, copy, THROUGHPUT)
    assert copy.read_text() == page.read_text()
    (tmp_path / "a.json").write_text(json.dumps(measured[0]))
    (tmp_path / "b.json").write_text(json.dumps(measured[0] | {"benchmark": "kernels"}))
    write_results(tmp_path, copy, THROUGHPUT)
    head, rest = copy.read_text().split(begin)
    body, tail = rest.split(end)
    assert body.count("\n".join(step_lines(read(tmp_path / "a.json")))) == 1
    assert head + begin == page.read_text()[: len(head + begin)]
    assert page.read_text().endswith(end + tail)


def test_a_step_is_the_training_loops(tmp_path):
    """Check that weights, EMA weights, teacher, centers and Psi are the same to the bit after three steps."""
    method = "--method sd_dit+sadm --sadm.psi_width 16 --sadm.start 0 --sadm.psi_warm_steps 0"
    steps = f"--steps 3 --lr 1e-2 --warmup 2 --out {tmp_path}"
    config = parse([*RUN, *SAME, *method.split(), *steps.split()])
    from fastdit import distributed

    ranks = distributed.start(config)
    from contenders import Engine
    from stopwatch import Stopwatch

    from fastdit.training import loop
    from fastdit.training.ema import ema_state
    from fastdit.training.session import Session

    timed, trained = Engine(config, ranks, Stopwatch(ranks.device)), Session(config, ranks)
    before = [p.detach().clone() for p in timed.run.engine.module.parameters()]
    assert loop.train(trained.run, 0, lambda step: None)
    for _ in range(3):
        timed.step()
    states = []
    for run in (timed.run, trained.run):
        module = run.engine.module
        average = ema_state(run.engine, module, "cpu")
        base = run.method.base
        states.append([*module.parameters(), *average.values(), *base.teacher.parameters(), base.centers])
        states[-1] += run.method.psi.parameters()
    timed.close()
    trained.close()
    assert all(map(torch.equal, *states))
    assert not any(map(torch.equal, before[:3], states[0][:3]))


def test_the_step_with_cuda_graphs_is_a_contender(monkeypatch, tmp_path):
    """Check that it is cut like the step without graphs. train_with_graphs.py stands in for CUDA's graphs."""
    from train_with_graphs import stand_in

    from fastdit.training import cuda_graphs

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    monkeypatch.setattr(cuda_graphs, "check", lambda plan, device: None)
    flags = ["--method", "sd_dit", "--against", "graphs", "--steps", "1", "--json", tmp_path / "r.json"]
    printed = benchmark(*RUN, *LATENTS, *flags)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    parts = {name: [(row["table"], row["part"]) for row in rows if row["contender"] == name] for name in NAMED}
    assert parts["graphs"] == parts["sd_dit"]
    assert ("component", "student encoder") in parts["graphs"]
    for name in NAMED:
        table = printed.split(f"Parts of a step of {name}:")[1].split("\n\n")[1]
        assert table.count("student encoder") == 1
    assert "CUDA graphs" in next(row["ran"] for row in rows if row["contender"] == "graphs")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "S"], ["--model S", "S/2"]),
        (["--model", "M/2"], ["--model M/2", "XL"]),
        (["--model", "S/5"], ["data.size", "model.patch"]),
        (["--method", "gan"], ["method", "gan", "sd_dit"]),
        (["--batch", "0"], ["batch", "at least 1"]),
        (["--steps", "0"], ["--steps 0", "at least 1"]),
        (["--zero", "4"], ["zero", "got 4"]),
        (["--against", "eager,jax"], ["--against", "'jax'", "compile"]),
        (["--against", "graphs"], ["cuda_graphs", "no GPU"]),
        (["--against", "peer:sit:."], ["--against", "'sit'", "fast-dit"]),
        (["--against", "peer:fast-dit"], ["--against", "peer:NAME:FOLDER"]),
        (["--against", "peer:fast-dit:no/such/folder"], ["no/such/folder", "models.py"]),
        (["--data", "no_such_data"], ["no_such_data"]),
        (["--json", "/dev/null/x.json"], ["--json", "/dev/null/x.json"]),
        (["--step", "3"], ["--step", "--steps"]),
        (["--sd_dit.mask_ration", "0.5"], ["sd_dit.mask_ration"]),
    ],
)
def test_bad_input_is_one_line(argv, words):
    with pytest.raises(UserError) as caught:
        benchmark("--device", "cpu", "--threads", "1", *argv)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_package.part\n", "pip install no_such_package"),
        ("class Dit:\n    pass\n", "no class DiT"),
        ("class DiT(:\n", "SyntaxError"),
    ],
)
def test_a_peer_that_cannot_be_imported_is_one_line(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as caught:
        benchmark("--device", "cpu", "--against", f"peer:fast-dit:{clone(tmp_path / 'clone', text)}")
    assert "\n" not in str(caught.value)
