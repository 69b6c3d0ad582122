"""All that a GPU can say about fastdit in ten minutes: `python benchmarks/gpu_suite.py`.

Parts run one after another as processes of their own, each with a time limit: the kernels' tests, whole steps of each
size and method against eager and compiled PyTorch, the operations with the optimizer, the loader. The cheapest and most
telling come first. Each part's end is written at once into one record, so that being cut off loses nothing.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import record as records
import torch

from fastdit.command_line import OneLineParser
from fastdit.errors import UserError, run_command

ROOT = Path(__file__).parents[1]
TESTS = ("adaln", "attention", "denoise", "linear", "prototypes", "rotary", "structure", "tokens",
         "adamw_ema_native", "native_choice", "optimizer", "apex_adam")  # fmt: skip
GRACE = 10.0  # seconds between a part's SIGTERM and its SIGKILL


class Part(NamedTuple):
    """A command, without its --json and --device, and its time limit in seconds."""

    name: str
    command: str
    limit: float


def _step(model: str, method: str, batch: int, limit: float, against: str = "", more: str = "") -> Part:
    flags = f"--model {model} --method {method} --batch {batch}" + (f" --against {against}" if against else "")
    return Part(f"{method} {model}", f"benchmarks/throughput.py {flags} {more}".strip(), limit)


def _loader(data: str, size: int, channels: int, batch: int, limit: float) -> Part:
    flags = f"--loader_only --data {data} --size {size} --channels {channels} --batch {batch} --data.threads 8"
    return Part(f"loader {data}", f"benchmarks/throughput.py {flags}", limit)


# Batches: what one GPU of 80 GB holds beside all contenders of a part, in bf16.
PARTS = (
    Part("tests", "-m pytest -q " + " ".join(f"tests/test_{name}.py" for name in TESTS), 180),
    _step("XL/2", "dit", 32, 150, "eager,compile", "--scale_to 8,64,1024"),
    _step("S/2", "sd_dit", 256, 90, "eager,compile,graphs"),
    Part("operations XL", "benchmarks/kernels.py --sizes XL", 120),
    _step("XL/2", "sd_dit", 32, 60),
    _step("XL/2", "sadm", 32, 60),
    _step("B/2", "dit", 32, 90, "eager,compile,graphs"),
    _step("B/2", "sd_dit", 128, 90, "eager,compile"),
    _step("B/2", "sadm", 128, 45),
    _step("S/2", "sadm", 256, 45),
    _step("B/2", "sd_dit+sadm", 128, 45),
    Part("run tests", "-m pytest -q -m gpu tests/test_graphs.py tests/test_waits.py tests/test_cache.py", 120),
    _loader("photos", 256, 3, 128, 90),
    _loader("latents", 32, 4, 256, 60),
    _loader("latents8", 32, 4, 256, 60),
    _loader("fashion_mnist", 28, 1, 256, 45),
    Part("operations S, B", "benchmarks/kernels.py --sizes S,B", 180),
)
TINY_STEP = "--size 16 --model.depth 1 --model.width 32 --model.heads 2 --steps 1"
TINY = (
    Part("tests", "-m pytest -q tests/test_tokens.py -k 1-", 60),
    Part("dit S/4", f"benchmarks/throughput.py --model S/4 --method dit --batch 2 --against eager {TINY_STEP}", 120),
    Part("operations S", "benchmarks/kernels.py --quick --sizes S --ops adaln", 60),
)


def main(argv: list[str] | None = None) -> None:
    """Leaves the process: 0 if all parts ended well, 1 if not, 2 after a UserError."""
    run_command(_suite, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="gpu_suite.py", description="Test and measure fastdit on this machine's GPU.")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all parts")
    parser.add_argument("--parts", type=str | None, default=None, help="only these, names with commas between")
    parser.add_argument("--out", type=str, default=str(records.RECORDS), help="folder of the record")
    parser.add_argument("--tiny", type=bool, default=False, nargs="?", const=True, help="on a CPU: does it run at all")
    parser.add_argument("--list", type=bool, default=False, nargs="?", const=True, help="only show the parts")
    parser.add_argument(
        "--readme", type=bool, default=False, nargs="?", const=True, help="only: put all records into README.md"
    )
    return parser


def _suite(argv: list[str]) -> None:
    args = _parser().parse(argv)
    if args.readme:
        return _write_readme()
    parts = _chosen(TINY if args.tiny else PARTS, args.parts)
    if args.list:
        return print("\n".join(f"{part.name}: python {part.command}, at most {part.limit:.0f} s" for part in parts))
    if not (args.tiny or torch.cuda.is_available()):
        raise UserError("gpu_suite.py: torch sees no CUDA device here; --tiny runs a small suite on the CPU")
    device = torch.device("cpu" if args.tiny else "cuda")
    settings = {"dtype": "fp32" if args.tiny else "bf16", "batch": "by part", "budget_seconds": args.budget}
    record = records.start(shlex.join(["python", "benchmarks/gpu_suite.py", *argv]), device, settings, "suite")
    where = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    path = records.writable(
        "out", str(Path(args.out) / f"{record['date'][:10]}-{where}-{record['versions']['commit']}.json")
    )
    end = time.monotonic() + args.budget
    for part in parts:
        row = _run(part, device.type, min(part.limit, end - time.monotonic()))
        record["rows"].append(row)
        records.write_json(record, path)
        print(f"{part.name}: {row['ended']}, {row['seconds']:.0f} s", flush=True)
    print(f"json: {path}")
    if any(row["ended"] != "well" for row in record["rows"]):
        sys.exit(1)


def _chosen(parts: tuple[Part, ...], names: str | None) -> list[Part]:
    if names is None:
        return list(parts)
    by_name = {part.name: part for part in parts}
    wanted = re.split(r",(?! )", names)
    for name in wanted:
        if name not in by_name:
            raise UserError(f"--parts {names}: {name!r} is unknown; choose of {', '.join(map(repr, by_name))}")
    return [by_name[name] for name in wanted]


def _run(part: Part, device: str, limit: float) -> dict:
    """The row of a part: how it ended, and its own record as far as that was written."""
    row = {"part": part.name, "command": f"python {part.command}", "limit": part.limit, "seconds": 0.0}
    if limit <= 0:
        return row | {"ended": "not run: the budget was spent", "record": None}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record"
        tests = part.command.startswith("-m pytest")
        own = ["--junitxml", file] if tests else ["--json", file, "--device", device]
        begun = time.monotonic()
        ended = _wait([sys.executable, *shlex.split(part.command), *map(str, own)], limit)
        row |= {"seconds": round(time.monotonic() - begun, 1), "ended": ended}
        found = file.read_text() if file.exists() else ""
    if tests:
        return row | {"record": _counts(found)}
    return row | {"record": json.loads(found) if found else None}


def _wait(command: list[str], limit: float) -> str:
    """Run a command in a process group of its own, which is gone afterwards. Returns "well", or what was wrong."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        log.seek(0)
        said = log.read().strip().splitlines()
    if code is None:
        return f"cut off after {limit:.0f} s"
    return "well" if code == 0 else f"exit code {code}: {said[-1][:200] if said else 'it said nothing'}"


def _end(process: subprocess.Popen) -> None:
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _counts(junit: str) -> dict | None:
    """Of tests by how they ended."""
    if not junit:
        return None
    suite = ElementTree.fromstring(junit).find("testsuite")
    found = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    return found | {"passed": found["tests"] - found["failures"] - found["errors"] - found["skipped"]}


def lines(record: dict) -> list[str]:
    """A Markdown table of the parts; the figures themselves stand in the other sections."""
    cells = [("part", "ended", "seconds", "tests passed / failed / skipped")]
    for row in record["rows"]:
        counts = row["record"] if row["command"].startswith("python -m pytest") else None
        tests = ""
        if counts:
            tests = f"{counts['passed']} / {counts['failures'] + counts['errors']} / {counts['skipped']}"
        cells.append((row["part"], row["ended"], f"{row['seconds']:.0f}", tests))
    return records.aligned(cells)


FIGURES = ("<!-- figures: begin -->\n", "<!-- figures: end -->\n")
SUITE = records.Section("suite", ("<!-- suite: begin -->\n", "<!-- suite: end -->\n"), lines)


def write_figures(readme: Path) -> None:
    """Put a line for each measured step into the project's own README. Raises UserError."""
    from step_tables import figures

    found = records.gpus_first(records.records_of("throughput"))
    missing = [] if any(record["kind"] == "cuda" for record in found) else ["NVIDIA GPUs: not measured.", ""]
    records.put_between(FIGURES, "\n".join([*missing, *figures(found), ""]), readme)


def _write_readme() -> None:
    """Put every benchmark's records, those of suites too, into the READMEs."""
    from convergence_tables import CONVERGENCE
    from loaders import LOADER
    from step_tables import THROUGHPUT

    write_figures(ROOT / "README.md")
    records.write_charts(CONVERGENCE)
    for section in (SUITE, records.KERNELS, THROUGHPUT, LOADER, CONVERGENCE):
        records.write_readme(section=section)


if __name__ == "__main__":
    main()
