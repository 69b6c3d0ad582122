"""benchmarks/rates.py on a CPU: it survives SIGKILL, continues from its journal, and tells what fails."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdit.errors import UserError

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")
THREADS = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
# What cannot run on a CPU.
GPU_ONLY = {
    f"S 2 attention {backend} {phase}"
    for backend in ("cudnn", "efficient")
    for phase in ("forward", "forward+backward, one gradient", "forward+backward, three gradients")
}


@pytest.fixture(scope="module", autouse=True)
def importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def start(journal: Path, *flags) -> subprocess.Popen:
    command = [sys.executable, BENCHMARKS / "rates.py", "--device", "cpu", "--sizes", "S", "--sweep"]
    return subprocess.Popen(
        [*map(str, command), "--journal", str(journal), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=THREADS,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Kill a run with SIGKILL in the middle and run it again: (journal after the kill, at the end, stdout, record)."""
    folder = tmp_path_factory.mktemp("rates")
    journal, record = folder / "rates.jsonl", folder / "rates.json"
    with start(journal) as first:
        end = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < 30:
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    killed = journal.read_bytes()
    with start(journal, "--json", record) as second:
        out, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    assert errors == ""
    return killed, journal.read_bytes(), out, json.loads(record.read_text())


def lines_of(text: bytes) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_killed_run_keeps_lines_and_continues_without_repeating(measured):
    killed, finished, *_ = measured
    assert finished.startswith(killed)
    before, after = lines_of(killed), lines_of(finished)
    assert len(before) >= 30
    done = [line["piece"] for line in before if line["what"] == "rates" and "failed" not in line]
    counts = Counter(line["piece"] for line in after if line["what"] == "rates" and "failed" not in line)
    assert set(done) < set(counts)
    assert set(counts.values()) == {1}
    assert sum(line["what"] == "device" for line in after) == 1


def test_every_piece_runs_but_those_that_need_a_gpu(measured):
    lines = lines_of(measured[1])
    names = {line["piece"] for line in lines if line["what"] == "rates" and "failed" not in line}
    failed = {line["piece"]: line["failed"] for line in lines if line["what"] == "rates" and "failed" in line}
    assert set(failed) == GPU_ONLY
    assert all("it needs a CUDA device" in text for text in failed.values())
    gemms = {
        f"S 2 gemm {layer} {phase} {kind}"
        for layer in ("qkv", "proj", "fc1", "fc2")
        for phase in ("forward", "dgrad", "wgrad")
        for kind in ("bf16", "fp8", "fp8 row-wise")
    }
    others = {
        "copy", "AdamW + EMA", "AdamW + EMA, bf16 copy", "squared norm", "copy of parameters, fp32 to bf16",
        "S 2 norm_rotate forward", "S 2 norm_rotate backward",
        "2 denoise loss forward", "2 denoise loss backward", "2 prototype loss forward+backward",
        "structure loss forward+backward", "S 2 adaLN forward", "S 2 adaLN backward from r",
        "S 2 adaLN backward from x", "S 2 GELU forward", "S 2 GELU backward", "S 2 GELU backward, bias",
        "S 2 adaLN backward from r, bias", "S 2 adaLN backward from x, bias", "S 2 qkv gradient, bias",
        "S 2 scatter tokens forward", "S 2 scatter tokens backward", "S 2 column sums of the fc1 gradient",
        "S 2 stack of dq, dk and dv", "S 2 attention sdpa forward", "S 2 attention flash forward",
    }  # fmt: skip
    assert gemms | others <= names
    for site in (
        "adaLN forward",
        "adaLN backward from r, bias",
        "GELU backward, bias",
        "quantize rows of the fc1 gradient",
    ):
        assert {f"S 2 sweep {site} TILE={tile}" for tile in (1, 2)} <= names


def test_a_choice_of_launch_options_with_other_results_is_an_error(monkeypatch):
    import launch_options
    from launch_options import Site, race
    from rate_pieces import Piece

    module = SimpleNamespace(options=lambda width: {"TILE": 1, "num_warps": 4})
    seen, measured = [], []

    def run():
        seen.append(module.options(8))
        return (torch.ones(3) * (1.5 if seen[-1]["TILE"] == 2 else 1), torch.empty(0))

    def take(piece):
        try:
            piece.make()
        except ValueError as error:
            return {"failed": str(error)}
        measured.append(piece.operation)
        return {"ms_p50": 1.0 if "warps=2" in piece.operation else 2.0}

    grids = {"TILE": (1, 2)}, {"num_warps": (2, 4)}, {"STAGES": (3,)}
    monkeypatch.setattr(launch_options, "SITES", (Site("a kernel", module, "options", grids),))
    race(take, [Piece("a kernel", lambda: run, 1), Piece("another", lambda: run, 1)], quick=False)
    assert measured == [
        "sweep a kernel TILE=1",
        "sweep a kernel TILE=1 num_warps=2",
        "sweep a kernel TILE=1 num_warps=4",
        "sweep a kernel TILE=1 num_warps=2 STAGES=3",
    ]
    assert {"TILE": 2, "num_warps": 4} in seen
    assert module.options(8) == {"TILE": 1, "num_warps": 4}


def test_lines_hold_times_and_rates(measured):
    lines = lines_of(measured[1])
    device = next(line for line in lines if line["what"] == "device")
    assert device["copy_gb_per_s"] > 0
    assert device["gemm_tflops"] > 0
    assert {"name", "torch", "l2_bytes"} <= set(device)
    for line in lines:
        if line["what"] != "rates" or "failed" in line:
            continue
        assert 0 < line["ms_p20"] <= line["ms_p50"] <= line["ms_p80"]
        assert ("tflops" in line) != ("gb_per_s" in line)
        if "gb_per_s" in line and line["piece"] != "copy":
            share = line["gb_per_s"] / device["copy_gb_per_s"]
            assert line["share_of_copy"] == pytest.approx(share, rel=1e-3, abs=1e-4)
        if "attention" in line["piece"]:
            assert "scaled_dot_product" in line["kernel"]


def test_table_and_record_hold_what_was_measured(measured):
    from rates import RATES, rates_lines, rates_record

    _, finished, out, record = measured
    lines = lines_of(finished)
    assert "\n".join(rates_lines(lines)) in out
    assert rates_record(lines)["rows"] == record["rows"]
    assert RATES.lines(record) == rates_lines(lines)
    assert record["benchmark"] == "rates"
    assert {"date", "command", "device", "kind", "versions", "load", "settings", "rows"} <= set(record)
    assert any(line.startswith("| adaLN forward ") for line in rates_lines(lines))


def test_step_model_takes_the_measured_rates(measured, tmp_path):
    from step_counts import TODAY
    from step_model import Rates, predict

    lines = lines_of(measured[1])
    rates = Rates(lines)
    step = predict("S", 256, TODAY, rates)
    origins = {name: rate.origin for name, rate in rates.used.items()}
    assert origins["copy, bytes/s"] == "measured"
    assert origins["S GEMM bf16 fc1 wgrad, FLOP/s"] == "measured"
    assert origins["S adaLN backward from x, bias, bytes/s"] == "measured"
    assert origins["AdamW + EMA, bf16 copy, bytes/s"] == "measured"
    assert "guess" not in {origin for name, origin in origins.items() if "GEMM" in name or "attention" in name}
    assert step.total > 1000  # milliseconds: a CPU is no H100


def test_no_slow_imports_at_start_up():
    code = "import sys, rates, rate_pieces; print(sorted({'matplotlib', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture
def runner(tmp_path):
    from journal import Journal
    from rates import Runner, Timer

    return Runner(Journal(tmp_path / "rates.jsonl"), Timer(CPU))


def test_a_piece_that_raises_is_a_line_and_not_the_end(runner):
    from journal import read_journal
    from rate_pieces import Piece
    from rates import Runner, latest, rates_lines

    reason = "no kernel\nfor this: " + "x" * 700

    def broken():
        raise RuntimeError(reason)

    works = Piece("works", lambda: lambda: torch.ones(8).sum(), 32, size="S", batch=2)
    runner.take(Piece("broken", lambda: broken, 1, size="S", batch=2))
    runner.take(works)
    lines = read_journal(runner.journal.path)
    assert [line["piece"] for line in lines] == ["S 2 broken", "S 2 works"]
    assert lines[0]["failed"] == "RuntimeError: no kernel for this: " + "x" * 700
    assert any(line.startswith("| S 2 broken ") for line in rates_lines(lines))

    # Another run tries what failed again, and not what was measured. A measurement then replaces the failure.
    again = Runner(runner.journal, runner.timer)
    again.take(works)
    again.take(Piece("broken", lambda: lambda: torch.ones(8).sum(), 1, size="S", batch=2))
    lines = read_journal(runner.journal.path)
    assert [line["piece"] for line in lines] == ["S 2 broken", "S 2 works", "S 2 broken"]
    assert "failed" not in latest(lines)["S 2 broken"]
    assert "failed" not in latest(lines[::-1])["S 2 broken"]


def test_a_piece_that_breaks_the_gpu_is_not_tried_again(runner, monkeypatch):
    from rate_pieces import Piece
    from rates import Runner

    def illegal_access():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner.timer, "wait", illegal_access)  # there is no GPU to break here
    piece = Piece("breaks", lambda: illegal_access, 1)
    with pytest.raises(UserError, match=r"breaks: broke the GPU's context .* go on with the next piece"):
        runner.take(piece)
    again = Runner(runner.journal, runner.timer)
    assert again.take(piece)["fatal"]
    assert len(runner.journal.lines) == 1


def test_gpu_timing_enqueues_all_calls_behind_a_wait(monkeypatch):
    """The GPU branch of the timer, with a clock in place of a GPU."""
    from rates import CYCLES, Timer

    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()
            log.append("mark")

        def elapsed_time(self, later):
            return (later.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles))
    timer = Timer(CPU)
    timer.gpu = True
    runs = [lambda name=name: (log.append(name), time.sleep(0.002)) for name in "abc"]
    found = timer.measure(runs)
    cycles = next(entry for entry in log if isinstance(entry, int))
    timed = log[log.index(cycles) + 1 :]
    assert 10 <= found.rounds <= 30
    assert 2 <= found.p20 <= found.p50 <= found.p80
    assert cycles >= CYCLES * 0.002 * found.rounds
    assert timed[:6] == ["mark", "a", "mark", "mark", "b", "mark"]
    assert timed[-1] == "wait"
    assert timed.count("wait") == 1


def test_sets_of_inputs_exceed_the_cache():
    from rates import Timer

    timer = Timer(CPU)
    timer.cache = 50 << 20  # of an H100
    small = 4 * 32 * 256 * 384 * 2  # adaLN forward at batch 32 and width 384
    assert small < timer.cache
    assert timer.sets_for(small) * small >= 4 * timer.cache
    assert timer.sets_for(4 * timer.cache) == 1
    assert timer.sets_for(1) == 64


def test_gemms_are_those_of_the_model():
    from rate_pieces import gemms, setting_of
    from step_counts import Architecture

    pieces = list(gemms(setting_of("XL", 256, torch.device("cuda"))))
    products = sum(Architecture.of("XL").layers.values())
    for kind in ("bf16", "fp8", "fp8 row-wise"):
        assert sum(p.flops for p in pieces if p.operation.endswith(f" {kind}")) == 6 * products * 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "S,M"], ["--sizes", "'M'", "XL"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--device", "abacus"], ["--device abacus", "cpu"]),
        (["--journal", "/dev/null/x"], ["--journal /dev/null/x"]),
        (["--swep"], ["--swep", "--sweep"]),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    from rates import _benchmark

    with pytest.raises(UserError) as caught:
        _benchmark(["--device", "cpu", *arguments])
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_journal_of_another_card_is_refused(tmp_path):
    from journal import Journal
    from rates import _benchmark

    path = tmp_path / "rates.jsonl"
    Journal(path).write("device", benchmark="rates", name="NVIDIA H200", copy_gb_per_s=4000.0)
    with pytest.raises(UserError, match=r"holds rates of NVIDIA H200, and this is .*; give another file"):
        _benchmark(["--device", "cpu", "--journal", str(path)])
    assert len(path.read_text().splitlines()) == 1
