"""Build a suite's record from its lines, and put records into RESULTS.md and README.md."""

import re
from pathlib import Path

import record as records
from convergence_tables import CONVERGENCE, convergence_record
from gpu_suite import LINES, ROOT
from journal import count_torn, read_journal
from loaders import LOADER, loader_record
from profile_steps import PROFILE, profile_record
from rates import RATES, rates_record
from step_record import step_record
from step_tables import THROUGHPUT, figures

from fastdit.errors import UserError
from kernels import kernels_record

BUILDERS = {
    "profile": profile_record,
    "kernels": kernels_record,
    "rates": rates_record,
    "convergence": convergence_record,
}
SHOWN = 20  # failing tests named in the table
FIGURES = ("<!-- figures: begin -->\n", "<!-- figures: end -->\n")


def write_record(out: Path) -> Path:
    """Build the record of the lines in a folder, write it there, and print its tables. Raises UserError."""
    lines = read_journal(out / LINES)
    record = suite_record(lines)
    if record is None:
        raise UserError(f"{out / LINES}: holds no measurement yet; run gpu_suite.py with --out {out}")
    where = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    path = out / f"{record['date'][:10]}-{where}-{record['versions']['commit']}.json"
    records.write_json(record, path, load=False)
    for part in (row["record"] for row in record["rows"]):
        section = _SECTIONS.get((part or {}).get("benchmark"))
        if section and part["rows"]:
            print("\n" + "\n".join(section.lines(part)))
    print("\n" + "\n".join(suite_lines(record)))
    if torn := count_torn(out / LINES):
        print(f"{out / LINES}: {torn} lines cannot be read and are left out")
    print(f"record: {path}")
    return path


def suite_record(lines: list[dict]) -> dict | None:
    """Return the record: a row for each part, with the part's own record as far as it was measured.

    None where no part has said yet what machine it runs on.
    """
    heads = [line for line in lines if line["what"] in ("record", "machine")]
    if not heads:
        return None
    suite = next(
        (line for line in lines if line["what"] == "suite"),
        {"budget": None, "command": heads[0].get("command", "unknown")},
    )
    head = {key: heads[0][key] for key in ("date", "device", "kind", "driver", "versions", "load")}
    dtypes = [line["settings"]["dtype"] for line in heads if "settings" in line]
    settings = {"dtype": dtypes[0] if dtypes else "none", "batch": "by part", "budget_seconds": suite["budget"]}
    # Lines of a benchmark that ran by itself are a part without a name.
    parts = _by_part(lines) or {"no part of a suite": lines}
    rows = [_part_row(name, own) for name, own in parts.items()]
    return {"benchmark": "suite", "command": suite["command"], **head, "settings": settings, "rows": rows}


def _by_part(lines: list[dict]) -> dict[str, list[dict]]:
    """Return each part's lines, those of all its attempts one after another. Parts run one at a time."""
    found: dict[str, list[dict]] = {}
    current = None
    for line in lines:
        if line["what"] in ("part began", "part ended") and "part" in line:
            current = line["part"] if line["what"] == "part began" else None
            found.setdefault(line["part"], []).append(line)
        elif current is not None:
            found[current].append(line)
    return found


def _part_row(name: str, lines: list[dict]) -> dict:
    last = lines[-1]
    ended = [line for line in lines if line["what"] == "part ended"]
    command = next((line["command"] for line in lines if "command" in line), "unknown")
    killed = "the suite was killed" if last["what"] != "part ended" else last.get("ended", "unknown")
    seconds = round(sum(line.get("seconds", 0.0) for line in ended), 1)
    return {"part": name, "command": command, "seconds": seconds, "ended": killed, "record": _part_record(lines)}


def _part_record(lines: list[dict]) -> dict | None:
    """Return what a part measured: a benchmark's record, or how tests ended; None where it measured nothing."""
    heads = [place for place, line in enumerate(lines) if line["what"] == "record"]
    if not heads:
        return _tests(lines)
    benchmark = lines[heads[0]]["benchmark"]
    if benchmark in BUILDERS:  # goes on where it was cut off, so all attempts together are one record
        return BUILDERS[benchmark](lines)
    build = loader_record if benchmark == "loader" else step_record
    attempts = [build(lines[begin:end]) for begin, end in zip(heads, [*heads[1:], len(lines)])]
    return max(attempts, key=lambda record: len(record["rows"]))


def _tests(lines: list[dict]) -> dict | None:
    """Return counts by outcome, and the failing tests with their messages; the last outcome of each test counts."""
    outcomes = {line["id"]: line for line in lines if line["what"] == "test"}
    running = {line["id"]: line for line in lines if line["what"] == "test began" and line["id"] not in outcomes}
    if not outcomes and not running:
        return None
    counts = {name: sum(line["outcome"] == name for line in outcomes.values()) for name in ("passed", "skipped")}
    failures = [
        {"test": name, "outcome": line["outcome"], "message": line.get("message", "")}
        for name, line in outcomes.items()
        if line["outcome"] in ("failed", "error")
    ]
    return {**counts, "failed": len(failures), "failures": failures, "unfinished": sorted(running)}


def suite_lines(record: dict) -> list[str]:
    """Return a Markdown table of the parts, and the failing tests; the figures stand in the other sections."""
    cells = [("part", "ended", "seconds", "tests passed / failed / skipped")]
    failures = []
    for row in record["rows"]:
        counts = row["record"] if row["record"] and "passed" in row["record"] else None
        tests = f"{counts['passed']} / {counts['failed']} / {counts['skipped']}" if counts else ""
        cells.append((row["part"], row["ended"], f"{row['seconds']:.0f}", tests))
        failures += counts["failures"] if counts else []
        failures += [{"test": name, "outcome": "unfinished"} for name in (counts["unfinished"] if counts else ())]
    lines = records.aligned(cells)
    if failures:
        lines += ["", "Tests that failed:", ""]
        lines += [f"- `{failure['test']}`: {_reason(failure)}" for failure in failures[:SHOWN]]
        lines += [f"- and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else []
    return lines


def _reason(failure: dict) -> str:
    """Return the line of a failure's message that says what was wrong."""
    said = [line.strip() for line in failure.get("message", "").splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in said if line.startswith("E ")]
    return (errors or said or [failure["outcome"]])[0][:200]


SUITE = records.Section("suite", ("<!-- suite: begin -->\n", "<!-- suite: end -->\n"), suite_lines)
_SECTIONS = {
    section.benchmark: section for section in (records.KERNELS, THROUGHPUT, LOADER, PROFILE, RATES, CONVERGENCE)
}


def write_pages() -> None:
    """Put all records, those within suites too, into RESULTS.md, and whole steps into README.md. Raises UserError."""
    write_figures(ROOT / "README.md")
    records.write_charts(CONVERGENCE)
    for section in (SUITE, *_SECTIONS.values()):
        records.write_results(section=section)


def write_figures(page: Path) -> None:
    """Put a line for each measured step into the project's own README. Raises UserError."""
    found = records.gpus_first(records.records_of("throughput"))
    missing = [] if any(record["kind"] == "cuda" for record in found) else ["NVIDIA GPUs: not measured.", ""]
    records.put_between(FIGURES, "\n".join([*missing, *figures(found), ""]), page)
