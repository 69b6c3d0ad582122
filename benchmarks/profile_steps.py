"""Profile fastdit's own training steps: `python benchmarks/profile_steps.py "S/2 dit 256" "XL/2 dit 256"`.

A case is MODEL METHOD BATCH, then maybe `graphs` (CUDA graphs), then any dotted setting of a run
(`--sd_dit.mask_ratio 0.5`). All cases run in one process. Each leaves two lines in the journal:

    step       milliseconds, images/s, MFU, host time, peak memory, phases: as soon as the steps are timed
    profile    which kernels ran, how often and how long, by group: after two more steps under torch's profiler

With `--precision fp8` among the settings, MFU is still relative to the datasheet's bf16 rate.

A case that does not fit in memory is tried again with half its batch. A case that fails is a line too.
"""

import gc
import re
import shlex
import time
import traceback
from dataclasses import dataclass
from functools import partial
from statistics import median

import record as records
import torch
from journal import Journal
from kernel_groups import by_group
from stopwatch import Stopwatch, Turn
from timing import quantiles, quiet_profiler
from torch.profiler import ProfilerActivity, profile

from fastdit import distributed
from fastdit.command_line import OneLineParser
from fastdit.config import Config
from fastdit.errors import UserError, run_command
from fastdit.models import SIZES
from fastdit.parser import parse
from fastdit.rundir.metrics_log import peak_flops

DEFAULT = ("S/2 dit 256", "B/2 dit 256", "XL/2 dit 256")
TURN = {"cuda": Turn(3, 12), "cpu": Turn(0, 2)}
PROFILED = 2  # steps under the profiler
KERNELS = 60  # names kept of each profile, the longest first
HALVINGS = 3  # of a batch that does not fit
PHASES = ("data", "forward", "backward", "optimizer", "extras", "rest")


@dataclass(frozen=True)
class Case:
    """One step to profile, as written on the command line."""

    model: str
    method: str
    batch: int
    graphs: bool = False
    settings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read "XL/2 dit 256 graphs --model.depth 4". Raises UserError."""
        words = shlex.split(text)
        size, _, patch = words[0].partition("/") if words else ("", "", "")
        if len(words) < 3 or size not in SIZES or not patch.isdecimal() or not words[2].isdecimal():
            raise UserError(
                f"{text!r}: is no case; write MODEL METHOD BATCH, such as 'XL/2 dit 256', then maybe 'graphs' and "
                "dotted settings"
            )
        graphs = words[3:4] == ["graphs"]
        return cls(words[0], words[1], int(words[2]), graphs, tuple(words[4 if graphs else 3 :]))

    @property
    def name(self) -> str:
        words = (self.model, self.method, str(self.batch), *(["graphs"] if self.graphs else []), *self.settings)
        return " ".join(words)

    def config(self, device: str, precision: str, latent: int) -> Config:
        """Return the run's settings: ZeRO-1 on latents (4, latent, latent) that lie in memory. Raises UserError."""
        size, _, patch = self.model.partition("/")
        flags = {
            "model.size": size,
            "model.patch": patch,
            "method": self.method,
            "batch": self.batch,
            "data.source": f"synthetic:4x{latent}x{latent}:1000:10000",
            "data.size": latent,
            "data.channels": 4,
            "ds_config": "zero1",
            "precision": precision,
            "device": device,
            "cuda_graphs": str(self.graphs).lower(),
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return parse([*words, *self.settings])

    def halved(self) -> "Case":
        return Case(self.model, self.method, self.batch // 2, self.graphs, self.settings)


def main(argv: list[str] | None = None) -> None:
    """Leave the process: 0, or 2 after a UserError."""
    run_command(_benchmark, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="profile_steps.py", description="Show where the time of fastdit's training steps goes.")
    parser.add_argument("cases", type=list[str], nargs="*", help=f"MODEL METHOD BATCH, quoted; default: {DEFAULT}")
    parser.add_argument("--size", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--journal", type=str | None, default=None, help="append each measurement to this JSON-lines file"
    )
    parser.add_argument("--json", type=str | None, default=None, help="write the record")
    return parser


def _benchmark(argv: list[str]) -> None:
    # Cases are positional and hold spaces; jsonargparse would read those with dotted settings as flags.
    words = [word for word in argv if " " in word or re.match(r"[A-Z]+/\d", word)]
    cases = [Case.parse(word) for word in words]
    args = _parser().parse([word for word in argv if word not in words])
    if not cases:
        if args.device == "cpu" or not torch.cuda.is_available():
            raise UserError(
                "profile_steps.py: the default cases are for a GPU, and torch sees none; name a small case, such as "
                "'S/4 dit 2', with --device cpu"
            )
        cases = [Case.parse(text) for text in DEFAULT]
    configs = [case.config(args.device, "auto", args.size) for case in cases]  # every bad case is told before any runs
    file = records.writable("json", args.json) if args.json else None
    journal = Journal(args.journal)
    finished = journal.done("profile", "asked")

    ranks = distributed.start(configs[0])
    precision = "bf16" if ranks.device.type == "cuda" else "fp32"
    settings = {"dtype": precision, "batch": "by case", "latent": [4, args.size, args.size]}
    command = shlex.join(["python", "benchmarks/profile_steps.py", *argv])
    journal.write("record", **records.start(command, ranks.device, settings, "profile"))
    for case in cases:
        if case.name in finished:
            print(f"{case.name}: is in the journal already")
            continue
        _profile(case, precision, args.size, ranks, journal)
        if file:
            records.write_json(profile_record(journal.lines), file)
    print("\n" + "\n".join(profile_lines(profile_record(journal.lines))))
    torch.distributed.destroy_process_group()


def _profile(case: Case, precision: str, latent: int, ranks: distributed.Runtime, journal: Journal) -> None:
    """Measure a case, with smaller batches while memory is short, and write its lines."""
    asked = case.name
    for _ in range(HALVINGS + 1):
        try:
            _measure(case, asked, case.config(ranks.device.type, precision, latent), ranks, journal)
            return
        except torch.OutOfMemoryError as error:
            problem, case = records.failure(error), case.halved()
        except Exception as error:  # a result, not the end of the run
            traceback.print_exc()
            problem, case = records.failure(error), None
        finally:
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"{asked}: {problem}", flush=True)
        if case is None or case.batch < 1:
            break
    journal.write("profile failed", case=asked, failed=problem)


def _measure(case: Case, asked: str, config: Config, ranks: distributed.Runtime, journal: Journal) -> None:
    from contenders import Engine, warm  # imports DeepSpeed: after distributed.start

    device, began = ranks.device, time.perf_counter()
    watch = Stopwatch(device)
    contender = warm(partial(Engine, config, ranks, watch), device)
    try:
        watch.read()  # laps of the first steps are of no use
        ready = time.perf_counter() - began

        head = {"case": case.name, "asked": asked, "model": case.model, "method": case.method, "batch": case.batch}
        timed = [line for line in journal.lines if line["what"] == "step" and line["case"] == case.name]
        step = timed[-1] if timed else journal.write("step", **head, **_time(contender, case, device, ready))
        print(f"{case.name}: {step['ms']:.2f} ms, {step['images_per_s']:.1f} images/s, {step['ran']}", flush=True)

        kernels = _kernels(contender, device)
        groups = by_group(kernels)
        longest = [[round(ms, 4), launches, name[:160]] for name, launches, ms in kernels[:KERNELS]]
        busy = sum(ms for _, _, ms in kernels)
        journal.write("profile", **head, ms=step["ms"], busy_ms=round(busy, 4), groups=groups, kernels=longest)
        shown = ", ".join(f"{group} {ms:.2f}" for group, (_, ms) in groups.items())
        print(f"{case.name}: ms by group: {shown}", flush=True)
    finally:
        contender.close()


def _time(contender, case: Case, device: torch.device, ready: float) -> dict:
    """Time steps as in training: the host runs ahead, and waits once at the end. Return the fields of their line."""
    turn = TURN[device.type]
    for _ in range(turn.untimed + turn.timed):
        contender.step()
    laps = contender.watch.read()[turn.untimed :]
    times = quantiles([sum(step.values()) for step in laps])
    flops = sum(contender.flops.values())
    images = case.batch / times.p50 * 1e3
    datasheet = peak_flops(device)
    return {
        "ran": contender.ran,
        "ms_p20": times.p20,
        "ms": times.p50,
        "ms_p80": times.p80,
        "images_per_s": images,
        "flops_per_image": flops,
        "mfu": images * flops / datasheet if datasheet else None,
        "host_ms": contender.host,
        "peak_bytes": contender.peak,
        "held_bytes": contender.held,
        "ready_s": round(ready, 2),
        "phases": {phase: round(_phase(laps, phase), 4) for phase in PHASES},
    }


def _phase(laps: list[dict[str, float]], phase: str) -> float:
    """Return the median milliseconds of a phase, its components included."""
    return median(sum(ms for name, ms in step.items() if name.partition("/")[0] == phase) for step in laps)


def _kernels(contender, device: torch.device) -> list[tuple[str, float, float]]:
    """Run PROFILED steps under torch's profiler; return (name, launches, milliseconds) of one step, the longest first.

    On a GPU these are its kernels and copies. On a CPU they are torch's operators by the time of their own.
    """
    gpu = device.type == "cuda"
    contender.step()  # the profiler's start leaves the GPU idle
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with quiet_profiler(), profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            contender.step()
        contender.watch.read()  # waits for the device
    if not gpu:
        found = {event.key: (event.count, event.self_cpu_time_total / 1e3) for event in profiler.key_averages()}
    else:
        found: dict[str, tuple[int, float]] = {}
        for event in profiler.profiler.kineto_results.events():
            # Annotations such as "Optimizer.step" span kernels on the GPU's time line: they would count twice.
            if str(event.device_type()).endswith("CUDA") and not event.is_user_annotation():
                count, total = found.get(event.name(), (0, 0.0))
                found[event.name()] = (count + 1, total + event.duration_ns() / 1e6)
    kernels = [(name, count / PROFILED, total / PROFILED) for name, (count, total) in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel[2])


def profile_record(lines: list[dict]) -> dict:
    """Build the record from a journal's lines: a row for each case, its profile included where that was made."""
    head = next(line for line in reversed(lines) if line["what"] == "record")
    rows: dict[str, dict] = {}
    for line in lines:
        fields = {key: value for key, value in line.items() if key not in ("what", "at")}
        if line["what"] in ("step", "profile"):
            rows[line["asked"]] = rows.get(line["asked"], {}) | fields
        elif line["what"] == "profile failed":
            rows.setdefault(line["case"], fields)
    return {key: value for key, value in head.items() if key not in ("what", "at")} | {"rows": list(rows.values())}


def profile_lines(record: dict) -> list[str]:
    """Return two Markdown tables: the steps, and the milliseconds (launches) of each kernel group."""
    steps = [("case", "runs", "ms (20-80 %)", "images/s", "MFU", "GPU busy ms", "host ms", "peak GiB")]
    rows = record["rows"]
    for row in rows:
        if "ms" not in row:
            steps.append((row["case"], row["failed"], *[""] * 6))
            continue
        spread = f"{row['ms']:.2f} ({row['ms_p20']:.2f}-{row['ms_p80']:.2f})"
        steps.append((
            row["case"], row["ran"], spread, f"{row['images_per_s']:.4g}",
            f"{row['mfu']:.1%}" if row["mfu"] else "", f"{row['busy_ms']:.2f}" if "busy_ms" in row else "",
            f"{row['host_ms']:.2f}" if row["host_ms"] else "", f"{row['peak_bytes'] / 2**30:.2f}",
        ))  # fmt: skip
    profiled = [row for row in rows if "groups" in row]
    if not profiled:
        return records.aligned(steps)
    names = dict.fromkeys(group for row in profiled for group in row["groups"])
    groups = [("ms (launches) of a step", *(row["case"] for row in profiled))]
    for name in names:
        cells = (row["groups"].get(name) for row in profiled)
        groups.append((name, *(f"{cell[1]:.2f} ({cell[0]:g})" if cell else "" for cell in cells)))
    return [*records.aligned(steps), "", *records.aligned(groups)]


PROFILE = records.Section("profile", ("<!-- profile: begin -->\n", "<!-- profile: end -->\n"), profile_lines)

if __name__ == "__main__":
    main()
