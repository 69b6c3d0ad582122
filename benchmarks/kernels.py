"""Measure the operations of fastdit.kernels against PyTorch: `python benchmarks/kernels.py --ops adaln --sizes S`.

What is measured is in operations.py, how in measure.py and timing.py, what is kept of it in record.py.
"""

import shlex

import record as records
import torch
from journal import Journal
from measure import BASELINES, Measured, measure
from operations import OPERATIONS, UNSIZED, Case, Setting, Steps
from timing import FULL, QUICK, Clock

from fastdit.command_line import OneLineParser
from fastdit.distributed import keep_memory
from fastdit.errors import UserError, run_command

SIZES = ("S", "B", "XL")
IDENTITY = ("operation", "case", "size", "shape", "phase", "contender")  # of a row


def main(argv: list[str] | None = None) -> None:
    """Leaves the process: 0, or 2 after a UserError."""
    run_command(_benchmark, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="kernels.py", description="Time fastdit's operations against eager and compiled torch.")
    parser.add_argument("--ops", type=str, default=",".join(OPERATIONS), help="operations, with commas between")
    parser.add_argument("--sizes", type=str, default=",".join(SIZES), help="model sizes whose shapes to take")
    parser.add_argument("--against", type=str | None, default=None, help="eager,compile; with --quick eager")
    parser.add_argument("--batch", type=int | None, default=None, help="samples; default: 256 on a GPU, 4 on a CPU")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--journal", type=str | None, default=None, help="append each row to this JSON-lines file, and skip what it has"
    )
    parser.add_argument("--json", type=str | None, default=None, help="write the record, after each operation")
    parser.add_argument("--csv", type=str | None, default=None, help="write the rows")
    parser.add_argument("--png", type=str | None, default=None, help="write a chart")
    parser.add_argument("--quick", type=bool, default=False, nargs="?", const=True, help="tiny: does it run at all")
    parser.add_argument(
        "--readme",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="measure nothing; write the tables of RESULTS.md from benchmarks/records",
    )
    return parser


def _benchmark(argv: list[str]) -> None:
    args = _parser().parse(argv)
    if args.readme:
        return records.write_results()
    ops = _chosen("--ops", args.ops, OPERATIONS)
    sizes = _chosen("--sizes", args.sizes, SIZES)
    against = _chosen("--against", args.against or ("eager" if args.quick else "eager,compile"), BASELINES)
    device = _device(args.device)
    batch = args.batch or (2 if args.quick else 256 if device.type == "cuda" else 4)
    if batch < 1:
        raise UserError(f"--batch {batch}: must be at least 1")
    files = {name: records.writable(name, value) for name in ("json", "csv", "png") if (value := getattr(args, name))}
    writers = {"json": records.write_json, "csv": records.write_csv, "png": records.write_chart}

    if device.type == "cpu":
        keep_memory()  # as a run does
    effort = QUICK if args.quick else FULL[device.type]
    dtype = str(Setting.of(sizes[0], batch, device, args.quick).dtype).removeprefix("torch.")
    settings = {"batch": batch, "dtype": dtype, "quick": args.quick, **effort._asdict()}
    journal = Journal(args.journal)
    finished = journal.done("operation", "name")
    journal.write("record", **records.start(shlex.join(["python", "benchmarks/kernels.py", *argv]), device, settings))
    clock = Clock(device, effort)
    for op in ops:
        for size in sizes[:1] if op in UNSIZED else sizes:
            if f"{op} {size}" in finished:
                continue
            copy = clock.copy_rate()
            setting = Setting.of(size, batch, device, args.quick)
            for case in OPERATIONS[op](setting):
                rows = []
                for measured in measure(clock, case, setting.dtype, against):
                    rows.append(_row(op, case, "any" if op in UNSIZED else size, copy, measured))
                    journal.write("row", **rows[-1])
                _say(rows)
            journal.write("operation", name=f"{op} {size}")
        if "json" in files:
            records.write_json(kernels_record(journal.lines), files["json"])
    record = kernels_record(journal.lines)
    print("\n" + "\n".join(records.lines(record)))
    for name, path in files.items():
        writers[name](record, path)
        print(f"{name}: {path}")


def kernels_record(lines: list[dict]) -> dict:
    """Return the record of a journal's lines: the last head, and the latest of each row."""
    head = next(line for line in reversed(lines) if line["what"] == "record")
    rows: dict[tuple, dict] = {}
    for line in lines:
        if line["what"] == "row":
            row = {column: line[column] for column in records.COLUMNS}
            rows[tuple(row[column] for column in IDENTITY)] = row
    return {key: value for key, value in head.items() if key not in ("what", "at")} | {"rows": list(rows.values())}


def _row(op: str, case: Case | Steps, size: str, copy: float, measured: Measured) -> dict:
    times, moved = measured.times, measured.bytes
    rate = moved / times.p50 / 1e6 if times else None
    memory = measured.memory
    values = (
        op, case.name, size, case.shape, measured.phase, measured.contender, measured.ran,
        times and times.p20, times and times.p50, times and times.p80, times and times.rounds,
        moved, rate and round(rate, 3), round(copy, 3), rate and round(rate / copy, 4),
        memory and memory.peak, memory and memory.kept,
    )  # fmt: skip
    return dict(zip(records.COLUMNS, values, strict=True))


def _say(rows: list[dict]) -> None:
    """One line of a case just measured: the medians of its last phase."""
    last = [row for row in rows if row["phase"] == rows[-1]["phase"]]
    medians = (f"{row['contender']} " + (f"{row['ms_p50']:.3f} ms" if row["ms_p50"] else row["ran"]) for row in last)
    print(f"{last[0]['case']} {last[0]['size']} {last[0]['phase']}: {', '.join(medians)}", flush=True)


def _chosen(flag: str, text: str, known) -> list[str]:
    chosen = list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in known:
            raise UserError(f"{flag} {text}: {name!r} is unknown; choose of {','.join(known)}")
    return chosen


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such kind; a torch built without it
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); give cpu or cuda") from None
    if device.type not in FULL:
        raise UserError(f"--device {name}: cannot be timed; give cpu or cuda")
    return device


if __name__ == "__main__":
    main()
