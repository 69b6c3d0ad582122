"""Measure what this card does with the pieces of a DiT step at real shapes: `python benchmarks/rates.py`.

    python benchmarks/rates.py --batch 256 --sizes S,B,XL --journal rates.jsonl --json rates.json
    python benchmarks/step_model.py --rates rates.jsonl

The most telling pieces come first: the two ceilings (the rates of a large copy and of a large GEMM), a block's GEMMs
in bf16 and fp8, attention by backend with the kernels that ran, fastdit's kernels, the optimizer's pass, and PyTorch's
operators in the step. `--sweep` adds launch options of the kernels, which takes minutes of compiling for each size.
`rate_pieces.py` defines the pieces.

Each measurement is one line of the journal, written at once. A killed run continues: pieces that the journal holds are
not measured again. A piece that raises is a line with its error. On a CPU the same code runs at tiny shapes, Triton's
kernels in its interpreter, and shows only that every piece works.
"""

import gc
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import record as records
import torch
from journal import Journal
from timing import Quantiles, quantiles, quiet_profiler
from torch.profiler import ProfilerActivity, profile

from fastdit.command_line import OneLineParser
from fastdit.errors import UserError, run_command

SIZES = ("S", "B", "XL")
BATCH = {"cuda": 256, "cpu": 2}
DRY_CACHE = 2500  # bytes of the dry run's imagined cache, so that some pieces take several sets of inputs
CYCLES = 2e9  # a second, of a GPU's clock at its highest
COMMAND = "rates"  # `what` of a measurement's line, and the benchmark's name in records


class Timer:
    """Times single calls on one device.

    Calls take several sets of inputs in turn, which together are larger than the last cache, so none finds its inputs
    there. On a GPU a call's time is that between two CUDA events. The GPU waits while the host enqueues all calls, so
    the time is the GPU's own.
    """

    def __init__(self, device: torch.device):
        self.device, self.gpu = device, device.type == "cuda"
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size if self.gpu else DRY_CACHE

    def sets_for(self, size: int) -> int:
        """Return how many sets of inputs of `size` bytes fill four times the last cache, at most 64."""
        return min(max(1, -(-4 * self.cache // max(size, 1))), 64)

    def measure(self, runs: list[Callable[[], object]]) -> Quantiles:
        """Return the quantiles of single calls, which take `runs` in turn."""
        first = self._wall(runs[0])  # compiles or chooses a kernel
        if not self.gpu:
            return quantiles([self._wall(runs[index % len(runs)]) for index in range(1 if first > 200 else 2)])

        # Estimate what a call takes the GPU and the host.
        runs[-1]()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for index in range(2):
            runs[index % len(runs)]()
        host = (time.perf_counter() - began) / 2
        torch.cuda.synchronize()
        total = (time.perf_counter() - began) / 2
        calls = int(min(max(0.06 / total, 10), 30))

        # Let the GPU wait until the host has enqueued everything.
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda._sleep(int(CYCLES * min(1.5 * host * calls + 5e-4, 0.2)))
        for index, (start, stop) in enumerate(marks):
            start.record()
            runs[index % len(runs)]()
            stop.record()
        torch.cuda.synchronize()
        return quantiles([start.elapsed_time(stop) for start, stop in marks])

    def kernels(self, run: Callable[[], object]) -> str:
        """Return the names of the kernels (on a CPU, operators) that take most of a call's time, the longest first."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.gpu else [])]
        with quiet_profiler(), profile(activities=activities) as profiler:
            run()
            self.wait()
        times: Counter = Counter()
        if self.gpu:
            for event in profiler.profiler.kineto_results.events():
                if str(event.device_type()).endswith("CUDA") and not event.is_user_annotation():
                    times[event.name()] += event.duration_ns()
        else:
            times.update({event.key: event.self_cpu_time_total for event in profiler.key_averages()})
        shown = [name[:160] for name, taken in times.most_common(4) if taken > 0.05 * times.total()]
        return " + ".join(shown) or "none"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give cached memory back to the device."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def _wall(self, run: Callable[[], object]) -> float:
        """Return the host's milliseconds for one call."""
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3


class Runner:
    """Measures pieces that the journal does not hold yet, and writes a line for each."""

    def __init__(self, journal: Journal, timer: Timer):
        self.journal, self.timer = journal, timer
        self.lines = {line["piece"]: line for line in _measurements(journal.lines) if _is_final(line)}
        self.copy_rate: float | None = None  # GB/s

    def take(self, piece) -> dict:
        """Return the line of a piece, from the journal or measured now. Raises UserError when the GPU is lost."""
        if piece.name in self.lines:
            return self.lines[piece.name]
        head = {"piece": piece.name, "operation": piece.operation, "size": piece.size, "batch": piece.batch}
        try:
            fields = self._measure(piece)
        except Exception as error:  # a result, not the end of the run
            fields = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"}
        if "failed" in fields:
            try:
                self.timer.free()
                self.timer.wait()
            except RuntimeError:  # an illegal access leaves the process without a usable GPU
                self.journal.write(COMMAND, **head, **fields, fatal=True)
                raise UserError(
                    f"{piece.name}: broke the GPU's context ({fields['failed'][:300]}); start again with the same "
                    "--journal to go on with the next piece"
                ) from None
        line = self.journal.write(COMMAND, **head, **fields)
        self.lines[piece.name] = line
        print(_sentence(line), flush=True)
        return line

    def _measure(self, piece) -> dict:
        with torch.no_grad():
            runs = [piece.make() for _ in range(self.timer.sets_for(piece.bytes))]
            times = self.timer.measure(runs)
            fields = {"ms_p20": times.p20, "ms_p50": times.p50, "ms_p80": times.p80, "calls": times.rounds}
            fields["sets"] = len(runs)
            if piece.flops:
                fields["tflops"] = float(f"{piece.flops / times.p50 / 1e9:.6g}")
            else:
                rate = piece.bytes / times.p50 / 1e6
                fields["gb_per_s"] = float(f"{rate:.6g}")
                if self.copy_rate:
                    fields["share_of_copy"] = round(rate / self.copy_rate, 6)
            if piece.ran:
                fields["ran"] = piece.ran
            if piece.profiled:
                try:
                    fields["kernel"] = self.timer.kernels(runs[0])
                except RuntimeError as error:  # a machine may forbid profiling; the times stand
                    fields["kernel"] = f"not profiled: {' '.join(str(error).split())[:200]}"
        return fields


def main(argv: list[str] | None = None) -> None:
    """Run the command and leave the process: 0, or 2 after a UserError."""
    run_command(_benchmark, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="rates.py", description="Measure GEMMs, attention and kernels at a DiT step's shapes.")
    parser.add_argument("--batch", type=int | None, default=None, help="images; default: 256, in the dry run 2")
    parser.add_argument("--sizes", type=str, default=",".join(SIZES), help="model sizes, with commas between")
    parser.add_argument(
        "--sweep", type=bool, default=False, nargs="?", const=True, help="race launch options of the kernels too"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu (a dry run) or cuda")
    parser.add_argument("--journal", type=str | None, default=None, help="append to this file, and continue from it")
    parser.add_argument("--json", type=str | None, default=None, help="write the record")
    return parser


def _benchmark(argv: list[str]) -> None:
    args = _parser().parse(argv)
    sizes = list(dict.fromkeys(args.sizes.split(",")))
    for size in sizes:
        if size not in SIZES:
            raise UserError(f"--sizes {args.sizes}: {size!r} is unknown; choose of {','.join(SIZES)}")
    device = _device(args.device)
    batch = BATCH[device.type] if args.batch is None else args.batch
    if batch < 1:
        raise UserError(f"--batch {batch}: must be at least 1")
    journal = Journal(records.writable("journal", args.journal) if args.journal else None)
    file = records.writable("json", args.json) if args.json else None

    # The journal starts with the machine. What an earlier run measured must be of the same card.
    command = shlex.join(["python", "benchmarks/rates.py", *argv])
    settings = {"dtype": "bf16", "batch": batch, "sizes": ",".join(sizes)}
    head = records.start(command, device, settings, COMMAND)
    _check_same_device(journal, head["device"])
    journal.write("record", **head)
    if device.type == "cpu":
        print("a dry run on the CPU at tiny shapes: it shows that every piece works, and its rates mean nothing")
        os.environ.update(TRITON_INTERPRET="1", FASTDIT_KERNELS="triton")
    import rate_pieces as pieces  # only now: this import decides for Triton's compiler or its interpreter
    from rate_pieces_fp8 import fp8_kernels

    # Sections follow each other by what they tell; within one, the sizes.
    timer = Timer(device)
    runner = Runner(journal, timer)
    _ceilings(runner, pieces, head["device"])
    shapes = [pieces.setting_of(size, batch, device) for size in sizes]
    sections = [
        partial(section, s)
        for section in (pieces.gemms, pieces.attention, pieces.fused_kernels, fp8_kernels)
        for s in shapes
    ]
    sections += [partial(pieces.losses, shapes[0]), partial(pieces.optimizer, device)]
    sections += [partial(pieces.torch_operators, s) for s in shapes]
    for section in sections:
        for piece in section():
            runner.take(piece)
        timer.free()
    for s in reversed(shapes) if args.sweep else ():  # the largest model first
        _sweep(runner, [*pieces.fused_kernels(s), *fp8_kernels(s)])
        timer.free()

    lines = journal.lines
    print("\n" + "\n".join(rates_lines(lines)))
    if file:
        records.write_json(rates_record(lines), file)
        print(f"json: {file}")


def _ceilings(runner: Runner, pieces, device_name: str) -> None:
    """Measure the rates of a large copy and a large GEMM, and write the line of the device."""
    copied = runner.take(pieces.copy(runner.timer.device))
    runner.copy_rate = copied.get("gb_per_s")
    multiplied = runner.take(pieces.square_gemm(runner.timer.device))
    if _device_line(runner.journal.lines) is None:
        runner.journal.write(
            "device",
            benchmark=COMMAND,
            name=device_name,
            torch=torch.__version__,
            cudnn=torch.backends.cudnn.version(),
            l2_bytes=runner.timer.cache,
            copy_gb_per_s=runner.copy_rate,
            gemm_tflops=multiplied.get("tflops"),
        )
    runner.timer.free()


def _sweep(runner: Runner, pieces: list) -> None:
    """Race launch options of the kernels among `pieces`."""
    import launch_options  # imports Triton, as rate_pieces does

    launch_options.race(runner.take, pieces, quick=not runner.timer.gpu)


def _device(name: str) -> torch.device:
    """Return the device that `--device` names. Raises UserError."""
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name not in BATCH:
        raise UserError(f"--device {name}: cannot be timed; give auto, cpu or cuda")
    if name == "cuda" and not available:
        raise UserError("--device cuda: torch sees no CUDA device here; --device cpu runs everything at tiny shapes")
    return torch.device(name)


# The journal's lines, and what is made of them


def _measurements(lines: Iterable[dict]) -> Iterator[dict]:
    return (line for line in lines if line["what"] == COMMAND)


def _is_final(line: dict) -> bool:
    """Return whether a piece need not run again: it was measured, or it broke the GPU's context."""
    return "failed" not in line or line.get("fatal", False)


def _device_line(lines: Iterable[dict]) -> dict | None:
    return next((line for line in lines if line["what"] == "device" and line.get("benchmark") == COMMAND), None)


def _check_same_device(journal: Journal, name: str) -> None:
    found = _device_line(journal.lines)
    if found and found["name"] != name:
        raise UserError(
            f"--journal {journal.path}: holds rates of {found['name']}, and this is {name}; give another file"
        )


def latest(lines: Iterable[dict]) -> dict[str, dict]:
    """Return the last line of each piece by its name. A measurement counts more than a failure, also a later one."""
    found: dict[str, dict] = {}
    for line in _measurements(lines):
        if "failed" not in line or "failed" in found.get(line["piece"], line):
            found[line["piece"]] = line
    return found


def rates_record(lines: list[dict]) -> dict:
    """Return the record of a journal's lines: a row for the device, then one for each piece. Raises UserError."""
    heads = [line for line in lines if line["what"] == "record" and line.get("benchmark") == COMMAND]
    if not heads:
        raise UserError("the journal holds no rates; write them with benchmarks/rates.py --journal FILE")
    device = _device_line(lines)
    rows = [*([device] if device else []), *latest(lines).values()]
    head = {key: value for key, value in heads[-1].items() if key not in ("what", "at")}
    return head | {"rows": [{key: value for key, value in row.items() if key != "at"} for row in rows]}


def rates_lines(lines: list[dict]) -> list[str]:
    """Return Markdown tables of a journal's lines: the rates by size, the kernels that ran, and what failed."""
    measured = latest(lines)
    good = [line for line in measured.values() if "failed" not in line]
    device = _device_line(lines)
    text = []
    if device and device["copy_gb_per_s"] and device["gemm_tflops"]:
        text += [
            f"{device['name']}, torch {device['torch']}, L2 cache {device['l2_bytes'] / 2**20:.3g} MiB: a large copy "
            f"moves {device['copy_gb_per_s']:.0f} GB/s, a large bf16 GEMM makes {device['gemm_tflops']:.0f} TFLOP/s. "
            "Shares are of the copy's rate.",
            "",
        ]
    for batch in sorted({line["batch"] for line in good if line["size"]}):
        shown = [line for line in good if line["size"] and line["batch"] == batch]
        sizes = [size for size in SIZES if any(line["size"] == size for line in shown)]
        cells = [(f"batch {batch}: ms, rate", *sizes)]
        for operation in dict.fromkeys(line["operation"] for line in shown):
            by_size = {line["size"]: _cell(line) for line in shown if line["operation"] == operation}
            cells.append((operation, *(by_size.get(size, "") for size in sizes)))
        text += [*records.aligned(cells), ""]
    if others := [line for line in good if not line["size"]]:
        text += [*records.aligned([("any size", "ms, rate"), *((_title(line), _cell(line)) for line in others)]), ""]
    if profiled := [line for line in good if line.get("kernel") and "attention" in line["operation"]]:
        names = [(x["piece"], _short(x["kernel"])) for x in profiled]
        text += [*records.aligned([("kernel that took longest", ""), *names]), ""]
    if failed := [line for line in measured.values() if "failed" in line]:
        text += records.aligned([("failed", ""), *((line["piece"], line["failed"][:200]) for line in failed)])
    return text


RATES = records.Section(
    COMMAND, ("<!-- rates: begin -->\n", "<!-- rates: end -->\n"), lambda record: rates_lines(record["rows"])
)


def _short(kernels: str) -> str:
    """Return the first of the kernels' names, without its template's arguments. The record has all of them."""
    return re.split(r"[<(]", kernels.removeprefix("void ").partition(" + ")[0])[0][:90]


def _title(line: dict) -> str:
    return f"{line['operation']}, batch {line['batch']}" if line["batch"] else line["operation"]


def _cell(line: dict) -> str:
    return f"{line['ms_p50']:.3f}, {_rate(line)}"


def _rate(line: dict) -> str:
    if "tflops" in line:
        return f"{line['tflops']:.3g} TFLOP/s"
    share = f" ({line['share_of_copy']:.0%})" if "share_of_copy" in line else ""
    return f"{line['gb_per_s']:.0f} GB/s{share}"


def _sentence(line: dict) -> str:
    """Return one short line about a measurement."""
    if "failed" in line:
        return f"{line['piece']}: failed: {line['failed'][:160]}"
    kernel = f", {line['kernel'][:90]}" if "kernel" in line else ""
    spread = f"{line['ms_p50']:.3f} ms ({line['ms_p20']:.3f}-{line['ms_p80']:.3f})"
    return f"{line['piece']}: {spread}, {_rate(line)}{kernel}"


if __name__ == "__main__":
    main()
