"""Kill the small suite in the middle of each of its parts, and check that nothing measured is lost.

    python benchmarks/rehearse_kills.py FOLDER        needs no GPU; a part of `rehearsal.sh`

For each part the suite is started with that part alone. When its first measurement is in the journal, the suite gets a
SIGKILL. Then the record is built from what is left, and `--continue` finishes the part. What was measured before the
kill must still be there, and must not be measured twice. Imports only the standard library and psutil.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from gpu_suite import LINES, ROOT, TINY, Part
from journal import read_journal

PATIENCE = 300.0  # seconds for a part's first measurement, and for its end
NO_MEASUREMENTS = (
    "suite",
    "part began",
    "part ended",
    "record",
    "device",
    "machine",
    "test began",
    "tests ended",
    "timed plan",
)
# Fields that name a measurement, of those that a continued part does not repeat.
NAMED = {"step": "asked", "profile": "asked", "rates": "piece", "operation": "name", "run": "key"}


class Failed(Exception):
    """A kill lost something, or a continued part repeated it."""


def main() -> None:
    """Rehearse all parts, print a line for each, and leave the process: 0, or 1 if one of them lost something."""
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/rehearse_kills.py FOLDER")
    failed = 0
    for part in (part for part in TINY if not part.needs):
        try:
            print(f"{part.name}: {rehearse(part, Path(sys.argv[1]))}", flush=True)
        except Failed as error:
            failed += 1
            print(f"{part.name}: FAILED: {error}", flush=True)
    sys.exit(bool(failed))


def rehearse(part: Part, folder: Path) -> str:
    """Kill the suite in a part, then continue it; return what happened. Raises Failed."""
    out = folder / re.sub(r"\W+", "-", part.name)
    suite = [sys.executable, "benchmarks/gpu_suite.py", "--tiny", "--budget", "590", "--out", str(out)]
    before, seconds = kill_in_the_middle([*suite, "--parts", part.name], out)
    if not before:
        raise Failed("no measurement was left")
    _run([*suite[:2], "--record", "--out", str(out)], "the record could not be built from what was left")
    _run([*suite, "--parts", part.name, "--continue"], "the part did not end well when it was continued")

    lines = read_journal(out / LINES)
    after = _measurements(lines)
    if after[: len(before)] != before:
        raise Failed("a measurement from before the kill is gone")
    repeated = {key for key in map(_key, after[len(before) :]) if key and key in {_key(line) for line in before}}
    if repeated:
        raise Failed(f"measured twice: {sorted(repeated)}")
    if len([*out.iterdir()]) > 8:
        raise Failed(f"{len([*out.iterdir()])} files are left in {out}, more than 8")
    return f"killed after {seconds:.0f} s with {len(before)} measurements, {len(after)} at the end"


def kill_in_the_middle(command: list[str], out: Path) -> tuple[list[dict], float]:
    """Start the suite and SIGKILL it after its first measurement. Return the measurements left, and the seconds."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not _measurements(read_journal(out / LINES)):
        if process.poll() is not None or time.monotonic() - began > PATIENCE:
            raise Failed(f"nothing was measured in {time.monotonic() - began:.0f} s")
        time.sleep(0.02)
    own = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    seconds = time.monotonic() - began
    # The part gets its own SIGKILL from Linux, and its workers end when they miss it.
    _, left = psutil.wait_procs(own, timeout=30)
    if left:
        raise Failed(f"processes outlived the suite by 30 s: {[' '.join(child.cmdline())[:80] for child in left]}")
    return _measurements(read_journal(out / LINES)), seconds


def _measurements(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["what"] not in NO_MEASUREMENTS]


def _key(line: dict) -> tuple[str, str] | None:
    """Return what names a measurement that must not be repeated: what failed, or is drawn round by round, may be."""
    if line["what"] == "test" and line["outcome"] in ("passed", "skipped"):
        return "test", line["id"]
    field = NAMED.get(line["what"])
    return (line["what"], str(line[field])) if field in line and "failed" not in line else None


def _run(command: list[str], problem: str) -> None:
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)
    if ended.returncode:
        raise Failed(f"{problem}: {(ended.stderr or ended.stdout).strip()[-500:]}")


if __name__ == "__main__":
    main()
