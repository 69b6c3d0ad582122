"""Train contenders for equal time on one device and judge them: `python benchmarks/timed_runs.py --journal FILE`.

One process trains and judges the runs of a plan, one after the other:

    rates         plain DiT at several learning rates
    contenders    every contender, plain DiT among them, at the best of those rates, all for the same time
    second seed   plain DiT and the best other contender once more

A contender is priced first, after its kernels are compiled, by a short run in a session that is thrown away. A run has
as many steps as its seconds buy at that price, its schedules span exactly those steps, and it begins with fresh
weights. Only training time counts, a method's own preparation such as a warm start included: not building, compiling,
sampling or judging. Time is wall time, also on a CPU.

Each finished run is a line of the journal at once, each point of its loss another. A run that the journal holds already
is not repeated, so a plan may go on after a kill, or on another machine. When the time left does not suffice for the
next run, the command says what remains and ends with code 0; the journal's last line of kind "timed plan" says it too.

timed_data.py prepares the data, timed_training.py trains, timed_judges.py judges, and timed_tables.py builds the record
and its tables.
"""

import gc
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil
import record as records
import torch
from convergence import read_contenders
from journal import Journal
from timed_data import Data, at_hand, checksum, opened, pack
from timed_judges import COUNTED_RATE, Reference, count_sampling, draw, judge_run
from timed_plan import BASELINE, CHOOSERS, Plan, Planned, count_steps, first_value
from timed_tables import timed_lines, timed_record
from timed_training import Price, SilentRuntime, machine_label, price_run, train, wait

from fastdit.command_line import OneLineParser
from fastdit.config import Config, parse
from fastdit.engine import build, runtime
from fastdit.errors import UserError, run_command

CONTENDERS = {
    BASELINE: "",
    "sd_dit": "--method sd_dit",
    "sadm": "--method sadm",
    "sd_dit+sadm": "--method sd_dit+sadm",
    "psi_align": "--method psi_align",
}
# As in the quickstart. The warm-up is a share of the run, so that it does not depend on a contender's price.
COMMON = "--noise.name flow --ema.kind power --ema.std 0.1 --schedule cosine --grad_clip 1"
PRICED_SHARE = 0.04  # of a run's seconds that pricing its step lasts
UNKNOWN = {"cuda": 25.0, "cpu": 6.0}  # seconds of a run beside training and sampling, before one was seen
MARGIN = 1.1  # on all estimates of time


def main(argv: list[str] | None = None) -> None:
    """Leave the process: 0, or 2 after a UserError."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the temporary folders
    run_command(_benchmark, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="timed_runs.py", description="Train contenders for equal time, and judge them.")
    add = parser.add_argument
    add("--budget", type=float, default=480.0, help="seconds after which the command has ended")
    add("--data", type=str, default="fashion_mnist", help="images or latents, or a file written by --pack")
    add("--size", type=int | None, default=None, help="height and width of images; default: the first image's own")
    add("--flip", type=bool, default=False, help="mirror half of the samples")
    add("--model", type=str, default="S", help="S, B, L or XL")
    add("--patch", type=int, default=2, help="side of a patch")
    add("--batch", type=int, default=256, help="samples of a step")
    add("--precision", type=str, default="auto", help="bf16, fp32, or auto (bf16 on a GPU)")
    add("--common", type=str, default="", help="more flags of fastdit/train.py for all runs")
    add("--warmup", type=float, default=0.05, help="share of each run's steps in which the learning rate rises")
    add("--rates", type=str, default="7e-4,2e-3,6e-3", help="learning rates that plain DiT tries, with commas")
    add("--rate_seconds", type=float, default=30.0, help="training time of each of these runs")
    add("--contenders", type=str, default=",".join(CONTENDERS), help="with commas: " + ", ".join(CONTENDERS))
    add("--contender", type=list[str], default=[], help="more, each NAME=FLAGS of fastdit/train.py")
    add("--seconds", type=float, default=55.0, help="training time of each contender")
    add("--seeds", type=str, default="0,1", help="with commas; all but the first are for plain DiT and the best other")
    add("--samples", type=int, default=5000, help="by which a contender is judged")
    add("--rate_samples", type=int, default=2000, help="by which a learning rate is judged")
    add("--guidance", type=str, default="1", help="scales at which samples are drawn, with commas; the first decides")
    add("--sample_steps", type=int, default=10, help="sampler steps")
    add("--points", type=int, default=20, help="of each run at which its loss is noted")
    add("--device", type=str, default="auto", help="auto, cpu or cuda")
    add("--threads", type=int, default=0, help="CPU threads; 0 takes all cores")
    add("--journal", type=str | None, default=None, help="append results to this JSON-lines file, and go on from it")
    add("--json", type=str | None, default=None, help="write the record")
    add("--pack", type=str | None, default=None, help="only write --data's images into this .tar.gz file, as JPEGs")
    return parser


def _benchmark(argv: list[str]) -> None:
    end = time.monotonic() - (time.time() - psutil.Process().create_time())  # imports take their part of the budget
    args = _parser().parse(_joined(argv))
    end += args.budget
    if args.pack:
        n, size = pack(args.data, records.writable("pack", args.pack))
        return print(f"{args.pack}: {n:,} images in {size / 1e6:.1f} MB")
    file = records.writable("json", args.json) if args.json else None
    with opened(args.data, args.size) as (source, described):
        plan, configs = _plan(args, described)
        journal = Journal(records.writable("journal", args.journal) if args.journal else None)
        remaining = plan.remaining(journal.lines)
        if remaining:
            with at_hand(source, described) as data, tempfile.TemporaryDirectory() as folder:
                runner = Runner(args, plan, data, Path(folder), journal, end, configs[BASELINE])
                command = shlex.join(["python", "benchmarks/timed_runs.py", *argv])
                device, settings = runner.ranks.device, {"data": data.name, **plan.settings, **_shown_settings(args)}
                journal.write("record", **records.start(command, device, settings, "timed runs"))
                remaining = runner.run_all(file)
                torch.distributed.destroy_process_group()
    journal.write("timed plan", remaining=[str(run) for run in remaining])
    record = timed_record(journal.lines)
    if file:
        records.write_json(record, file)
    print("\n" + "\n".join(timed_lines(record)))
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


def _plan(args, data: Data) -> tuple[Plan, dict[str, Config]]:
    """Build the plan, and each contender's settings to see that they are sound. Raises UserError."""
    for name in ("budget", "rate_seconds", "seconds", "points"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    for name in ("samples", "rate_samples"):
        if getattr(args, name) < 2:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 2")
    if args.patch < 1 or any(side % args.patch for side in data.shape[1:]):
        raise UserError(f"--patch {args.patch}: must divide the samples' {data.shape[1]}x{data.shape[2]}")
    if not 0 <= args.warmup < 1:
        raise UserError(f"--warmup {args.warmup}: is a share of a run's steps, from 0 to below 1")
    rates, scales = _numbers("rates", args.rates, float), _numbers("guidance", args.guidance, float)
    seeds = _numbers("seeds", args.seeds, int)
    if min(rates) <= 0:
        raise UserError(f"--rates {args.rates}: learning rates must be above 0")
    contenders = {BASELINE: ""}
    for name in filter(None, args.contenders.split(",")):
        if name not in CONTENDERS:
            raise UserError(f"--contenders {name}: unknown; choose of {', '.join(CONTENDERS)}")
        contenders[name] = CONTENDERS[name]
    contenders |= read_contenders(args.contender)

    settings = {
        "digest": data.digest, "shape": list(data.shape), "model": args.model, "patch": args.patch,
        "batch": args.batch, "flip": args.flip, "warmup": args.warmup, "common": args.common, "guidance": list(scales),
        "sample_steps": args.sample_steps,
    }  # fmt: skip
    costs = args.rate_seconds, args.seconds, args.rate_samples, args.samples
    # Every bad flag is told before anything runs.
    configs = {name: run_config(args, data, flags, rates[0], seeds[0], 1000) for name, flags in contenders.items()}
    gpu = runtime.on_gpu(configs[BASELINE])
    precision = configs[BASELINE].precision
    settings["dtype"] = precision if precision != "auto" else "bf16" if gpu else "fp32"
    settings["kind"] = "cuda" if gpu else "cpu"
    return Plan(contenders, rates, *costs, seeds, settings), configs


def _numbers(flag: str, text: str, kind: type) -> tuple:
    try:
        return tuple(dict.fromkeys(kind(word) for word in text.split(",")))
    except ValueError:
        raise UserError(f"--{flag} {text}: give numbers with commas between them") from None


def _shown_settings(args) -> dict:
    names = ("rates", "rate_seconds", "seconds", "samples", "rate_samples", "points")
    return {name: getattr(args, name) for name in names}


def run_config(args, data: Data, flags: str, lr: float, seed: int, steps: int, out: str = "runs/none") -> Config:
    """Return the settings of a run of `steps` steps. Its schedules end with its last step. Raises UserError.

    lr: for contenders whose flags do not have their own.
    """
    words = [
        "--model.size", args.model, "--model.patch", str(args.patch), "--batch", str(args.batch),
        "--precision", args.precision, "--device", args.device, "--threads", str(args.threads),
        "--data.flip", str(args.flip).lower(), "--sample.steps", str(args.sample_steps),
        *shlex.split(COMMON), *data.flags(), "--lr", repr(lr), *shlex.split(args.common), *shlex.split(flags),
        "--seed", str(seed), "--steps", str(steps), "--warmup", str(round(args.warmup * steps)), "--out", out,
    ]  # fmt: skip
    return parse(words)


class Runner:
    """Trains and judges runs in this process, until the plan is done or the time is up."""

    def __init__(self, args, plan: Plan, data: Data, folder: Path, journal: Journal, end: float, config: Config):
        self.args, self.plan, self.data, self.folder, self.journal, self.end = args, plan, data, folder, journal, end
        self.ranks = runtime.start(config)
        self.kind, self.device = self.ranks.device.type, self.ranks.device
        self.machine = machine_label(self.device)
        self.prices: dict[str, Price] = {}
        self.beside: dict[str, float] = {}  # seconds of each contender's last run beside training
        self.failed: set[Planned] = set()
        begun = time.perf_counter()
        base = run_config(args, data, "", 1e-3, 0, 1)
        self.reference = Reference.read(data, base, max(plan.samples, plan.rate_samples), self.device)
        print(f"{data.name}: {data.n:,} samples; references read in {time.perf_counter() - begun:.1f} s", flush=True)

    def run_all(self, file: Path | None) -> list[Planned]:
        """Run what remains of the plan while there is time. Return the runs that are left."""
        while True:
            # What raised an exception is left out until the next call; it may be this machine's fault.
            left = [run for run in self.plan.remaining(self.journal.lines) if run not in self.failed]
            ready = [run for run in left if run.known]
            if not ready:
                break
            needed, time_left = self._needed(ready[0]), max(0.0, self.end - time.monotonic())
            if needed > time_left:
                print(f"{ready[0]}: not begun, for it needs {needed:.0f} s and {time_left:.0f} s are left", flush=True)
                break
            self._run(ready[0])
            if file:
                records.write_json(timed_record(self.journal.lines), file)
        return self.plan.remaining(self.journal.lines)

    def _needed(self, run: Planned) -> float:
        """Estimate a run's seconds with pricing and judging."""
        if run.contender in self.beside:  # measured, maybe with more or fewer samples
            return MARGIN * (run.seconds + self.beside[run.contender])
        config = self._config(run, 1000)
        network = build.build_network(config, build.shape_of(config, self.data.classes))
        flops = count_sampling(network, config, run.samples, self.plan.settings["guidance"])
        seen = max(self.beside.values(), default=UNKNOWN[self.kind])
        return MARGIN * (run.seconds * (1 + PRICED_SHARE) + seen + flops / COUNTED_RATE[self.kind])

    def _config(self, run: Planned, steps: int) -> Config:
        return run_config(self.args, self.data, run.flags, run.lr, run.seed, steps, str(self.folder))

    def _run(self, run: Planned) -> None:
        """Price, train and judge one run, and write its line, also where it failed."""
        begun = time.monotonic()
        try:
            fields = self._measure(run)
        except Exception as error:  # a result, not the end of the plan
            if isinstance(error, UserError) and run.contender == BASELINE:
                raise
            traceback.print_exc()
            self.failed.add(run)
            self.journal.write("run failed", asked=self.plan.asked(run), failed=records.failure(error))
            print(f"{run}: {records.failure(error)}", flush=True)
            return
        finally:
            self._free()
        self.beside[run.contender] = time.monotonic() - begun - fields["seconds"]
        self.journal.write("run", asked=self.plan.asked(run), **fields)
        print(f"{run}: {_shown(fields)}", flush=True)

    def _free(self) -> None:
        """Give back the memory of a session, whose parts refer to each other."""
        gc.collect()
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, run: Planned) -> dict:
        """Return the fields of a finished run's line."""
        from fastdit.engine.session import Session

        if run.contender not in self.prices:
            self._price(run)
        price = self.prices[run.contender]
        steps = count_steps(run.seconds, price.step, price.fixed)

        # Train from fresh weights, for exactly as many steps as the schedules have.
        began = time.perf_counter()
        session = Session(self._config(run, steps), SilentRuntime.like(self.ranks))
        self._check_data(session)
        building = time.perf_counter() - began
        stamp = round(time.time(), 3)
        fields = {"phase": run.phase, "contender": run.contender, "lr": session.config.lr, "seed": run.seed}

        def note(step: int, seconds: float, values: dict[str, float]) -> None:
            values = {name: float(f"{value:.6g}") for name, value in values.items()}
            self.journal.write("run point", **fields, began=stamp, step=step, seconds=round(seconds, 3), **values)

        seconds, diverged = train(session, self.args.points, note)
        rate = (diverged or steps) * session.run.plan.batch / seconds
        fields |= {
            "steps": steps, "seconds": round(seconds, 3), "planned_seconds": run.seconds, "price": price.step,
            "fixed_s": price.fixed, "images_per_s": round(rate, 2), "machine": self.machine, "began": stamp,
            "build_s": round(building, 2), "flags": run.flags,
        }  # fmt: skip
        if diverged:
            session.run.loader.close()
            return fields | {"failed": f"diverged at step {diverged}"}
        return fields | self._judge(session, run)

    def _price(self, run: Planned) -> None:
        """Measure what a contender costs, in a session that is thrown away."""
        from fastdit.engine.session import Session

        began = time.perf_counter()
        session = Session(self._config(run, 10_000), SilentRuntime.like(self.ranks))
        price = price_run(session, PRICED_SHARE * run.seconds)
        session.run.loader.close()
        del session
        self._free()
        self.prices[run.contender] = price
        spent = {"warm_up_s": round(price.warm_up, 2), "total_s": round(time.perf_counter() - began, 2)}
        own = {"contender": run.contender, "price": price.step, "fixed_s": price.fixed, "rehearsed": price.rehearsed}
        self.journal.write("price", **own, **spent, machine=self.machine)
        print(f"{run.contender}: {price.step * 1e3:.2f} ms a step, after {price.warm_up:.1f} s of warm-up", flush=True)

    def _check_data(self, session) -> None:
        """Check that a run trains on the very samples of which the reference's images are a part."""
        if checksum(session.run.loader.held.views) != self.reference.checksum:
            raise RuntimeError("the reference's images are not those that the run trains on")

    def _judge(self, session, run: Planned) -> dict:
        """Sample and judge the EMA weights, in bf16 where training was: fp32 would take several times as long."""
        began = time.perf_counter()
        network = session.averaged_network()
        session.run.loader.close()
        if session.run.plan.precision == "bf16":
            network = network.bfloat16()
        scales = self.plan.settings["guidance"]
        sampled = draw(network, session.config, self.reference, run.samples, scales)
        wait(self.device)
        drawn = time.perf_counter()
        figures = judge_run(sampled, self.reference)
        wait(self.device)
        return {
            "figures": figures,
            "samples": run.samples,
            "nonfinite": sampled.nonfinite,
            "sampling_s": round(drawn - began, 2),
            "sampling_flops": count_sampling(network, session.config, run.samples, scales),
            "judging_s": round(time.perf_counter() - drawn, 2),
        }


def _shown(fields: dict) -> str:
    if "failed" in fields:
        return f"{fields['failed']} of {fields['steps']}"
    figures = {name: fields["figures"].get(name, {"skipped": ""}) for name in CHOOSERS}
    values = [f"{name} {first_value(figure):.4g}" for name, figure in figures.items() if "skipped" not in figure]
    spent = f"{fields['seconds']:.1f} s, sampled in {fields['sampling_s']:.1f} s, judged in {fields['judging_s']:.1f} s"
    return f"{fields['steps']} steps in {spent}; {', '.join(values)}"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
