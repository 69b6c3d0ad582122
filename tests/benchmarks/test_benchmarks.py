"""benchmarks/kernels.py: it runs, and records, rows, chart and RESULTS.md say the same."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "kernels.py"
SIZED = {"modulate", "gate_residual_modulate", "gate_residual", "AdamW + average, flat", "AdamW + average, list"}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with the three files of a quick run over all operations, and what the run printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = [flag for kind in ("json", "csv", "png") for flag in (f"--{kind}", folder / f"out.{kind}")]
    done = run("--quick", "--against", "eager", "--sizes", "S,XL", "--device", "cpu", *files)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_record(measured):
    from operations import OPERATIONS
    from record import COLUMNS

    record = json.loads((measured[0] / "out.json").read_text())
    assert set(record) == {
        "benchmark", "date", "command", "device", "kind", "driver", "versions", "load", "settings", "rows",
    }  # fmt: skip
    assert record["versions"]["torch"] == torch.__version__
    assert record["kind"] == "cpu"
    assert record["command"].startswith("python benchmarks/kernels.py --quick")
    assert {row["operation"] for row in record["rows"]} == set(OPERATIONS)
    assert {row["case"] for row in record["rows"] if row["operation"] in ("adaln", "optimizer")} == SIZED
    for row in record["rows"]:
        assert tuple(row) == COLUMNS
        assert not row["ran"].startswith("failed"), row
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms_p50"] / 1e6, rel=1e-3, abs=1e-3)
        share = row["bytes"] / row["ms_p50"] / 1e6 / row["copy_gb_per_s"]
        assert row["share_of_copy"] == pytest.approx(share, rel=1e-3, abs=1e-4)
        assert (row["peak_bytes"] is None) == (row["phase"] in ("forward", "backward"))
        if row["phase"] == "both":
            assert row["peak_bytes"] >= row["kept_bytes"] > 0


def test_every_contender_has_every_phase(measured):
    from record import groups

    record = json.loads((measured[0] / "out.json").read_text())
    for rows in groups(record):
        first = next(iter(rows.values()))
        others = {"optimizer": ["AdamW for-loop", "AdamW foreach", "AdamW fused"], "philox": ["randn"]}
        assert list(rows) == ["fastdit", *others.get(first["operation"], ["eager"])]
    phases = [next(iter(rows.values()))["phase"] for rows in groups(record)]
    assert phases.count("forward") == phases.count("backward") == phases.count("both") == 2 * 11 + 1


def test_csv_is_the_rows(measured):
    rows = json.loads((measured[0] / "out.json").read_text())["rows"]
    with (measured[0] / "out.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def test_chart(measured):
    from PIL import Image

    with Image.open(measured[0] / "out.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 5


def test_printed_table_is_of_the_record(measured):
    from record import lines

    record = json.loads((measured[0] / "out.json").read_text())
    assert "\n".join(lines(record)) in measured[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ops", "adaln,adalm"], ["--ops", "'adalm'", "rotary"]),
        (["--sizes", "M"], ["--sizes", "'M'", "XL"]),
        (["--against", "jax"], ["--against", "'jax'"]),
        (["--batch", "-1"], ["--batch"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--json", "/dev/null/x.json"], ["--json", "/dev/null/x.json"]),
        (["--op", "adaln"], ["--op", "--ops"]),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    from fastdit.errors import UserError
    from kernels import _benchmark

    with pytest.raises(UserError) as caught:
        _benchmark(arguments)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_unknown_operation_exits_with_2():
    done = run("--ops", "adalm")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: --ops adalm")
    assert "\n" not in done.stderr.strip()
    assert done.stdout == ""


def test_a_contender_that_raises_is_shown_and_the_run_goes_on():
    from measure import measure
    from operations import Case
    from timing import QUICK, Clock

    def broken(x):
        raise RuntimeError("no kernel\nfor this")

    case = Case("double", "3x5", lambda randn: (randn(3, 5),), 1, broken, lambda x: 2 * x, "cpp", lambda i, o: ())
    results = list(measure(Clock(torch.device("cpu"), QUICK), case, torch.float32, ["eager"]))
    assert [(r.phase, r.contender) for r in results if r.times is None] == [
        (phase, "fastdit") for phase in ("forward", "backward", "both")
    ]
    assert {r.ran for r in results if r.contender == "fastdit"} == {"failed: RuntimeError: no kernel for this"}
    assert [r.bytes for r in results if r.contender == "eager"] == [120, 120, 240]


def test_a_run_cut_short_keeps_what_it_has(tmp_path, monkeypatch):
    import kernels

    def stop(setting):
        raise KeyboardInterrupt

    monkeypatch.setitem(kernels.OPERATIONS, "gelu", stop)
    with pytest.raises(KeyboardInterrupt):
        kernels._benchmark(
            ["--quick", "--device", "cpu", "--sizes", "S", "--ops", "tokens,gelu", "--json", str(tmp_path / "r.json")]
        )
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["operation"] for row in rows} == {"tokens"}
    assert len(rows) == 6


def test_memory_counts_what_is_held():
    from timing import memory

    def first():
        kept = torch.ones(2, 1000)
        torch.ones(3, 1000).sum()
        return kept

    found = memory(torch.device("cpu"), first, lambda kept: torch.ones(1, 1000).add_(kept[0]))
    assert found.kept == 8000
    assert 20000 <= found.peak < 20100  # and the sum


def test_order_turns_and_caches_are_emptied(monkeypatch):
    from timing import QUICK, Clock, Runner

    seen = []
    clock = Clock(torch.device("cpu"), QUICK)
    quantiles = clock.interleave({name: Runner(lambda i, name=name: seen.append((name, i))) for name in "abc"}, 4)
    assert "".join(name for name, _ in seen) == "abc" + "abc" + "bca" + "cab"
    indices = [index for _, index in seen[3:]]
    assert indices == [1, 2, 3, 0, 1, 2, 3, 0, 1]  # no set is read twice in a row
    assert all(found.rounds == 3 for found in quantiles.values())


def test_the_tables_come_from_the_records(tmp_path):
    from record import MARKERS, RECORDS, RESULTS, write_results

    copy = tmp_path / "README.md"
    text = RESULTS.read_text()
    head, tail = text.split(MARKERS[0])[0], text.split(MARKERS[1])[1]
    copy.write_text(head + MARKERS[0] + "stale\n" + MARKERS[1] + tail)
    write_results(RECORDS, copy)
    assert copy.read_text() == text
    assert list(RECORDS.glob("*.json"))


def test_gpus_are_not_measured_until_a_record_says_so(measured):
    from record import table

    record = json.loads((measured[0] / "out.json").read_text())
    assert "NVIDIA GPUs: not measured." in table([record])
    gpu = record | {"kind": "cuda", "device": "NVIDIA H100"}
    both = table([record, gpu])
    assert "not measured" not in both
    assert both.index("NVIDIA H100") < both.index(record["device"])


def test_a_page_without_markers_or_a_bad_record_is_one_line(tmp_path):
    from record import MARKERS, write_results

    from fastdit.errors import UserError

    page = tmp_path / "README.md"
    page.write_text("nothing\n")
    with pytest.raises(UserError, match="records: begin"):
        write_results(tmp_path, page)
    page.write_text("".join(MARKERS))
    (tmp_path / "x.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match=r"x\.json: is no record"):
        write_results(tmp_path, page)
