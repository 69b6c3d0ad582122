"""Find out which method trains best in equal time: `python benchmarks/convergence.py --journal FILE`.

One process trains and judges the runs of a plan (convergence_plan.py), one after the other:

    rates         plain DiT at several learning rates, then each other contender at some around the best of those
    contenders    every contender at its own best rate, all for the same time; the best of them with more seeds
    equal steps   the other contenders for as many steps as plain DiT has in that time

Contenders are priced first, in turns, after their kernels are compiled, in sessions that are thrown away. A run has as
many steps as its time buys at that price, its schedules span exactly those steps, and it begins with fresh weights. So
a machine that is busy for a while changes no result. Only training time counts, a method's own preparation such as a
warm start included: not building, compiling, sampling or judging. Time is wall time, also on a CPU.

Each finished run is a line of the journal at once, each point of its loss another. A run or price that the journal
holds is not measured again, so a plan may go on after a kill, or on another machine. When the time left does not
suffice for the next run, the command says what remains and ends with code 0; the journal's last line of kind "plan"
says it too.

convergence_data.py prepares the data, convergence_runner.py takes one run after the other, convergence_training.py
prices and trains, convergence_judges.py judges, and convergence_tables.py builds the record and its tables.
"""

import math
import os
import shlex
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import record as records
import torch
from convergence_data import Data, at_hand, opened, pack
from convergence_plan import BASELINE, Plan
from convergence_runner import Runner, run_config
from convergence_tables import CONVERGENCE, convergence_lines, convergence_record, write_chart
from journal import Journal

from fastdit import distributed, run_parts
from fastdit.command_line import OneLineParser
from fastdit.config import Config
from fastdit.errors import UserError, run_command

CONTENDERS = {
    BASELINE: "",
    "sd_dit": "--method sd_dit",
    "sd_dit_frozen": "--method sd_dit --sd_dit.momentum 1",
    "sd_dit_auto": "--method sd_dit --sd_dit.beta auto",
    "sd_dit_light": "--method sd_dit --sd_dit.beta auto --sd_dit.share 0.25",
    "sadm": "--method sadm",
    "sadm_fixed": "--method sadm --sadm.structure fixed",
    "sd_dit+sadm": "--method sd_dit+sadm",
    "psi_align": "--method psi_align",
    "psi_align_random": "--method psi_align --psi_align.psi_warm_steps 0",
    "psi_align+sadm": "--method psi_align+sadm",
    # Plain DiT with the squared error of the x0 prediction as its loss: an emphasis of high noise, and nothing else.
    "x0": "--noise.flow.weighting x0",
    # More noise and less noise: logit t ~ N(mean, 1).
    "more_noise": "--noise.flow.mean 0.5",
    "less_noise": "--noise.flow.mean -0.5",
    # Plain DiT with wider MLPs and as many parameters as the largest other contender trains: see _wide.
    "wide": "",
}
CHOSEN = "sd_dit,sd_dit_frozen,psi_align,sadm"


def main(argv: list[str] | None = None) -> None:
    """Leave the process: 0, or 2 after a UserError."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the temporary folders
    run_command(_benchmark, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="convergence.py", description="Train contenders for equal time, and judge them.")
    add = parser.add_argument
    add("--budget", type=float, default=480.0, help="seconds after which the command has ended")
    add("--data", type=str, default="fashion_mnist", help="images or latents, or a file written by --pack")
    add("--reference", type=str | None, default=None, help="compare with these samples, not with the training data")
    add("--size", type=int | None, default=None, help="height and width of images; default: the first image's own")
    add("--flip", type=bool, default=False, help="mirror half of the samples")
    add("--preset", type=str | None, default=None, help="settings of all runs; else those of this benchmark")
    add("--model", type=str | None, default=None, help="S, B, L or XL; default: the preset's, else S")
    add("--patch", type=int | None, default=None, help="side of a patch; default: the preset's, else 2")
    add("--batch", type=int | None, default=None, help="samples of a step; default: the preset's, else 256")
    add("--precision", type=str, default="auto", help="bf16, fp8, fp32, or auto (bf16 on a GPU)")
    add("--common", type=str, default="", help="more flags of fastdit/train.py for all runs")
    add("--warmup", type=float, default=0.05, help="share of each run's steps in which the learning rate rises")
    add("--unit", type=str, default="seconds", help="of the two budgets: seconds, or steps of plain DiT")
    add("--rates", type=str, default="7e-4,2e-3,6e-3", help="learning rates that plain DiT tries, with commas")
    add("--contender_rates", type=int, default=1, help="rates of each other contender around plain DiT's best; odd")
    add("--extend", type=int, default=0, help="most rates to try beyond an edge of a sweep at which the best lies")
    add("--rate_seconds", type=float, default=30.0, help="training time of each run of a sweep")
    add("--contenders", type=str, default=CHOSEN, help="beside dit, with commas, or all: " + ", ".join(CONTENDERS))
    add("--contender", type=list[str], default=[], help="more, each NAME=FLAGS of fastdit/train.py")
    add("--seconds", type=float, default=55.0, help="training time of each contender")
    add("--seeds", type=str, default="0,1", help="with commas; all contenders run with the first one")
    add("--finalists", type=int, default=1, help="contenders, the best beside plain DiT, that run with other seeds")
    add("--equal_steps", type=int, default=0, help="seeds with which all also run for plain DiT's number of steps")
    add("--samples", type=int, default=5000, help="by which a contender is judged")
    add("--rate_samples", type=int, default=2000, help="by which a learning rate is judged")
    add("--guidance", type=str, default="1", help="scales at which samples are drawn, with commas; the first decides")
    add("--sample_steps", type=int, default=10, help="sampler steps")
    add("--points", type=int, default=20, help="of each run at which its loss is noted")
    add("--device", type=str, default="auto", help="auto, cpu or cuda")
    add("--threads", type=int, default=0, help="CPU threads; 0 takes all cores")
    add("--journal", type=str | None, default=None, help="append results to this JSON-lines file, and go on from it")
    add("--json", type=str | None, default=None, help="write the record")
    add("--png", type=str | None, default=None, help="draw the chart")
    add("--pack", type=str | None, default=None, help="only write --data's images into this .tar.gz file, as JPEGs")
    add("--readme", type=bool, default=False, nargs="?", const=True, help="only put all records into RESULTS.md")
    return parser


def _benchmark(argv: list[str]) -> None:
    end = time.monotonic() - (time.time() - psutil.Process().create_time())  # imports take their part of the budget
    args = _parser().parse(_joined(argv))
    end += args.budget
    if args.readme:
        records.write_charts(CONVERGENCE)
        return records.write_results(section=CONVERGENCE)
    if args.pack:
        n, size = pack(args.data, records.writable("pack", args.pack))
        return print(f"{args.pack}: {n:,} images in {size / 1e6:.1f} MB")
    file = records.writable("json", args.json) if args.json else None
    chart = records.writable("png", args.png) if args.png else None
    with ExitStack() as stack:
        source, described = stack.enter_context(opened(args.data, args.size))
        other = stack.enter_context(opened(args.reference, args.size)) if args.reference else None
        plan, configs = _plan(args, described, other[1] if other else None)
        journal = Journal(records.writable("journal", args.journal) if args.journal else None)
        remaining = plan.remaining(journal.lines)
        if remaining:
            data = stack.enter_context(at_hand(source, described))
            compared = stack.enter_context(at_hand(*other)) if other else None
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            runner = Runner(args, plan, data, compared, Path(folder), journal, end, configs[BASELINE])
            command = shlex.join(["python", "benchmarks/convergence.py", *argv])
            settings = {"data": data.name, **plan.settings, **_shown_settings(args, configs[BASELINE])}
            journal.write("record", **records.start(command, runner.ranks.device, settings, "convergence"))
            remaining = runner.run_all(file)
            torch.distributed.destroy_process_group()
    journal.write("plan", remaining=[str(run) for run in remaining])
    record = convergence_record(journal.lines)
    if file:
        records.write_json(record, file)
    if chart:
        write_chart(record, chart)
    print("\n" + "\n".join(convergence_lines(record)))
    if remaining:
        names = "; ".join(map(str, remaining))
        print(f"\n{len(remaining)} runs remain, and the same command with the same --journal goes on: {names}")


def _joined(argv: list[str]) -> list[str]:
    """Return the words with `--common TEXT` as one word, for jsonargparse takes "--model.depth 4" for a flag."""
    words = list(argv)
    while "--common" in words[:-1]:
        at = words.index("--common")
        words[at : at + 2] = [f"--common={words[at + 1]}"]
    return words


def _plan(args, data: Data, reference: Data | None = None) -> tuple[Plan, dict[str, Config]]:
    """Build the plan, and each contender's settings to see that they are sound. Raises UserError."""
    for name in ("budget", "rate_seconds", "seconds", "points"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    for name, least in (("samples", 2), ("rate_samples", 2), ("extend", 0), ("finalists", 0), ("equal_steps", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.contender_rates < 1 or args.contender_rates % 2 == 0:
        raise UserError(f"--contender_rates {args.contender_rates}: must be an odd number, as 1 or 3")
    if args.unit not in ("seconds", "steps"):
        raise UserError(f"--unit {args.unit}: choose seconds or steps")
    if not 0 <= args.warmup < 1:
        raise UserError(f"--warmup {args.warmup}: is a share of a run's steps, from 0 to below 1")
    if reference and (reference.shape, reference.classes) != (data.shape, data.classes):
        raise UserError(
            f"--reference {args.reference}: has samples {reference.shape} of {reference.classes} classes, --data "
            f"{data.shape} of {data.classes}; give samples of the same shape and classes"
        )
    rates, scales = _numbers("rates", args.rates, float), _numbers("guidance", args.guidance, float)
    seeds = _numbers("seeds", args.seeds, int)
    if not all(0 < rate < math.inf for rate in rates):
        raise UserError(f"--rates {args.rates}: learning rates must be finite and above 0")

    # Every bad flag is told before anything runs.
    contenders = _contenders(args)
    configs = {name: run_config(args, data, flags, rates[0], seeds[0], 1000) for name, flags in contenders.items()}
    plain = configs[BASELINE]
    if contenders.get("wide") == "":
        contenders["wide"] = _wide(configs, data)
        configs["wide"] = run_config(args, data, contenders["wide"], rates[0], seeds[0], 1000)

    gpu = distributed.on_gpu(plain)
    settings = {
        "digest": data.digest, "shape": list(data.shape), "preset": args.preset, "model": args.model,
        "patch": plain.model.patch, "batch": plain.batch, "flip": args.flip, "warmup": args.warmup,
        "common": args.common, "guidance": list(scales), "sample_steps": args.sample_steps, "unit": args.unit,
        "reference": reference.digest if reference else None,
        "dtype": plain.precision if plain.precision != "auto" else "bf16" if gpu else "fp32",
        "kind": "cuda" if gpu else "cpu",
    }  # fmt: skip
    costs = args.rate_seconds, args.seconds, args.rate_samples, args.samples
    more = args.contender_rates, args.extend, args.finalists, args.equal_steps
    return Plan(contenders, rates, *costs, seeds, settings, *more), configs


def _contenders(args) -> dict[str, str]:
    """Return flags of fastdit/train.py by name. Raises UserError."""
    contenders = {BASELINE: ""}
    names = CONTENDERS if args.contenders == "all" else filter(None, args.contenders.split(","))
    for name in names:
        if name not in CONTENDERS:
            raise UserError(f"--contenders {name}: unknown; choose of {', '.join(CONTENDERS)}, or all")
        contenders[name] = CONTENDERS[name]
    for text in args.contender:
        name, separator, flags = text.partition("=")
        if not separator:
            raise UserError(f"--contender {text}: give NAME=FLAGS")
        contenders[name] = flags
    return contenders


def _wide(configs: dict[str, Config], data: Data) -> str:
    """Return the flags of a plain DiT with as many parameters as the largest of the contenders trains."""
    counts = {name: _count_parameters(config, data) for name, config in configs.items()}
    network = run_parts.build_network(configs[BASELINE], run_parts.shape_of(configs[BASELINE], data.classes))
    # Each column of fc1, with its bias and its row of fc2, has 2 width + 1 parameters.
    columns = (max(counts.values()) - counts[BASELINE]) / (network.depth * (2 * network.width + 1))
    mlp_width = 8 * max(1, round((network.mlp_width + columns) / 8))
    return f"--model.mlp_ratio {(mlp_width + 0.25) / network.width:.6g}"


def _count_parameters(config: Config, data: Data) -> int:
    module, _ = run_parts.build_training(config, run_parts.shape_of(config, data.classes))
    return sum(parameter.numel() for parameter in module.parameters())


def _numbers(flag: str, text: str, kind: type) -> tuple:
    try:
        return tuple(dict.fromkeys(kind(word) for word in text.split(",")))
    except ValueError:
        raise UserError(f"--{flag} {text}: give numbers with commas between them") from None


def _shown_settings(args, plain: Config) -> dict:
    names = ("rates", "contender_rates", "rate_seconds", "seconds", "samples", "rate_samples", "points", "threads")
    sizes = {"network": plain.model.dims() | {"patch": plain.model.patch}}
    return {name: getattr(args, name) for name in names} | sizes


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
