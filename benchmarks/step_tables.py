"""Rows of the throughput benchmark's record, and the tables made from them.

A contender has one row of table "step", rows of table "phase" and, for methods of several parts, of table "component".
Parts are medians of their own; `rest` is the whole step's median less those, so that a table's rows add up to the step.
"""

from collections.abc import Callable
from statistics import median

from record import Section, aligned
from scaling import scaling_lines
from stopwatch import Contender, Laps
from timing import Quantiles, quantiles

GOALS = {"sd_dit": "at most 1.35", "sadm": "at most 1.10 (XL/2, batch 256)"}  # in plain steps of the same size
PLAIN = "dit"
COLUMNS = (
    "contender", "ran", "table", "part", "ms_p20", "ms_p50", "ms_p80", "steps", "ratio_p20", "ratio_p50", "ratio_p80",
    "images_per_s", "flops_per_image", "mfu_datasheet", "mfu_gemm", "held_bytes", "peak_bytes", "host_ms",
)  # fmt: skip
REST, WHOLE = "rest", "whole step"
PHASES = {
    "data": "data",
    "forward": "forward",
    "backward": "backward",
    "optimizer + averages": "optimizer",
    "method extras": "extras",
}
# Of methods of several parts: the laps, and the component whose FLOPs are counted.
COMPONENTS = {
    "denoiser": (("forward/network", "backward/network"), "network"),
    "student encoder": (("forward/encoder", "backward/encoder"), "encoder"),
    "decoder": (("forward/decoder", "backward/decoder"), "decoder"),
    "teacher": (("forward/teacher",), "teacher"),
    "head and prototypes": (("forward/head", "backward/head"), "head"),
    "Psi of clean samples": (("forward/psi",), "psi"),
    "structure, both players": (("forward/structure", "backward/structure"), "structure"),
    "Psi's step": (("extras/psi",), None),
    "optimizer + averages": (("optimizer",), None),
    "teacher refresh": (("extras/refresh",), None),
    "data": (("data",), None),
}
NOTE = (
    "Measured within the whole step, forward and backward together. SD-DiT's teacher's logits are computed with the "
    "student's: their time is the head's, their FLOPs the teacher's. SADM's denoiser has noise and loss with it, "
    "psi_align's the projector's time, without its FLOPs. Rest: "
    "noise, masks, losses, centres, schedules."
)


def step_rows(
    name: str, contender: Contender, rounds: list[list[Laps]], plain: list[list[Laps]], settings: dict
) -> list[dict]:
    """All rows of a contender from its laps and those of the plain step, round by round."""
    laps = [step for turn in rounds for step in turn]
    whole = whole_step(rounds)
    pairs = zip(map(_median_step, rounds), map(_median_step, plain))
    ratio = quantiles([own / other for own, other in pairs])
    images = settings["batch"] / whole.p50 * 1e3
    flops = sum(contender.flops.values())
    rate = images * flops / settings["ranks"]
    datasheet = settings["datasheet_flops"]
    head = {"contender": name, "ran": contender.ran}
    step = {
        **_timed("step", WHOLE, whole, flops),
        "ratio_p20": ratio.p20,
        "ratio_p50": ratio.p50,
        "ratio_p80": ratio.p80,
        "images_per_s": images,
        "mfu_datasheet": rate / datasheet if datasheet else None,
        "mfu_gemm": rate / settings["gemm_flops"],
        "held_bytes": contender.held,
        "peak_bytes": contender.peak,
        "host_ms": contender.host,
    }
    phases = {part: (lambda key, p=phase: key.partition("/")[0] == p, None) for part, phase in PHASES.items()}
    rows = [step, *_part_rows("phase", phases, laps, whole)]
    if len(contender.flops) > 1:
        seen = {key for step in laps for key in step}
        wanted = {
            part: (keys.__contains__, contender.flops.get(counted))
            for part, (keys, counted) in COMPONENTS.items()
            if seen.intersection(keys)
        }
        rows += _part_rows("component", wanted, laps, whole)
    return [dict.fromkeys(COLUMNS) | head | row for row in rows]


def whole_step(rounds: list[list[Laps]]) -> Quantiles:
    return quantiles([sum(step.values()) for turn in rounds for step in turn])


def failed_row(name: str, why: str) -> dict:
    return dict.fromkeys(COLUMNS) | {"contender": name, "ran": why, "table": "step", "part": WHOLE}


def _median_step(turn: list[Laps]) -> float:
    return median(sum(step.values()) for step in turn)


def _part_rows(table: str, parts: dict, laps: list[Laps], whole: Quantiles) -> list[dict]:
    """parts: by name, which laps are of the part, and its FLOPs or None."""
    found = []
    for part, (belongs, flops) in parts.items():
        times = quantiles([sum(ms for key, ms in step.items() if belongs(key)) for step in laps])
        found.append(_timed(table, part, times, flops))
    rest = whole.p50 - sum(row["ms_p50"] for row in found)
    return [*found, {"table": table, "part": REST, "ms_p50": rest, "steps": len(laps)}]


def _timed(table: str, part: str, times: Quantiles, flops: float | None) -> dict:
    return {
        "table": table,
        "part": part,
        "ms_p20": times.p20,
        "ms_p50": times.p50,
        "ms_p80": times.p80,
        "steps": times.rounds,
        "flops_per_image": flops,
    }


def step_lines(record: dict) -> list[str]:
    """Markdown: the steps of all contenders, their phases, and the method's components."""
    rows = record["rows"]
    steps = [row for row in rows if row["table"] == "step"]
    lines = [f"Products of {_product(record)}.", ""]
    if record["settings"].get("precision") == "fp8":
        lines += ["fastdit's own steps use fp8 products. Both MFUs are relative to bf16 rates.", ""]
    lines += _steps(steps)
    lines += ["", "Parts of a step, ms:", "", *_phases(rows)]
    components = [row for row in rows if row["table"] == "component"]
    for name in dict.fromkeys(row["contender"] for row in components):
        own = [row for row in components if row["contender"] == name]
        lines += ["", f"Parts of a step of {name}:", "", *_components(own, steps)]
    if components:
        lines += ["", NOTE]
    for predicted in record.get("scaling", ()):
        lines += ["", *scaling_lines(predicted)]
    return lines


def _product(record: dict) -> str:
    settings = record["settings"]
    n, rate, sheet = settings["gemm_size"], settings["gemm_flops"], settings["datasheet_flops"]
    listed = f"; datasheet: {sheet / 1e12:.0f}" if sheet else ""
    return f"{n} x {n} {settings['dtype']} matrices ran at {rate / 1e12:.3g} TFLOP/s{listed}"


def _steps(steps: list[dict]) -> list[str]:
    host = ["host ms"] if any(row.get("host_ms") for row in steps) else []
    cells = [("contender", "runs", "ms a step (20-80 %)", "images/s", f"in {PLAIN} steps (20-80 %)", "GFLOP an image",
              "MFU, datasheet", "MFU, GEMM", "peak MiB", "held MiB", *host)]  # fmt: skip
    for row in steps:
        if row["ms_p50"] is None:
            cells.append((row["contender"], row["ran"][:100], *[""] * (8 + len(host))))
            continue
        sheet = row["mfu_datasheet"]
        cells.append((
            row["contender"], row["ran"], _spread(row, "ms", _ms), f"{row['images_per_s']:.4g}",
            _spread(row, "ratio", "{:.2f}".format), f"{row['flops_per_image'] / 1e9:.3g}",
            f"{sheet:.1%}" if sheet else "none", f"{row['mfu_gemm']:.1%}",
            f"{row['peak_bytes'] / 2**20:.1f}", f"{row['held_bytes'] / 2**20:.1f}",
            *(_ms(row["host_ms"]) for _ in host),
        ))  # fmt: skip
    return aligned(cells)


def _phases(rows: list[dict]) -> list[str]:
    names = [row["contender"] for row in rows if row["table"] == "step" and row["ms_p50"] is not None]
    times = {(row["contender"], row["part"]): row["ms_p50"] for row in rows if row["table"] != "component"}
    cells = [("part", *names)]
    cells += [(part, *(_ms(times[name, part]) for name in names)) for part in (*PHASES, REST, WHOLE)]
    return aligned(cells)


def _components(components: list[dict], steps: list[dict]) -> list[str]:
    by_name = {row["contender"]: row for row in steps}
    whole, plain = by_name[components[0]["contender"]], by_name[PLAIN]
    cells = [("part", "ms (20-80 %)", "of the step", "in plain steps", "GFLOP an image", "of the plain step's")]
    for row in [*components, whole, plain | {"part": "plain step"}]:
        flops = row["flops_per_image"]
        cells.append((
            row["part"],
            _ms(row["ms_p50"]) if row["ms_p20"] is None else _spread(row, "ms", _ms),
            f"{row['ms_p50'] / whole['ms_p50']:.1%}",
            _spread(row, "ratio", "{:.2f}".format) if row is whole else f"{row['ms_p50'] / plain['ms_p50']:.2f}",
            f"{flops / 1e9:.3g}" if flops else "",
            f"{flops / plain['flops_per_image']:.2f}" if flops else "",
        ))  # fmt: skip
    if goal := GOALS.get(whole["contender"]):
        cells.append(("goal of the whole step", "", "", goal, "", ""))
    return aligned(cells)


def figures(records: list[dict]) -> list[str]:
    """Markdown: a line for each step of fastdit's in records of the throughput benchmark; others' times are in it."""
    cells = [("machine", "step", "images/s", "of the GEMM rate", "eager PyTorch", "torch.compile", "commit")]
    for record in records:
        settings, rows = record["settings"], [row for row in record["rows"] if row["table"] == "step"]
        by_name = {row["contender"]: row for row in rows if row["ms_p50"]}
        for name in (PLAIN, settings["method"]) if settings["method"] != PLAIN else (PLAIN,):
            ours = by_name[name]
            others = [by_name.get(other) if name == PLAIN else None for other in ("eager", "compile")]
            cells.append((
                record["device"], f"{name} {settings['model']}, batch {settings['batch']}, {_arithmetic(settings)}",
                f"{ours['images_per_s']:.4g}", f"{ours['mfu_gemm']:.0%}",
                *(f"{other['ms_p50'] / ours['ms_p50']:.2f}x" if other else "" for other in others),
                record["versions"]["commit"],
            ))  # fmt: skip
    return aligned(cells)


def _arithmetic(settings: dict) -> str:
    """Return fp8 for steps with fp8 products, else the dtype; older records have no precision."""
    return "fp8" if settings.get("precision") == "fp8" else settings["dtype"]


def _spread(row: dict, what: str, shown: Callable[[float], str]) -> str:
    low, middle, high = (shown(row[f"{what}_{q}"]) for q in ("p20", "p50", "p80"))
    return f"{middle} ({low}-{high})"


def _ms(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}" if abs(value) < 10 else f"{value:.1f}"  # + 0.0: no -0.00


THROUGHPUT = Section("throughput", ("<!-- throughput: begin -->\n", "<!-- throughput: end -->\n"), step_lines)
