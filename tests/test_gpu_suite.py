"""benchmarks/gpu_suite.py: its parts on a CPU, being cut off, and the README that comes from its record."""

import json
import sys
import time

import psutil
import pytest
from launching import ROOT, python, run

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_suite
import record as records

from fastdit.errors import UserError


@pytest.mark.launch
def test_the_suite_on_a_cpu(tmp_path):
    """Real parts, real record, and all sections of a README made from it."""
    from convergence_tables import CONVERGENCE
    from step_tables import THROUGHPUT

    run(python("benchmarks/gpu_suite.py", "--tiny", "--out", tmp_path), tmp_path / "log").succeeded()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert path.name.startswith(record["date"][:10])
    assert path.name.endswith(f"-{record['versions']['commit']}.json")
    assert [row["part"] for row in record["rows"]] == [part.name for part in gpu_suite.TINY]
    assert all(row["ended"] == "well" and 0 < row["seconds"] < row["limit"] for row in record["rows"])
    tests, step, operations = (row["record"] for row in record["rows"])
    assert tests["passed"] > 0
    assert tests["failures"] == tests["errors"] == 0
    assert {row["contender"] for row in step["rows"]} == {"dit", "eager"}
    assert operations["benchmark"] == "kernels"
    assert record.keys() == step.keys() == operations.keys()

    readme = tmp_path / "README.md"
    readme.write_text("".join("".join(s.markers) for s in (gpu_suite.SUITE, records.KERNELS, THROUGHPUT, CONVERGENCE)))
    for section in (gpu_suite.SUITE, records.KERNELS, THROUGHPUT, CONVERGENCE):
        records.write_readme(tmp_path, readme, section)
    text = readme.read_text()
    assert text.count("Parts of a step, ms:") == 1
    assert text.count("| modulate ") == 3
    assert f"| {tests['passed']} / 0 / {tests['skipped']} " in text


def test_readme_comes_from_the_records(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "benchmarks" / "README.md").read_text())
    records.write_readme(records.RECORDS, copy, gpu_suite.SUITE)
    assert copy.read_text() == (ROOT / "benchmarks" / "README.md").read_text()


def test_the_projects_readme_comes_from_the_records(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    gpu_suite.write_figures(copy)
    assert copy.read_text() == (ROOT / "README.md").read_text()


def test_a_part_is_cut_off_and_its_record_kept():
    """The command has a child and ignores SIGTERM: both are gone afterwards."""
    stubborn = (
        "import json, os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '60']);"
        "open(sys.argv[sys.argv.index('--json') + 1], 'w').write(json.dumps({'pids': [os.getpid(), child.pid]}));"
        "time.sleep(60)"
    )
    part = gpu_suite.Part("stubborn", f'-c "{stubborn}"', 9.0)
    gpu_suite.GRACE, grace = 0.5, gpu_suite.GRACE
    try:
        row = gpu_suite._run(part, "cpu", 3.0)
    finally:
        gpu_suite.GRACE = grace
    assert row["ended"] == "cut off after 3 s"
    assert len(row["record"]["pids"]) == 2
    end = time.monotonic() + 30  # a killed process takes its time to go
    while (left := [pid for pid in row["record"]["pids"] if _lives(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def _lives(pid: int) -> bool:
    """Not what waits for whoever inherited it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_failing_part_says_its_last_line():
    row = gpu_suite._run(gpu_suite.Part("bad", "-c \"raise SystemExit('no such thing')\"", 9.0), "cpu", 9.0)
    assert row["ended"] == "exit code 1: no such thing"
    assert row["record"] is None
    late = gpu_suite._run(gpu_suite.Part("late", "-c pass", 9.0), "cpu", 0.0)
    assert late["ended"] == "not run: the budget was spent"


def test_counts_of_tests(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\n"
    )
    part = gpu_suite.Part("tests", f"-m pytest -q -p no:cacheprovider {tmp_path / 'test_x.py'}", 60.0)
    row = gpu_suite._run(part, "cpu", 60.0)
    assert row["ended"].startswith("exit code 1")
    assert row["record"] == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "passed": 1}
    assert "1 / 1 / 1" in gpu_suite.lines({"rows": [row]})[-1]


def test_parts_and_refusals(monkeypatch):
    assert [part.name for part in gpu_suite._chosen(gpu_suite.PARTS, "operations S, B,dit XL/2")] == [
        "operations S, B", "dit XL/2",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--parts nothing: 'nothing' is unknown; choose of 'tests', "):
        gpu_suite._chosen(gpu_suite.PARTS, "nothing")
    monkeypatch.setattr(gpu_suite.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device here; --tiny runs a small suite on the CPU"):
        gpu_suite._suite([])


@pytest.mark.parametrize("part", gpu_suite.PARTS, ids=lambda part: part.name)
def test_every_part_is_a_command_that_parses(part):
    """The flags of each part are known to its benchmark; test files exist."""
    script, *flags = part.command.split()
    if script == "-m":
        assert all((ROOT / name).is_file() for name in flags if name.startswith("tests/"))
        return
    import throughput

    import kernels

    if "throughput" not in script:
        kernels._parser().parse([*flags, "--device", "cpu"])
        return
    own, dotted = throughput._split([*flags, "--device", "cpu"])
    args = throughput._parser().parse(own)
    throughput._against(args.against)
    throughput._config(args, dotted)
