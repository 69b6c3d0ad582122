"""Train and judge the runs of a comparison in one process, until the plan is done or the time is up."""

import gc
import shlex
import time
import traceback
from pathlib import Path
from statistics import fmean

import record as records
import torch
from convergence_data import Data, checksum
from convergence_judges import COUNTED_RATE, Reference, count_sampling, draw, judge_run
from convergence_plan import BASELINE, CHOOSERS, EQUAL_STEPS, Plan, Planned, count_steps, first_value
from convergence_tables import convergence_record
from convergence_training import Price, SilentRuntime, machine_label, price_runs, train, wait
from journal import Journal

from fastdit import distributed, run_parts
from fastdit.config import Config
from fastdit.errors import UserError
from fastdit.parser import parse

# As in the quickstart. The warm-up is a share of the run, so that it does not depend on a contender's price.
COMMON = "--noise.name flow --ema.kind power --ema.std 0.1 --schedule cosine --grad_clip 1"
SHAPE = {"model": "S", "patch": 2, "batch": 256}  # without a preset
PRICED_SHARE = 0.04  # of a run's seconds that pricing a contender's step lasts
UNKNOWN = {"cuda": 25.0, "cpu": 6.0}  # seconds of a run beside training and sampling, before one was seen
MARGIN = 1.1  # on all estimates of time


def run_config(args, data: Data, flags: str, lr: float, seed: int, steps: int, out: str = "runs/none") -> Config:
    """Return the settings of a run of `steps` steps. Its schedules end with its last step. Raises UserError.

    lr: for contenders whose flags do not have their own.
    """
    sizes = {name: getattr(args, name) or (None if args.preset else SHAPE[name]) for name in SHAPE}
    flag = {"model": "--model.size", "patch": "--model.patch", "batch": "--batch"}
    words = [
        *(["--preset", args.preset] if args.preset else shlex.split(COMMON)),
        *(word for name, value in sizes.items() if value for word in (flag[name], str(value))),
        "--precision", args.precision, "--device", args.device, "--threads", str(args.threads),
        "--data.flip", str(args.flip).lower(), "--sample.steps", str(args.sample_steps),
        *data.flags(), "--lr", repr(lr), *shlex.split(args.common), *shlex.split(flags),
        "--seed", str(seed), "--steps", str(steps), "--warmup", str(round(args.warmup * steps)), "--out", out,
    ]  # fmt: skip
    return parse(words)


class Runner:
    """Trains and judges runs in this process, until the plan is done or the time is up.

    compared: the samples that the runs' are compared with; None: those that they train on.
    """

    def __init__(
        self, args, plan: Plan, data: Data, compared: Data | None, folder: Path, journal: Journal, end: float,
        config: Config,
    ):  # fmt: skip
        self.args, self.plan, self.data, self.folder, self.journal, self.end = args, plan, data, folder, journal, end
        self.ranks = distributed.start(config)
        self.kind, self.device = self.ranks.device.type, self.ranks.device
        self.machine = machine_label(self.device)
        self.unpriced: dict[str, Exception] = {}
        self.beside: dict[str, float] = {}  # seconds of each contender's last run beside training
        self.failed: set[Planned] = set()
        begun = time.perf_counter()
        base = run_config(args, compared or data, "", 1e-3, 0, 1)
        self.separate = compared is not None
        self.reference = Reference.read(compared or data, base, max(plan.samples, plan.rate_samples), self.device)
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
                print(
                    f"{ready[0]}: not begun, for it needs {needed:.0f} s and {time_left:.0f} s of --budget are left",
                    flush=True,
                )
                break
            self._run(ready[0])
            if file:
                records.write_json(convergence_record(self.journal.lines), file)
        return self.plan.remaining(self.journal.lines)

    def _needed(self, run: Planned) -> float:
        """Estimate a run's seconds with pricing and judging."""
        missing = len(self._missing_prices())
        seconds = self._seconds(run)
        pricing = missing * (PRICED_SHARE * seconds + UNKNOWN[self.kind])
        if run.contender in self.beside:  # measured, maybe with more or fewer samples
            return MARGIN * (pricing + seconds + self.beside[run.contender])
        config = self._config(run, 1000)
        network = run_parts.build_network(config, run_parts.shape_of(config, self.data.classes))
        flops = count_sampling(network, config, run.samples, self.plan.settings["guidance"])
        seen = max(self.beside.values(), default=UNKNOWN[self.kind])
        return MARGIN * (pricing + seconds + seen + flops / COUNTED_RATE[self.kind])

    def _seconds(self, run: Planned) -> float:
        """Return a run's training time by its price; for equal steps, that of its steps."""
        plain = self._price_of(BASELINE)
        if plain is None:  # before the first pricing
            return run.budget if self.plan.settings["unit"] == "seconds" else 0.0
        own = self._price_of(run.contender) or plain
        return own.fixed + own.step * self._steps(run, own, plain)

    def _steps(self, run: Planned, own: Price, plain: Price) -> int:
        """Return the steps that a run's budget buys."""
        seconds = run.budget if self.plan.settings["unit"] == "seconds" else run.budget * plain.step
        payer = plain if run.phase == EQUAL_STEPS else own
        return count_steps(seconds, payer.step, payer.fixed)

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
        from fastdit.training.session import Session

        self._price_missing()
        if run.contender in self.unpriced:
            raise self.unpriced[run.contender]
        price = self._price_of(run.contender)
        steps = self._steps(run, price, self._price_of(BASELINE))

        # Train from fresh weights, for exactly as many steps as the schedules have.
        began = time.perf_counter()
        session = Session(self._config(run, steps), SilentRuntime.like(self.ranks))
        self._check_data(session)
        building = time.perf_counter() - began
        stamp = round(time.time(), 3)
        fields = {"phase": run.phase, "contender": run.contender, "lr": session.config.lr, "seed": run.seed}
        points: list[dict[str, float]] = []

        def note(step: int, seconds: float, values: dict[str, float]) -> None:
            values = {name: float(f"{value:.6g}") for name, value in values.items()}
            points.append(values)
            self.journal.write("run point", **fields, began=stamp, step=step, seconds=round(seconds, 3), **values)

        seconds, diverged = train(session, self.args.points, note)
        rate = (diverged or steps) * session.run.deepspeed.batch / seconds
        fields |= {
            "steps": steps, "seconds": round(seconds, 3), "planned_seconds": round(price.fixed + price.step * steps, 3),
            "price": price.step, "fixed_s": price.fixed, "images_per_s": round(rate, 2), "machine": self.machine,
            "began": stamp, "build_s": round(building, 2), "flags": run.flags,
        }  # fmt: skip
        if diverged:
            session.run.loader.close()
            return fields | {"failed": f"diverged at step {diverged}"}
        return fields | {"gradient_ratios": gradient_ratios(points)} | self._judge(session, run)

    def _price_of(self, contender: str) -> Price | None:
        """Return a contender's price from the journal; None where it has none."""
        line = self.plan.price(self.journal.lines, contender)
        return line and Price(line["price"], line["fixed_s"], line["rehearsed"], line["warm_up_s"])

    def _missing_prices(self) -> list[str]:
        return [name for name in self.plan.contenders if not (self._price_of(name) or name in self.unpriced)]

    def _price_missing(self) -> None:
        """Price all contenders without a price, in turns. If that fails, as for lack of memory, one by one."""
        missing = self._missing_prices()
        if not missing:
            return
        print(f"pricing {', '.join(missing)} in turns", flush=True)
        try:
            self._price(missing)
        except Exception as error:
            print(f"Contenders are priced one by one, for in turns it failed: {records.failure(error)}", flush=True)
            for name in missing:
                self._free()
                try:
                    self._price([name])
                except Exception as own:
                    if isinstance(own, UserError) and name == BASELINE:
                        raise
                    traceback.print_exc()
                    self.unpriced[name] = own
        finally:
            self._free()

    def _price(self, names: list[str]) -> None:
        """Measure what contenders cost, in turns, in sessions that are thrown away."""
        from fastdit.training.session import Session

        began, sessions = time.perf_counter(), {}
        lr, seed = self.plan.rates[0], self.plan.seeds[0]
        for name in names:
            planned = Planned("prices", name, self.plan.contenders[name], lr, seed, self.plan.budget, 0)
            sessions[name] = Session(self._config(planned, 10_000), SilentRuntime.like(self.ranks))
        seconds = self.plan.budget if self.plan.settings["unit"] == "seconds" else 0.0
        prices = price_runs(sessions, PRICED_SHARE * seconds)
        for session in sessions.values():
            session.run.loader.close()
        spent = round((time.perf_counter() - began) / len(names), 2)
        for name, price in prices.items():
            own = {"contender": name, "price": price.step, "fixed_s": price.fixed, "rehearsed": price.rehearsed}
            own |= {"warm_up_s": round(price.warm_up, 2), "total_s": spent, "together": names}
            self.journal.write("price", asked=self.plan.asked_price(name), **own, machine=self.machine)
            print(f"{name}: {price.step * 1e3:.2f} ms a step, after {price.warm_up:.1f} s of warm-up", flush=True)

    def _check_data(self, session) -> None:
        """Check that a run trains on the very samples of which the reference's images are a part."""
        if not self.separate and checksum(session.run.loader.held.views) != self.reference.checksum:
            raise RuntimeError("the reference's images are not those that the run trains on")

    def _judge(self, session, run: Planned) -> dict:
        """Sample and judge the EMA weights, in bf16 where training was: fp32 would take several times as long."""
        began = time.perf_counter()
        network = session.ema_network()
        session.run.loader.close()
        if session.run.deepspeed.precision == "bf16":
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


def gradient_ratios(points: list[dict[str, float]]) -> dict[str, float]:
    """Return the means of all gradient ratios over the second half of a run: each term's to the denoising loss's."""
    later = points[len(points) // 2 :]
    names = dict.fromkeys(name for values in later for name in values if name.endswith("gradient_ratio"))
    return {name: fmean(values[name] for values in later if name in values) for name in names}


def _shown(fields: dict) -> str:
    if "failed" in fields:
        return f"{fields['failed']} of {fields['steps']}"
    figures = {name: fields["figures"].get(name, {"skipped": ""}) for name in CHOOSERS}
    values = [f"{name} {first_value(figure):.4g}" for name, figure in figures.items() if "skipped" not in figure]
    spent = f"{fields['seconds']:.1f} s, sampled in {fields['sampling_s']:.1f} s, judged in {fields['judging_s']:.1f} s"
    return f"{fields['steps']} steps in {spent}; {', '.join(values)}"
