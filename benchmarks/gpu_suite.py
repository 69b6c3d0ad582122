"""Test and measure fastdit on one GPU within a time budget: `python benchmarks/gpu_suite.py --budget 520`.

Parts run one after another, the most telling first, each a process of its own with a time limit. All results go to one
folder as they come:

    measurements.jsonl      one line for each measurement, appended the moment it exists, by all parts
    log.txt                 what the parts printed, under a heading for each
    DATE-GPU-COMMIT.json    the record, built from the lines; `--record` builds it again, also after a SIGKILL

`--continue` goes on where an earlier call stopped: finished parts and finished measurements are not repeated. This file
imports no torch, so that it always keeps time.
"""

import ctypes
import fcntl
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

try:
    from journal import Journal, read_journal

    from fastdit.command_line import OneLineParser
    from fastdit.errors import UserError, run_command
except ModuleNotFoundError as missing:
    print(f"error: {missing.name} is not installed; docs/offline.md tells how to install fastdit here", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).parents[1]
OUT = ROOT / "runs" / "gpu_suite"
LINES, LOG = "measurements.jsonl", "log.txt"
GPU_DEVICE = Path("/dev/nvidiactl")
NEEDED = ("torch", "deepspeed", "fastdit.kernels")
LEAST_BUDGET = 45.0  # seconds: the reserve, and a start
RESERVE = 25.0  # seconds of the budget kept for ending the last part and building the record
GRACE, PATIENCE = 5.0, 5.0  # seconds from a part's SIGTERM to its SIGKILL, and from that to giving it up
WELL, CUT_OFF = "well", "cut off"
KERNEL_TESTS = (
    "adaln", "attention", "bias_gradients", "denoise", "fp8", "linear", "philox", "prototypes", "rotary", "structure",
    "tokens", "adamw_ema_native", "adamw_ema_bf16", "native_choice", "optimizer", "apex_adam",
)  # fmt: skip
RUN_TESTS = ("graphs", "waits", "cache")


@dataclass(frozen=True)
class Part:
    """One process of the suite.

    Args:
        command: what Python runs, without --journal and --device.
        limit: seconds after which it is cut off.
        least: seconds below which it is not worth starting.
        needs: modules without which it cannot run.
        paced: it takes --budget, the seconds granted, and stops by itself when the next run does not fit in them. Its
            last "plan" line names what remains.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float = 20.0
    needs: tuple[str, ...] = ()
    paced: bool = False

    @property
    def tests(self) -> bool:
        return self.command[:2] == ("-m", "pytest")

    def argv(self, journal: Path, device: str, limit: float) -> list[str]:
        """Return the command with the flags that all parts take, for `limit` seconds."""
        own = ["--journal", str(journal)]
        if self.tests:
            own = ["-p", "journal_tests", *own]
        else:
            own += ["--device", device]
        if self.paced:
            own += ["--budget", f"{limit - GRACE:.0f}"]
        return [sys.executable, *self.command, *own]


def _tests(name: str, files: tuple[str, ...], limit: float, *flags: str) -> Part:
    paths = (str(next(ROOT.glob(f"tests/*/test_{file}.py")).relative_to(ROOT)) for file in files)
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--dist", "worksteal", *flags, *paths)
    return Part(name, command, limit)


def _profile(name: str, limit: float, *cases: str) -> Part:
    return Part(name, ("benchmarks/profile_steps.py", *cases), limit)


def _against(model: str, batch: int, contenders: str, limit: float, least: float = 40.0, more: str = "") -> Part:
    flags = f"--model {model} --batch {batch} --against {contenders} --steps 15 {more}"
    return Part(f"{model} against {contenders}", ("benchmarks/throughput.py", *flags.split()), limit, least)


def _loader(data: str, size: int, channels: int, batch: int) -> Part:
    flags = f"--loader_only --data {data} --size {size} --channels {channels} --batch {batch} --data.threads 8"
    return Part(
        f"loader {data}", ("benchmarks/throughput.py", *flags.split(), "--steps", "5"), 60, needs=("nvidia.dali",)
    )


# Batch 256 is the published setting. XL/2 in plain PyTorch fits 80 GB at 64 only. The convergence part takes what time
# there is, about 570 s in all; the parts behind it wait for a call in which it ends.
PARTS = (
    _profile("steps", 150, "XL/2 dit 256", "XL/2 dit 256 --precision fp8", "S/2 dit 256 graphs", "B/2 dit 256 graphs",
             "B/2 dit 256 graphs --precision fp8", "S/2 dit 256", "B/2 dit 256"),
    Part("rates", ("benchmarks/rates.py", "--batch", "256"), 100),
    _tests("kernel tests", KERNEL_TESTS, 130, "-n", "14"),
    _against("S/2", 256, "graphs,compile,eager", 110),
    _against("B/2", 256, "graphs,compile,eager", 110),
    _profile("methods", 120, "S/2 sd_dit 256 graphs", "S/2 sadm 256 graphs", "XL/2 sd_dit 128", "XL/2 sadm 128",
             "B/2 sd_dit 256 graphs", "B/2 sadm 256 graphs", "B/2 sd_dit+sadm 128"),
    _against("XL/2", 64, "eager,compile", 220, 60.0),
    _tests("run tests", RUN_TESTS, 110, "-n", "4", "-m", "gpu"),
    _profile("other batches", 70, "S/2 dit 1024 graphs", "XL/2 dit 32", "XL/2 dit 32 graphs"),
    Part("launch options", ("benchmarks/rates.py", "--batch", "256", "--sweep"), 300),
    Part("convergence", ("benchmarks/convergence.py",), 600, 120.0, paced=True),
    _loader("latents", 32, 4, 256),
    _loader("photos", 256, 3, 128),
    Part("operations", ("benchmarks/kernels.py", "--sizes", "XL,S,B"), 240),
)  # fmt: skip
_TINY = "--model.depth 1 --model.width 32 --model.heads 2"
_TWO_BLOCKS = _TINY.replace("depth 1", "depth 2")  # an encoder and a decoder
TINY = (
    _profile("steps", 120, f"S/4 dit 2 {_TINY}", f"S/4 sd_dit 2 {_TINY} --sd_dit.decoder_depth 1"),
    Part("rates", ("benchmarks/rates.py", "--batch", "2", "--sizes", "S"), 120),
    _tests("kernel tests", ("tokens",), 90, "-n", "2", "-k", "1-"),
    _against("S/4", 2, "eager", 120, more=f"--size 16 {_TINY}"),
    Part("operations", ("benchmarks/kernels.py", "--quick", "--sizes", "S", "--ops", "adaln"), 60),
    Part(
        "convergence",
        (
            "benchmarks/convergence.py",
            "--patch",
            "7",
            "--batch",
            "8",
            f"--common={_TWO_BLOCKS}",
            "--rates",
            "1e-3,4e-3",
            "--rate_seconds",
            "0.3",
            "--contenders",
            "sd_dit",
            "--seconds",
            "0.5",
            "--seeds",
            "0",
            "--samples",
            "16",
            "--rate_samples",
            "16",
            "--sample_steps",
            "2",
            "--threads",
            "1",
        ),
        200,
        paced=True,
    ),
    Part("without a module", ("-c", "pass"), 10, needs=("no_such_module",)),
)


def main(argv: list[str] | None = None) -> None:
    """Leave the process: 0 if all parts ended well, 1 if not, 2 after a UserError."""
    run_command(_suite, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="gpu_suite.py", description="Test and measure fastdit on this machine's GPU.")
    switch = {"type": bool, "default": False, "nargs": "?", "const": True}
    parser.add_argument(
        "--budget", type=float, default=520.0, help="seconds after which the suite has ended; 25 are kept for ending"
    )
    parser.add_argument("--out", type=str, default=str(OUT), help="folder of the results")
    parser.add_argument(
        "--continue",
        type=str | None,
        default=None,
        nargs="?",
        const="",
        help=f"go on from an earlier call's {LINES}; without a value, from the one in --out",
    )
    parser.add_argument("--parts", type=str | None, default=None, help="only these, names with commas between")
    parser.add_argument("--tiny", **switch, help="a small suite on the CPU: does everything run")
    parser.add_argument("--list", **switch, help="only show the parts")
    parser.add_argument("--record", **switch, help="only build the record from the lines in --out")
    parser.add_argument("--readme", **switch, help="only write all records into RESULTS.md and README.md")
    return parser


def _suite(argv: list[str]) -> None:
    began = time.monotonic()
    args = _parser().parse(argv)
    parts = _chosen(TINY if args.tiny else PARTS, args.parts)
    if args.list:
        return print("\n".join(f"{part.name}: at most {part.limit:.0f} s: python {_shown(part)}" for part in parts))
    if args.record or args.readme:
        import suite_record  # with torch

        return suite_record.write_pages() if args.readme else suite_record.write_record(Path(args.out))
    for module in NEEDED:
        if not _installed(module):
            raise UserError(f"{module} is not installed; docs/offline.md tells how to install fastdit on this machine")
    if not (args.tiny or GPU_DEVICE.exists() or shutil.which("nvidia-smi")):
        raise UserError("gpu_suite.py: this machine has no NVIDIA GPU; --tiny runs a small suite on the CPU")

    if not LEAST_BUDGET <= args.budget < float("inf"):
        raise UserError(f"--budget {args.budget:g}: must be at least {LEAST_BUDGET:.0f} seconds")
    if not parts:
        raise UserError("--parts: names no part; leave it out to run all")

    # From here on one suite owns the folder, until this process ends.
    out = _folder(args.out)
    lock = _lock(out)
    earlier = getattr(args, "continue")
    lines = out / LINES
    if earlier is None:
        if lines.exists():
            raise UserError(f"{lines}: holds an earlier call's results; add --continue, or give another --out")
    else:
        _bring(earlier, lines)
    journal = Journal(lines)
    command = shlex.join(["python", "benchmarks/gpu_suite.py", *argv])
    journal.write("suite", command=command, budget=args.budget, parts=[part.name for part in parts])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ask the suite to stop
    try:
        ended = _run_all(parts, journal, out / LOG, "cpu" if args.tiny else "cuda", began + args.budget)
    except KeyboardInterrupt:
        ended = [False]
        print("stopped; the same command with --continue goes on", flush=True)
    print(f"lines: {lines}\nlog: {out / LOG}", flush=True)
    _build_record(out, began + args.budget - time.monotonic() - 1)
    lock.close()
    if not all(ended):
        sys.exit(1)


def _lock(out: Path):
    """Return the log, locked against another suite. Raises UserError where one has locked it."""
    log = (out / LOG).open("a")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--out {out}: another suite writes there; wait for its end, or give another --out") from None
    return log


def _chosen(parts: tuple[Part, ...], names: str | None) -> list[Part]:
    if names is None:
        return list(parts)
    by_name = {part.name: part for part in parts}
    found, rest = [], names
    while rest.strip():  # names hold commas themselves: the longest that fits is meant
        fitting = [name for name in by_name if rest == name or rest.startswith(f"{name},")]
        if not fitting:
            raise UserError(f"--parts {names}: {rest!r} is unknown; choose of {', '.join(map(repr, by_name))}")
        found.append(by_name[max(fitting, key=len)])
        rest = rest[len(found[-1].name) + 1 :]
    return found


def _shown(part: Part) -> str:
    return shlex.join(part.command)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package it is in
        return False


def _folder(path: str) -> Path:
    """Return the folder, made if needed. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / LOG).open("a").close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); give a folder") from None
    return Path(path).resolve()  # parts run in the checkout's root


def _bring(earlier: str, lines: Path) -> None:
    """Put an earlier call's lines into this call's file. Raises UserError where there are none."""
    path = Path(earlier) if earlier else lines
    path = path / LINES if path.is_dir() else path
    if not read_journal(path):
        raise UserError(f"--continue: {path} holds no measurements; name the earlier call's {LINES}, or leave it out")
    if path.resolve() != lines.resolve():
        if lines.exists():
            raise UserError(f"{lines}: is there already; give another --out, or --continue without a value")
        shutil.copyfile(path, lines)


def _run_all(parts: list[Part], journal: Journal, log: Path, device: str, end: float) -> list[bool]:
    """Run what is left of the parts until the budget is spent. Return which ended well, now or in an earlier call."""
    ends = [line for line in read_journal(journal.path) if line["what"] == "part ended" and "ended" in line]
    last = {line.get("part"): line["ended"] for line in ends}
    # What failed of itself comes last: it would probably fail again.
    failed = [part for part in parts if last.get(part.name, WELL).startswith(("exit code", "killed"))]
    results = [True for part in parts if last.get(part.name) == WELL]
    for part in [part for part in parts if part not in failed and last.get(part.name) != WELL] + failed:
        missing = [module for module in part.needs if not _installed(module)]
        limit = min(part.limit, end - RESERVE - time.monotonic())
        begun = time.monotonic()
        if missing:
            ended = f"not run: {missing[0]} is not installed"
        elif limit < min(part.least, part.limit):
            ended = f"not run: it needs {min(part.least, part.limit):.0f} s, and {max(limit, 0):.0f} s were left"
        else:
            journal.write("part began", part=part.name, command=f"python {_shown(part)}", limit=round(limit, 1))
            ended = _wait(part, part.argv(journal.path, device, limit), limit, log)
            if ended == WELL and part.paced:
                ended = _remaining(journal.path)
        seconds = round(time.monotonic() - begun, 1)
        journal.write("part ended", part=part.name, command=f"python {_shown(part)}", ended=ended, seconds=seconds)
        print(f"{part.name}: {ended}, {seconds:.0f} s", flush=True)
        results.append(ended == WELL or bool(missing))
    return results


def _remaining(lines: Path) -> str:
    """Return how a part that paces itself has ended: WELL once its plan is finished."""
    found = read_journal(lines)
    begin = max(place for place, line in enumerate(found) if line["what"] == "part began")
    plans = [line for line in found[begin:] if line["what"] == "plan"]
    failed = [line["failed"] for line in found[begin:] if line["what"] == "run failed"]
    remaining = plans[-1]["remaining"] if plans else []
    if not remaining:
        return WELL
    return f"unfinished: {len(remaining)} runs remain" + (
        f", {len(failed)} failed: {failed[-1][:300]}" if failed else ""
    )


def _wait(part: Part, command: list[str], limit: float, log: Path) -> str:
    """Run a part with its output in the log, and leave no process of it. Return WELL, or what was wrong."""
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("ab") as file:
        file.write(f"\n=== {part.name}: {shlex.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            process_group=0, preexec_fn=_die_with_parent,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            gone = _end(process)
    if code is None:
        return f"{CUT_OFF} after {limit:.0f} s" + ("" if gone else ", and could not be ended")
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return WELL if code == 0 else f"exit code {code}: {_last_words(log, begin)}"


def _die_with_parent() -> None:
    """In a part's process, before it starts: ask Linux to kill it when the suite is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen) -> bool:
    """End a part's process group, and return whether it is gone: a process that waits for a driver may not be."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, PATIENCE)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return True
        except subprocess.TimeoutExpired:
            continue
    return process.poll() is not None


def _last_words(log: Path, begin: int) -> str:
    """Return the last line that a part printed, or for pytest its summary."""
    with log.open("rb") as file:
        file.seek(begin)
        said = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return re.sub(r"\s+", " ", said[-1])[:500] if said else "it said nothing"


def _build_record(out: Path, seconds: float) -> None:
    """Build the record in a process with a time limit; the lines are there in any case."""
    command = [sys.executable, __file__, "--record", "--out", str(out)]
    try:
        subprocess.run(command, timeout=max(seconds, 1.0), check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        print(f"The record was not built. {shlex.join(['python', *command[1:]])} builds it from the lines.", flush=True)


if __name__ == "__main__":
    main()
