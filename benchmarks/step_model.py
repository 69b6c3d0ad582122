"""Predict a DiT training step on one H100 from counts: FLOPs, bytes outside the GEMMs, kernel launches. Needs no GPU.

    python benchmarks/step_model.py --sizes S,B,XL --batches 256,32     # from guessed rates
    python benchmarks/step_model.py --rates rates.jsonl                 # from what rates.py measured, where it did
    python benchmarks/step_model.py --measured profile.jsonl            # beside the profiles of profile_steps.py

The prediction is made for the code as it is and for what it could be, change by change. The time of a kernel group is
its FLOPs or bytes over a rate. Bytes outside the GEMMs are counted in units: one unit is the size of the residual
stream, batch x tokens x width numbers of 2 bytes. Every rate is printed with its origin: measured, guessed, or the
target of a scenario. `step_counts.py` holds the counts. Under --measured, a ratio far from 1 points at the assumption
that is wrong.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from journal import read_journal
from record import aligned
from step_counts import SCENARIOS, TODAY, Architecture, Code, Pass

from fastdit.command_line import OneLineParser
from fastdit.errors import UserError, run_command
from fastdit.models import SIZES

PEAK = 989.4e12  # FLOP/s of an H100 SXM in bf16, dense
GROUPS = ("GEMM", "attention", "adaLN", "GELU", "sums", "copies", "elementwise", "optimizer")
OURS = ("adaLN", "GELU", "attention", "elementwise")  # groups whose kernels a scenario's share_target is for

# Guesses for an H100 SXM, until rates.py has measured them.
COPY = 3.0e12  # bytes/s
SHARES = {"sums": 0.70, "copies": 0.90, "optimizer": 0.90}  # of the copy's rate, by group
SHARE = 0.85  # of all other groups
GEMM_RATES = {
    "bf16": {384: 480e12, 768: 600e12, 1024: 630e12, 1152: 640e12},
    "fp8": {384: 700e12, 768: 1000e12, 1024: 1100e12, 1152: 1150e12},
}
ATTENTION_RATE = 238e12  # FLOP/s of both passes: 300 TFLOP/s forward, 220 backward
GAP = 1.0e-6  # seconds between two kernels
SMALL_KERNEL = 3e-6  # seconds of a kernel outside the blocks
HOST_LAUNCH = 6e-6  # seconds that the host takes for each launch, autograd and DeepSpeed included


@dataclass(frozen=True)
class Rate:
    """A rate in FLOP/s or bytes/s and where it comes from: measured, guess or target."""

    value: float
    origin: str


class Rates:
    """Rates by operation: those of a journal of rates.py where it has them, else guesses.

    `used` collects every rate that was asked for, by name.
    """

    def __init__(self, lines: list[dict] | None = None):
        lines = lines or []
        self.lines = [line for line in lines if line["what"] == "rates" and "failed" not in line]
        self.devices = [line for line in lines if line["what"] == "device"]
        devices = [line["copy_gb_per_s"] for line in lines if line["what"] == "device" and line.get("copy_gb_per_s")]
        self.copy = Rate(devices[-1] * 1e9, "measured") if devices else Rate(COPY, "guess")
        self.used: dict[str, Rate] = {"copy, bytes/s": self.copy}

    def gemm(self, size: str, batch: int, layer: str, phase: str, code: Code) -> Rate:
        """Return the FLOP/s of a block's GEMM."""
        width, name = Architecture.of(size).width, f"{size} GEMM {code.gemm}"
        if code.gemm_target:
            return self._use(f"{name} as a target, FLOP/s", Rate(code.gemm_target[width], "target"))
        if line := self._measured(f"gemm {layer} {phase} {code.gemm}", size, batch):
            return self._use(f"{name} {layer} {phase}, FLOP/s", Rate(line["tflops"] * 1e12, "measured"))
        return self._use(f"{name}, FLOP/s", Rate(GEMM_RATES[code.gemm][width], "guess"))

    def attention(self, size: str, batch: int) -> Rate:
        """Return the FLOP/s of both passes of attention by the backend that fastdit chooses."""
        for backend in ("flash_attn", "sdpa"):
            if line := self._measured(f"attention {backend} forward+backward, three gradients", size, batch):
                return self._use(f"{size} attention {backend}, FLOP/s", Rate(line["tflops"] * 1e12, "measured"))
        return self._use(f"{size} attention, FLOP/s", Rate(ATTENTION_RATE, "guess"))

    def bandwidth(self, one: Pass, size: str, batch: int, code: Code) -> Rate:
        """Return the bytes/s of a pass over memory."""
        line = one.operation and self._measured(one.operation, size, batch)
        if code.share_target and one.group in OURS:
            return self._use(f"{one.group} as a target, bytes/s", Rate(code.share_target * self.copy.value, "target"))
        if line and "gb_per_s" in line:
            name = f"{size} {one.operation}" if line["size"] else one.operation
            return self._use(f"{name}, bytes/s", Rate(line["gb_per_s"] * 1e9, "measured"))
        share = SHARES.get(one.group, SHARE)
        return self._use(f"{one.group}, bytes/s", Rate(share * self.copy.value, "guess"))

    def _measured(self, operation: str, size: str, batch: int) -> dict | None:
        """Return the last line of an operation at this size, or at no size, of the batch that is nearest in ratio."""
        found = [line for line in self.lines if line["operation"] == operation and line["size"] in (size, None)]
        distance = lambda line: abs(math.log((line["batch"] or batch) / batch))  # noqa: E731
        return min(reversed(found), key=distance, default=None)

    def _use(self, name: str, rate: Rate) -> Rate:
        self.used[name] = rate
        return rate


@dataclass
class Prediction:
    """A predicted step."""

    images: int
    flops: float  # as MFU counts them
    milliseconds: dict[str, float] = field(default_factory=dict)  # of the kernels, by group
    launches: dict[str, int] = field(default_factory=dict)  # by group
    idle: float = 0.0  # ms between kernels
    host: float = 0.0  # ms that the host takes to launch the step

    @property
    def total(self) -> float:
        """Return the step's milliseconds: what the slower of GPU and host needs."""
        return max(sum(self.milliseconds.values()) + self.idle, self.host)

    @property
    def images_per_second(self) -> float:
        return self.images / self.total * 1e3

    @property
    def mfu(self) -> float:
        return self.flops / (self.total / 1e3) / PEAK


def predict(size: str, batch: int, code: Code, rates: Rates) -> Prediction:
    """Return the predicted step of DiT-`size`/2 on 4x32x32 latents."""
    architecture = Architecture.of(size)
    found = Prediction(batch, architecture.flops * batch, dict.fromkeys(GROUPS, 0.0), code.launches_of(architecture))

    # Linear layers: a block's GEMMs each at its rate, the layers outside the blocks at the mean rate of those.
    seconds = sum(
        2 * products * batch / rates.gemm(size, batch, layer, phase, code).value
        for layer, products in architecture.layers.items()
        for phase in ("forward", "dgrad", "wgrad")
    )
    share = architecture.linear_products / sum(architecture.layers.values())
    found.milliseconds["GEMM"] += seconds * share * 1e3

    # Attention: 2 products forward and 5 backward, which recomputes the scores.
    attention = rates.attention(size, batch)
    found.milliseconds["attention"] += 7 * architecture.attention_products * batch / attention.value * 1e3

    # Passes over memory. A measured kernel's rate covers what it does beside its main pass.
    unit = architecture.unit(batch)
    scaled = [(one, architecture.depth * unit) for one in code.block_passes(architecture)]
    scaled += [(one, architecture.parameters) for one in code.weight] + [(one, unit) for one in code.step]
    for one, scale in scaled:
        rate = attention if one.operation == "attention" else rates.bandwidth(one, size, batch, code)
        if one.included and rate.origin == "measured":
            continue
        if one.operation == "attention":
            rate = rates.bandwidth(one, size, batch, code)
        found.milliseconds[one.group] += one.amount * scale / rate.value * 1e3

    # Launches: small kernels outside the blocks, gaps between kernels, and the host.
    found.milliseconds["elementwise"] += sum(code.launches_outside.values()) * SMALL_KERNEL * 1e3
    count = sum(found.launches.values())
    found.idle, found.host = count * GAP * 1e3, count * HOST_LAUNCH * 1e3
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the command and leave the process: 0, or 2 after a UserError."""
    run_command(_model, argv)


def _model(argv: list[str]) -> None:
    parser = OneLineParser(prog="step_model.py", description="Predict DiT training steps on one H100 from counts.")
    parser.add_argument("--sizes", type=str, default="S,B,XL", help="model sizes, with commas between")
    parser.add_argument("--batches", type=str, default="256", help="images of a step, with commas between")
    parser.add_argument("--rates", type=str | None, default=None, help="a journal of rates.py")
    parser.add_argument("--measured", type=str | None, default=None, help="a journal of profile_steps.py to compare")
    args = parser.parse(argv)
    for size in args.sizes.split(","):
        if size not in SIZES:
            raise UserError(f"--sizes {args.sizes}: {size!r} is unknown; choose of {','.join(SIZES)}")
    if not all(batch.isdecimal() and int(batch) for batch in args.batches.split(",")):
        raise UserError(f"--batches {args.batches}: must be whole numbers from 1 on, as 256,32")
    cases = [(size, int(batch)) for size in args.sizes.split(",") for batch in args.batches.split(",")]
    rates = Rates(_lines_of(args.rates, "rates", "rates.py") if args.rates else None)
    for line in rates.devices:
        if (line.get("gemm_tflops") or 1.0) < 1:
            raise UserError(f"--rates {args.rates}: holds rates of a dry run on {line['name']}; measure them on a GPU")

    print("\n".join([*scenario_lines(cases, rates), "", *group_lines(cases, rates)]))
    if args.measured:
        lines = _lines_of(args.measured, "profile", "profile_steps.py")
        print("\n" + "\n".join(comparison_lines(lines, rates)))
    print("\n" + "\n".join(origin_lines(rates)))


def _lines_of(path: str, what: str, program: str) -> list[dict]:
    """Return the lines of a journal or of a suite's record. Raises UserError when none is of the kind `what`."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; write it with benchmarks/{program} --journal {path}")
    lines = _lines_of_record(path) if path.endswith(".json") else read_journal(path)
    if not any(line["what"] == what for line in lines):
        raise UserError(f"{path}: holds no lines of {program}; write some with benchmarks/{program} --journal {path}")
    return lines


def _lines_of_record(path: str) -> list[dict]:
    """Return the rows of a record's rates and profiles as the journal's lines from which they were built."""
    parts = [row.get("record") or {} for row in json.loads(Path(path).read_text()).get("rows", [])]
    rates = [row for part in parts if part.get("benchmark") == "rates" for row in part["rows"]]
    profiles = [row for part in parts if part.get("benchmark") == "profile" for row in part["rows"]]
    return rates + [row | {"what": what} for row in profiles if "groups" in row for what in ("step", "profile")]


def scenario_lines(cases: list[tuple[str, int]], rates: Rates) -> list[str]:
    """Return a Markdown table of what the code takes as it is and could take: ms, images/s, MFU."""
    cells = [("ms, images/s, MFU", "units a block", "bytes a weight", *(f"{size}/2 batch {n}" for size, n in cases))]
    for code in SCENARIOS:
        found = [predict(size, batch, code, rates) for size, batch in cases]
        units = sorted({round(code.units(Architecture.of(size)), 1) for size, _ in cases})
        steps = (f"{step.total:.1f}, {step.images_per_second:.0f}, {step.mfu:.1%}" for step in found)
        cells.append((code.name, " to ".join(map(str, units)), f"{code.bytes_a_weight:g}", *steps))
    return aligned(cells)


def group_lines(cases: list[tuple[str, int]], rates: Rates) -> list[str]:
    """Return a Markdown table of the milliseconds (launches) of each kernel group of the code as it is."""
    found = [predict(size, batch, TODAY, rates) for size, batch in cases]
    cells = [("the code as it is: ms (launches)", *(f"{size}/2 batch {n}" for size, n in cases))]
    for group in GROUPS:
        cells.append((group, *(f"{step.milliseconds[group]:.2f} ({step.launches.get(group, 0)})" for step in found)))
    cells.append(("between kernels", *(f"{step.idle:.2f}" for step in found)))
    cells.append(("host", *(f"{step.host:.2f}" for step in found)))
    return aligned(cells)


def comparison_lines(lines: list[dict], rates: Rates) -> list[str]:
    """Return a Markdown table for each profiled step: predicted and measured by kernel group, and their ratio."""
    text: list[str] = []
    for line in lines:
        if line["what"] != "profile":
            continue
        model, method, batch, *others = line["case"].split()
        size, _, patch = model.partition("/")
        if size not in SIZES or patch != "2" or method != "dit" or any(word.startswith("--") for word in others):
            text += [f"{line['case']}: not modelled, which is only DiT with patch 2 and default settings", ""]
            continue
        step = predict(size, int(batch), TODAY, rates)
        cells = [(line["case"], "predicted ms", "measured ms", "ratio", "predicted launches", "measured launches")]
        for group in dict.fromkeys((*GROUPS, *line["groups"])):
            launches, measured = line["groups"].get(group, (0, 0.0))
            counted = step.launches.get(group, 0)
            cells.append(
                (group, *_compared(step.milliseconds.get(group, 0.0), measured), str(counted), f"{launches:g}")
            )
        busy = sum(ms for _, ms in line["groups"].values())
        cells.append(
            ("between kernels", *_compared(step.total - sum(step.milliseconds.values()), line["ms"] - busy), "", "")
        )
        total = sum(launches for launches, _ in line["groups"].values())
        cells.append(("step", *_compared(step.total, line["ms"]), str(sum(step.launches.values())), f"{total:g}"))
        text += [*aligned(cells), ""]
    return text


def _compared(predicted: float, measured: float) -> tuple[str, str, str]:
    ratio = f"{measured / predicted:.2f}" if predicted > 0 and measured > 0 else ""
    return f"{predicted:.2f}", f"{measured:.2f}", ratio


def origin_lines(rates: Rates) -> list[str]:
    """Return a Markdown table of the rates that were used and where each comes from."""
    cells = [("rate", "value", "origin")]
    cells += [(name, _readable(rate.value), rate.origin) for name, rate in rates.used.items()]
    cells += [
        ("gap between kernels", f"{GAP * 1e6:g} us", "guess"),
        ("small kernel", f"{SMALL_KERNEL * 1e6:g} us", "guess"),
        ("launch on the host", f"{HOST_LAUNCH * 1e6:g} us", "guess"),
    ]
    return aligned(cells)


def _readable(value: float) -> str:
    return f"{value / 1e12:.4g} T"


if __name__ == "__main__":
    main()
