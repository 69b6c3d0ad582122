"""A benchmark's record: one JSON with the machine, the versions and every row; tables and charts are made from it."""

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from fastdit.errors import UserError
from fastdit.files import write_atomically
from fastdit.rundir.metrics_log import versions

HERE = Path(__file__).parent
RECORDS = HERE / "records"
RESULTS = HERE / "RESULTS.md"
MARKERS = ("<!-- records: begin -->\n", "<!-- records: end -->\n")
COLUMNS = (
    "operation", "case", "size", "shape", "phase", "contender", "ran", "ms_p20", "ms_p50", "ms_p80", "rounds",
    "bytes", "gb_per_s", "copy_gb_per_s", "share_of_copy", "peak_bytes", "kept_bytes",
)  # fmt: skip
OURS = "fastdit"


def start(command: str, device: torch.device, settings: dict, benchmark: str = "kernels") -> dict:
    """Return a record without rows: what was run, when, where, and by which versions."""
    gpu = device.type == "cuda"
    found = versions()
    load = [round(value, 2) for value in os.getloadavg()]
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "device": torch.cuda.get_device_name(device) if gpu else found["device"],
        "kind": device.type,
        "driver": _driver() if gpu else "none",
        "versions": found,
        "load": {"before": load, "after": load},
        "settings": settings,
        "rows": [],
    }


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0] or "unknown"


def failure(error: Exception) -> str:
    """Return what a table shows of a contender that raised, in place of what it ran."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def writable(flag: str, value: str) -> Path:
    """The path a flag gives, its folder made. Raises UserError."""
    path = Path(value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--{flag} {value}: cannot be written ({error.strerror}); give a file") from None
    return path


def write_json(record: dict, path: Path, load: bool = True) -> None:
    """Write the record to a file that is whole at every moment, so that a run cut short leaves what it has.

    load: the record is of this moment, so that the load average belongs into it.
    """
    if load:
        record["load"]["after"] = [round(value, 2) for value in os.getloadavg()]
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_csv(record: dict, path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """One line a row; what was not measured is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(record["rows"])


def read(path: Path) -> dict:
    """Raises UserError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"benchmark", "device", "kind", "versions", "rows"} - set(record):
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no record ({error}); write one with --json") from None
    return record


def groups(record: dict) -> list[dict[str, dict]]:
    """Rows by contender, for each case, size and phase."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in record["rows"]:
        found.setdefault((row["case"], row["size"], row["shape"], row["phase"]), {})[row["contender"]] = row
    return list(found.values())


def lines(record: dict) -> list[str]:
    """A Markdown table, a line for each case, size and phase. Others' times: in fastdit's."""
    cells = [("operation", "size", "phase", "fastdit runs", "ms (20-80 %)", "GB/s", "of copy", "others", "peak MiB")]
    for rows in groups(record):
        if OURS not in rows:  # cut off before
            continue
        ours = rows[OURS]
        others = [row for name, row in rows.items() if name != OURS]
        if ours["ms_p50"] is None:
            timed, rate, share = "failed", "", ""
        else:
            timed = f"{_ms(ours['ms_p50'])} ({_ms(ours['ms_p20'])}-{_ms(ours['ms_p80'])})"
            rate, share = f"{ours['gb_per_s']:.1f}", f"{ours['share_of_copy']:.0%}"
        compared = ", ".join(f"{row['contender']} {_ratio(row, ours)}" for row in others)
        peaks = [row["peak_bytes"] for row in rows.values()]
        memory = " / ".join("-" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks) if any(peaks) else ""
        name = (ours["case"], ours["size"], ours["phase"], ours["ran"])
        cells.append((*name, timed, rate, share, compared or "none", memory))
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, the first row its head."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    ruled = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in ruled]


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(row: dict, ours: dict) -> str:
    if row["ms_p50"] is None:
        return "failed"
    return _ms(row["ms_p50"]) + " ms" if ours["ms_p50"] is None else f"{row['ms_p50'] / ours['ms_p50']:.2f}x"


class Section(NamedTuple):
    """A benchmark's part of RESULTS.md, between two lines of its own."""

    benchmark: str
    markers: tuple[str, str]
    lines: Callable[[dict], list[str]]
    chart: Callable[[dict, Path], None] | None = None  # drawn beside a record, and shown above its table


KERNELS = Section("kernels", MARKERS, lines)


def gpus_first(records: Iterable[dict]) -> list[dict]:
    return sorted(records, key=lambda record: (record["kind"] != "cuda", record["device"], record["date"]))


def table(records: Iterable[dict], section: Section = KERNELS) -> str:
    """Return the tables of these records, GPUs first."""
    records = gpus_first(records)
    parts = [] if any(record["kind"] == "cuda" for record in records) else ["NVIDIA GPUs: not measured.\n"]
    for record in records:
        found, load = record["versions"], record["load"]
        parts.append(
            f"### {record['device']}\n\n"
            f"`{record['command']}`\n\n"
            f"{record['date'][:10]}, commit {found['commit']}, torch {found['torch']}, triton {found['triton']}, "
            f"driver {record['driver']}, {record['settings']['dtype']}, batch {record['settings']['batch']}, "
            f"load average {load['before'][0]} before and {load['after'][0]} after.\n\n"
            + (f"![chart](records/{record['name']}.png)\n\n" if section.chart else "")
            + "\n".join(section.lines(record))
            + "\n"
        )
    return "\n".join(parts)


def write_results(records: Path = RECORDS, page: Path = RESULTS, section: Section = KERNELS) -> None:
    """Put the table of all records of a benchmark in a folder between its two markers. Raises UserError."""
    put_between(section.markers, table(records_of(section.benchmark, records), section), page)


def put_between(markers: tuple[str, str], body: str, page: Path) -> None:
    """Replace what stands between two lines of a file. Raises UserError."""
    text, (begin, end) = page.read_text(encoding="utf-8"), markers
    if not text.count(begin) == text.count(end) == 1:
        raise UserError(f"{page}: must hold {begin.strip()} and {end.strip()} once, on own lines")
    head, rest = text.split(begin)
    page.write_text(f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def write_charts(section: Section, records: Path = RECORDS) -> None:
    """Draw the chart of each of a benchmark's records beside it."""
    for record in records_of(section.benchmark, records):
        section.chart(record, records / f"{record['name']}.png")


def records_of(benchmark: str, folder: Path = RECORDS) -> list[dict]:
    """A benchmark's records in a folder, those within a suite's too."""
    found = [read(path) | {"name": path.stem} for path in sorted(folder.glob("*.json"))]
    for suite in [record for record in found if record["benchmark"] == "suite"]:
        parts = [row["record"] for row in suite["rows"] if row["record"]]
        found += [part | {"name": suite["name"]} for part in parts if "benchmark" in part]
    return [record for record in found if record["benchmark"] == benchmark and record["rows"]]


def write_chart(record: dict, path: Path) -> None:
    """A PNG: for each case and size all contenders' times in fastdit's, both phases together. Shorter is faster."""
    from matplotlib.figure import Figure  # a third of a second to import: not for who only measures

    shown = [rows for rows in groups(record) if rows[OURS]["phase"] in ("both", "step") and rows[OURS]["ms_p50"]]
    names = list(dict.fromkeys(name for rows in shown for name in rows))
    bars = [
        (f"{rows[OURS]['case']}  {rows[OURS]['size']}" if name == OURS else "", names.index(name), row)
        for rows in shown
        for name, row in rows.items()
        if row["ms_p50"]
    ]
    ours = [row["ms_p50"] for rows in shown for row in [rows[OURS]] for other in rows.values() if other["ms_p50"]]
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for name, color in zip(names, ("C0", "C7", "C1", "C2", "C3", "C4")):
        places = [at for at, bar in enumerate(bars) if names[bar[1]] == name]
        lengths = [bars[at][2]["ms_p50"] / ours[at] for at in places]
        axes.barh(places, lengths, color=color, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.set_xlabel("median time, forward and backward or one step; fastdit = 1, shorter is faster")
    axes.set_title(record["device"])
    if names:
        axes.legend()
    figure.savefig(path, format="png", dpi=110)
