"""Build the throughput benchmark's record from its journal, however far that goes.

The journal holds, in this order: a "record" (machine, versions, settings), for each contender a "contender" (what it
is, or why it failed), and after each of them "round" lines with the laps of every contender that was ready by then.
"""

from types import SimpleNamespace

from step_tables import PLAIN, failed_row, step_rows, whole_step
from stopwatch import Laps

GEMM = "gemm"  # the large product that takes its turns beside the contenders


def step_record(lines: list[dict]) -> dict:
    """Return the record of the last run in `lines`: without rows while not even fastdit's plain step was timed."""
    lines = lines[max(place for place, line in enumerate(lines) if line["what"] == "record") :]
    record = {key: value for key, value in lines[0].items() if key not in ("what", "at")} | {"rows": []}
    settings = record["settings"] = dict(record["settings"])
    rounds = counted_rounds(lines)
    if not rounds:
        return record
    gemm = whole_step([laps[GEMM] for laps in rounds]).p50
    settings["gemm_flops"] = 2 * settings["gemm_size"] ** 3 / gemm * 1e3
    for line in lines:
        if line["what"] == "scaling":
            record["scaling"] = line["scaling"]
        elif line["what"] == "contender" and "failed" in line:
            record["rows"].append(failed_row(line["name"], line["failed"]))
        elif line["what"] == "contender" and (own := [laps for laps in rounds if line["name"] in laps]):
            turns, plain = ([laps[name] for laps in own] for name in (line["name"], PLAIN))
            record["rows"] += step_rows(line["name"], SimpleNamespace(**line), turns, plain, settings)
    return record


def counted_rounds(lines: list[dict]) -> list[dict[str, list[Laps]]]:
    """Return the rounds that count, each {contender: laps of its timed steps}.

    Those are the rounds that every contender took part in, so that all are compared under the same drift of clocks.
    A run that was cut off before the first of them shows all the rounds there are.
    """
    rounds = [line["laps"] for line in lines if line["what"] == "round"]
    ready = {line["name"] for line in lines if line["what"] == "contender" and "failed" not in line}
    return [laps for laps in rounds if ready <= laps.keys()] or rounds
