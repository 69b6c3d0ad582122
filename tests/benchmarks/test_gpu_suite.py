"""benchmarks/gpu_suite.py: real parts on a CPU, kills, the time budget, and the record that is built from lines."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from launching import ROOT, Launched, python, run

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_suite
import record as records
from gpu_suite import LINES, LOG, Part
from journal import Journal, read_journal

from fastdit.errors import UserError

PATIENCE = 30.0


def lines_of(folder: Path, what: str) -> list[dict]:
    return [line for line in read_journal(folder / LINES) if line["what"] == what]


# -- the real suite --


@pytest.mark.launch
def test_a_killed_suite_goes_on_and_loses_nothing(tmp_path):
    """SIGKILL comes between a part's two cases. The record of what was measured is built; the rest is added later."""
    from step_tables import THROUGHPUT
    from suite_record import SUITE, suite_record

    out = tmp_path / "out"
    command = python("benchmarks/gpu_suite.py", "--tiny", "--budget", 600, "--out", out)
    with Launched(command, tmp_path / "first.log") as launched:
        launched.until(lambda: bool(lines_of(out, "profile")), "the first profile")
    first = lines_of(out, "profile")[0]
    (row,) = suite_record(read_journal(out / LINES))["rows"]
    assert (row["part"], row["ended"]) == ("steps", "the suite was killed")
    assert row["record"]["rows"][0]["case"] == first["case"]
    run(python("benchmarks/gpu_suite.py", "--record", "--out", out), tmp_path / "record.log").succeeded()

    ended = run([*command, "--continue"], tmp_path / "second.log", patience=1800).succeeded()
    assert "without a module: not run: no_such_module is not installed" in ended.text
    assert [line for line in lines_of(out, "profile") if line["case"] == first["case"]] == [first], "measured once"
    assert len([*out.iterdir()]) <= 8
    (path,) = out.glob("*.json")
    record = json.loads(path.read_text())
    assert path.name.startswith(record["date"][:10])
    assert path.name.endswith(f"-{record['versions']['commit']}.json")
    rows = {row["part"]: row for row in record["rows"]}
    assert list(rows) == [part.name for part in gpu_suite.TINY]
    assert {row["ended"] for name, row in rows.items() if name != "without a module"} == {"well"}
    assert len(rows["steps"]["record"]["rows"]) == 2
    assert all(case["groups"] and case["kernels"] for case in rows["steps"]["record"]["rows"])
    assert rows["kernel tests"]["record"]["passed"] > 0
    assert rows["kernel tests"]["record"]["failed"] == 0
    assert {row["contender"] for row in rows["S/4 against eager"]["record"]["rows"]} == {"dit", "eager"}
    assert rows["operations"]["record"]["benchmark"] == "kernels"
    log = (out / LOG).read_text()
    assert all(f"=== {part.name}: " in log for part in gpu_suite.TINY if not part.needs)

    page = tmp_path / "README.md"
    page.write_text("".join("".join(s.markers) for s in (SUITE, records.KERNELS, THROUGHPUT)))
    for section in (SUITE, records.KERNELS, THROUGHPUT):
        records.write_results(out, page, section)
    text = page.read_text()
    assert text.count("Parts of a step, ms:") == 1
    assert text.count("| modulate ") == 3
    assert f"| {rows['kernel tests']['record']['passed']} / 0 / " in text


# -- the clock --


@pytest.fixture
def quick(monkeypatch):
    """Little time is kept for ending parts."""
    for name, seconds in (("RESERVE", 0.0), ("GRACE", 0.5)):
        monkeypatch.setattr(gpu_suite, name, seconds)


def script(name: str, code: str, limit: float = 60.0, **more) -> Part:
    return Part(name, ("-c", code), limit, least=0.5, **more)


def lives(pid: int) -> bool:
    """Whether a process runs; a zombie that waits for whoever inherited it does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


STUBBORN = (
    "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "child = subprocess.Popen(['sleep', '60']);"
    "print('pids', os.getpid(), child.pid, flush=True); time.sleep(60)"
)


def pids_in(log: Path) -> list[int]:
    return [int(word) for line in log.read_text().splitlines() if line.startswith("pids") for word in line.split()[1:]]


def test_parts_end_inside_the_budget(tmp_path, quick):
    """A part that ignores SIGTERM is killed with its child, and what comes after has no time left."""
    parts = [script("short", "print('said')"), script("stubborn", STUBBORN), script("late", "pass")]
    journal, began = Journal(tmp_path / LINES), time.monotonic()
    results = gpu_suite._run_all(parts, journal, tmp_path / LOG, "cpu", began + 4)
    assert time.monotonic() - began < 4 + 0.5 + 2
    assert results == [True, False, False]
    ended = {line["part"]: line["ended"] for line in journal.lines if line["what"] == "part ended"}
    assert ended["short"] == "well"
    assert ended["late"] == "not run: it needs 0 s, and 0 s were left"
    assert re.fullmatch(r"cut off after [1-4] s", ended["stubborn"]), "what the first part left of the 4 s"
    assert "said" in (tmp_path / LOG).read_text()
    pids = pids_in(tmp_path / LOG)
    assert len(pids) == 2
    end = time.monotonic() + PATIENCE
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(lives, pids))


def test_a_process_that_cannot_be_ended_does_not_hold_up_the_suite(quick, monkeypatch):
    """Such a process waits in a driver; SIGKILL does not reach it."""
    monkeypatch.setattr(gpu_suite, "PATIENCE", 0.2)

    class Stuck:
        pid = 0

        def wait(self, patience: float):
            time.sleep(patience)
            raise subprocess.TimeoutExpired("x", patience)

        def poll(self):
            return None

    sent = []
    monkeypatch.setattr(gpu_suite.os, "killpg", lambda group, number: sent.append(number))
    assert not gpu_suite._end(Stuck())
    assert len(sent) == 2


def test_parts_die_with_a_killed_suite(tmp_path):
    """Its SIGKILL reaches no handler of the suite: Linux ends the part."""
    code = (
        "import sys, time; sys.path.insert(0, 'benchmarks'); import gpu_suite; from pathlib import Path;"
        f"part = gpu_suite.Part('x', ('-c', {STUBBORN!r}), 60);"
        f"gpu_suite._wait(part, part.argv(Path('x'), 'cpu', 60), 60, Path({str(tmp_path / LOG)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    end = time.monotonic() + PATIENCE
    while not ((tmp_path / LOG).exists() and pids_in(tmp_path / LOG)) and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    part, child = pids_in(tmp_path / LOG)
    while lives(part) and time.monotonic() < end:
        time.sleep(0.05)
    assert not lives(part)
    psutil.Process(child).kill()


# -- going on --


def test_going_on_repeats_what_failed_last(tmp_path, quick):
    """Finished parts do not run again; those that were cut off or not run come before those that failed."""
    parts = [script(name, f"print('ran {name}')") for name in ("failed", "finished", "cut", "new")]
    journal = Journal(tmp_path / LINES)
    for name, ended in (("failed", "exit code 1: x"), ("finished", "well"), ("cut", "cut off after 9 s")):
        journal.write("part began", part=name, command="python")
        journal.write("part ended", part=name, command="python", ended=ended, seconds=9.0)
    results = gpu_suite._run_all(parts, journal, tmp_path / LOG, "cpu", time.monotonic() + 60)
    assert results == [True] * 4
    said = [line for line in (tmp_path / LOG).read_text().splitlines() if line.startswith("ran ")]
    assert said == ["ran cut", "ran new", "ran failed"]


def test_a_killed_part_says_by_what(tmp_path):
    part = script("killed", "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    assert gpu_suite._wait(part, [sys.executable, *part.command], 30, tmp_path / LOG) == "killed by SIGKILL"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_suite_says_how_to_go_on(tmp_path, number):
    """It ends its part, builds the record and leaves no traceback; a second suite may not write there meanwhile."""
    command = python(
        "benchmarks/gpu_suite.py", "--tiny", "--budget", 600, "--parts", "rates", "--out", tmp_path / "out"
    )
    with Launched(command, tmp_path / "log") as launched:
        launched.until(lambda: len(lines_of(tmp_path / "out", "rates")) > 2, "some rates")
        second = subprocess.run([*command, "--continue"], cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 2
        assert "another suite writes there" in second.stderr
        launched.process.send_signal(number)
        ended = launched.wait()
    assert ended.code == 1
    assert "stopped; the same command with --continue goes on" in ended.text
    assert "Traceback" not in ended.text
    assert [*(tmp_path / "out").glob("*.json")]


def test_paths_are_those_of_the_caller(tmp_path):
    """Parts run in the checkout's root, and still write where the suite was told to from elsewhere."""
    command = [sys.executable, ROOT / "benchmarks/gpu_suite.py", "--tiny", "--parts", "operations", "--out", "results"]
    subprocess.run([*command, "--budget", "300"], cwd=tmp_path, capture_output=True, check=True)
    assert lines_of(tmp_path / "results", "row")
    assert len([*(tmp_path / "results").glob("*.json")]) == 1
    assert not (ROOT / "results").exists()


def test_a_record_is_built_from_damaged_lines(tmp_path, capsys):
    """Torn lines are counted, and lines without a suite are a record too."""
    from suite_record import write_record

    lines = tmp_path / LINES
    lines.write_text('{"what": "part ended"}\n{"what": "record", "torn')
    journal = Journal(lines)
    head = records.start("python x", torch.device("cpu"), {"dtype": "fp32", "batch": 1})
    journal.write("record", **head)
    row = dict.fromkeys(records.COLUMNS, "x") | {"contender": "fastdit", "ms_p50": None, "peak_bytes": None}
    journal.write("row", **row)
    record = json.loads(write_record(tmp_path).read_text())
    assert [row["part"] for row in record["rows"]] == ["no part of a suite"]
    assert len(record["rows"][0]["record"]["rows"]) == 1
    assert "1 lines cannot be read and are left out" in capsys.readouterr().out


def test_a_full_disk_is_one_line(monkeypatch):
    """A part of the line fits; the next journal begins a new line after it."""
    journal = Journal("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full: cannot be written .*; make room, then run the same command"):
        journal.write("row")
    with pytest.raises(UserError, match="--journal /dev/null/x: cannot be written"):
        Journal("/dev/null/x")


def test_a_plan_with_runs_left_is_not_finished(tmp_path, quick):
    """The command ends well when its time is spent; what it says remains is done by the next call."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); from journal import Journal; flags = sys.argv;"
        "journal = Journal(flags[flags.index('--journal') + 1]); print('granted', flags[flags.index('--budget') + 1]);"
        "left = [] if any(line['what'] == 'plan' for line in journal.lines) else ['one', 'two'];"
        "journal.write('plan', remaining=left)"
    )
    part, journal = script("plan", code, limit=20.0, paced=True), Journal(tmp_path / LINES)
    for result in (False, True):
        assert gpu_suite._run_all([part], journal, tmp_path / LOG, "cpu", time.monotonic() + 60) == [result]
    assert [line["ended"] for line in lines_of(tmp_path, "part ended")] == ["unfinished: 2 runs remain", "well"]
    assert "granted 20" in (tmp_path / LOG).read_text()


def test_lines_come_from_another_folder(tmp_path):
    """A second machine has only the file that was brought along."""
    (tmp_path / "brought").mkdir()
    Journal(tmp_path / "brought" / LINES).write("suite")
    gpu_suite._bring(str(tmp_path / "brought"), tmp_path / LINES)
    assert read_journal(tmp_path / LINES) == read_journal(tmp_path / "brought" / LINES)
    with pytest.raises(UserError, match="is there already; give another --out"):
        gpu_suite._bring(str(tmp_path / "brought"), tmp_path / LINES)
    gpu_suite._bring("", tmp_path / LINES)
    with pytest.raises(UserError, match="nothing/here holds no measurements; name the earlier call's"):
        gpu_suite._bring("nothing/here", tmp_path / "x")


def test_a_failing_part_keeps_its_log_and_its_last_line(tmp_path):
    part = script("bad", "print('before'); raise SystemExit('no such thing')")
    assert gpu_suite._wait(part, [sys.executable, *part.command], 30, tmp_path / LOG) == "exit code 1: no such thing"
    assert (tmp_path / LOG).read_text().splitlines()[-2:] == ["before", "no such thing"]


# -- tests as a part --

TESTS = """
import os, pathlib, signal, time
import pytest

@pytest.mark.parametrize("k", range(4))
def test_good(k): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_skipped(): pytest.skip("no reason")
@pytest.fixture
def broken(): raise ValueError("the fixture is broken")
def test_error(broken): pass
def test_slow():
    time.sleep(0 if pathlib.Path("fast").exists() else 60)
"""


def run_tests(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "journal_tests", "-p", "no:cacheprovider", "--journal",
            str(folder / LINES), *flags, str(folder / "test_x.py")]  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("-n", "2")])
def test_a_killed_test_run_keeps_every_outcome(tmp_path, flags, monkeypatch):
    """Failing tests are named with their message, the one that was running too; only those run again."""
    from suite_record import suite_lines, suite_record

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    (tmp_path / "test_x.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    process = subprocess.Popen(run_tests(tmp_path, *flags), cwd=tmp_path, process_group=0, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(lines_of(tmp_path, "test")) < 7 and time.monotonic() < end:
        time.sleep(0.05)
    gpu_suite.os.killpg(process.pid, gpu_suite.signal.SIGKILL)
    process.wait()

    began = {"what": "part began", "part": "tests", "command": "python -m pytest"}
    suite = {"what": "suite", "budget": 1, "command": "x"}
    record = suite_record([suite, began, *read_journal(tmp_path / LINES)])
    assert record["versions"]["torch"] == torch.__version__, "the tests' own lines say on what they ran"
    found = record["rows"][0]["record"]
    assert (found["passed"], found["skipped"], found["failed"]) == (4, 1, 2)
    assert [name.rpartition("::")[2] for name in found["unfinished"]] == ["test_slow"]
    text = "\n".join(suite_lines(record))
    assert "test_bad`: AssertionError: one is not two" in text
    assert "test_error`: ValueError: the fixture is broken" in text
    assert "test_slow`: unfinished" in text
    assert "| 4 / 2 / 1 " in text

    (tmp_path / "fast").touch()
    before = len(lines_of(tmp_path, "test"))
    subprocess.run(run_tests(tmp_path, *flags), cwd=tmp_path, stdout=subprocess.DEVNULL, check=False)
    again = [line["id"].rpartition("::")[2] for line in lines_of(tmp_path, "test")[before:]]
    assert sorted(again) == ["test_bad", "test_error", "test_slow"]


# -- what is shown --


def test_the_pages_come_from_the_records(tmp_path):
    from suite_record import SUITE, write_figures

    for name, write in (
        ("benchmarks/RESULTS.md", lambda path: records.write_results(records.RECORDS, path, SUITE)),
        ("README.md", write_figures),
    ):
        copy = tmp_path / "README.md"
        copy.write_text((ROOT / name).read_text())
        write(copy)
        assert copy.read_text() == (ROOT / name).read_text()


def test_parts_and_refusals(monkeypatch, tmp_path):
    names = "loader photos,S/2 against graphs,compile,eager,steps"
    assert [part.name for part in gpu_suite._chosen(gpu_suite.PARTS, names)] == [
        "loader photos", "S/2 against graphs,compile,eager", "steps",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--parts nothing: 'nothing' is unknown; choose of 'steps', "):
        gpu_suite._chosen(gpu_suite.PARTS, "nothing")
    monkeypatch.setattr(gpu_suite, "GPU_DEVICE", tmp_path / "none")
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no NVIDIA GPU; --tiny runs a small suite on the CPU"):
        gpu_suite._suite([])
    (tmp_path / LINES).write_text("{}\n")
    with pytest.raises(UserError, match="holds an earlier call's results; add --continue"):
        gpu_suite._suite(["--tiny", "--out", str(tmp_path)])
    for budget in ("-5", "nan", "30"):
        with pytest.raises(UserError, match="budget"):
            gpu_suite._suite(["--tiny", "--budget", budget, "--out", str(tmp_path / "new")])
    with pytest.raises(UserError, match="--parts: names no part"):
        gpu_suite._suite(["--tiny", "--parts", "", "--out", str(tmp_path / "new")])
    monkeypatch.setattr(gpu_suite, "NEEDED", ("torch", "no_such_module.part"))
    with pytest.raises(UserError, match=r"no_such_module\.part is not installed; docs/offline\.md"):
        gpu_suite._suite(["--tiny"])


def test_without_jsonargparse_one_line_says_so():
    hidden = "import sys; sys.modules['jsonargparse'] = None; sys.path.insert(0, 'benchmarks'); import gpu_suite"
    ended = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert (
        ended.stderr.strip()
        == "error: jsonargparse is not installed; docs/offline.md tells how to install fastdit here"
    )


@pytest.mark.parametrize("part", gpu_suite.PARTS, ids=lambda part: part.name)
def test_every_part_is_a_command_that_parses(part):
    """The flags of each part are known to its benchmark; test files exist; the limit leaves room for a start."""
    import convergence
    import profile_steps
    import rates
    import throughput

    import kernels

    assert part.least < part.limit
    script, *flags = part.command
    if script == "-m":
        paths = [word for word in flags if word.startswith("tests/")]
        assert paths
        assert all((ROOT / path).is_file() for path in paths)
    elif "profile_steps" in script:
        for text in flags:
            profile_steps.Case.parse(text).config("cpu", "fp32", 32)
    elif "throughput" in script:
        own, dotted = throughput.split_flags([*flags, "--device", "cpu"])
        args = throughput._parser().parse(own)
        throughput._against(args.against)
        throughput._config(args, dotted)
    else:
        parser = {"rates": rates, "kernels": kernels, "convergence": convergence}[Path(script).stem]._parser()
        parser.parse([*flags, "--device", "cpu"])
