"""Train, step by step. A step has no host sync: scalars leave the device at the log interval only."""

import shutil
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastdit.config import CONFIG_FILE, Config
from fastdit.distributed import Runtime, Stopped, StopRequest
from fastdit.errors import UserError
from fastdit.files import writing
from fastdit.kernels import AdamWEMA, SampleGenerator
from fastdit.methods.denoising import Denoising
from fastdit.rundir import checkpoint_files, eval_log
from fastdit.rundir.metrics_log import Recorder, peak_flops, peak_memory
from fastdit.rundir.report import LiveReport
from fastdit.rundir.run_files import CHECKPOINTS, grid_file
from fastdit.training import checkpoint, schedules
from fastdit.training.deepspeed_config import DeepSpeedConfig
from fastdit.training.ema import EMA
from fastdit.training.ema_replicas import EMAReplicas
from fastdit.training.finite import find_nonfinite
from fastdit.training.meter import Meter
from fastdit.training.skipped import SkippedSteps


@dataclass
class Run:
    """Hold the parts and settings of a training run, and its training time."""

    config: Config
    deepspeed: DeepSpeedConfig
    runtime: Runtime
    folder: Path
    checkpoint_signature: dict
    engine: object
    optimizer: AdamWEMA
    method: Denoising
    loader: object
    meter: Meter
    ema_replicas: list[EMAReplicas] = field(default_factory=list)
    skipped_steps: SkippedSteps = field(default_factory=SkippedSteps)
    recorder: Recorder | None = None  # on rank 0 only
    report: LiveReport | None = None  # on rank 0 only
    seconds: float = 0.0  # training time over all starts, without sample grids, checkpoints and evaluations

    def state(self) -> dict:
        """Return this rank's part of a checkpoint, as JSON: its training time, position in the data, and means."""
        return {
            "seconds": self.seconds,
            "loader": self.loader.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state(self, state: dict, method_state: dict) -> None:
        """Go on from this rank's state and the method's state, after the engine has loaded its own."""
        self.method.load_state_dict(method_state)
        self.follow()
        self.seconds = state["seconds"]
        self.loader.load_state_dict(state["loader"])
        self.meter.load_state_dict(state["meter"])

    def save(self, step: int) -> Path:
        """Write the checkpoint of `step` finished steps, a collective. Return its folder.

        Raises UserError, and leaves the other checkpoints as they are, if a weight, EMA or moment is not finite.
        """
        # Refuse a state that is not finite. The trouble began with the steps that are being skipped, if there are any.
        method_state, streak = self.method.state_dict(), int(self.meter.streak)
        if fault := find_nonfinite(self.engine.module, self.optimizer, method_state, self.runtime):
            remedy = self.remedy(step + 1 - streak)
            raise UserError(f"step {step}: not finite: {fault}; no checkpoint of this step is kept; {remedy}")

        # While steps are being skipped, no older checkpoint is removed, since it may be the last from before.
        return checkpoint.save(
            self.trained,
            self.folder / CHECKPOINTS,
            step,
            rank_state=self.state(),
            method_state=method_state,
            meta=self.checkpoint_signature,
            keep=None if streak else self.config.keep_checkpoints,
        )

    def checkpoint_folder(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.folder / CHECKPOINTS / f"step-{step:08d}"

    def remedy(self, first_bad: int) -> str:
        """Return what to do when step `first_bad`, counted from 1, was the first to go wrong. A collective."""
        return self.runtime.decide(lambda: checkpoint_files.remedy(self.folder / CHECKPOINTS, first_bad))

    def restore(self, path: Path) -> int:
        """Load a checkpoint, a collective, and return the number of finished steps. Raises UserError."""
        step, *states = checkpoint.restore(
            self.trained,
            path,
            self.checkpoint_signature,
            accumulation=self.deepspeed.accumulation,
            trust=self.config.trust,
        )
        self.load_state(*states)
        return step

    @property
    def trained(self) -> checkpoint.Trained:
        """Return the parts whose state a checkpoint holds."""
        return checkpoint.Trained(self.engine, self.optimizer, self.sampled_network, self.runtime)

    @property
    def sampled_network(self) -> torch.nn.Module:
        """Return the part of the trained module that is sampled."""
        return self.method.sampled_network(self.engine.module)

    def follow(self, names: Container[str] | None = None) -> None:
        """Refresh the replicas of the EMAs `names`, which the optimizer has just updated; None refreshes all."""
        for replicas in self.ema_replicas:
            if names is None or replicas.name in names:
                replicas.refresh()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Leave a report of how the run ended, if the block does not write the final one."""
        try:
            yield
        except UserError as error:
            self._end_report(f"Stopped by an error: {error}")
            raise
        self._end_report("Stopped; --resume goes on")

    def _end_report(self, status: str) -> None:
        if self.report:
            self.report.end(status, self.say)

    def describe_skipped(self, step: int) -> str:
        """Return how many of the first `step` steps were skipped, over all starts of the run."""
        return f"skipped {int(self.meter.skipped)} of {step:,} steps, whose loss or gradient was not finite"

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.recorder:
            self.recorder.say(text)
        elif self.runtime.first:  # in a dry run, which records nothing
            print(text, flush=True)


@dataclass
class Clock:
    """Measure the training time between two lines of metrics, without pauses."""

    since: float = field(default_factory=time.perf_counter)
    steps: int = 0

    def read(self) -> tuple[float, int]:
        """Return the seconds and the number of steps since the last read."""
        seconds, steps = time.perf_counter() - self.since, self.steps
        self.since, self.steps = time.perf_counter(), 0
        return seconds, steps

    def paused(self, work, *args):
        """Return `work(*args)`, and do not count its time."""
        begun = time.perf_counter()
        result = work(*args)
        self.since += time.perf_counter() - begun
        return result


def train(run: Run, first_step: int, draw_samples, evaluate=lambda step: None) -> bool:
    """Train from `first_step`, the number of finished steps, to `config.steps`.

    `draw_samples(step)` and `evaluate(step)` are called at the intervals of `config`.

    Returns True at the end, or False after SIGTERM or Ctrl-C, when it has saved a checkpoint. Raises UserError when
    `max_nonfinite` steps in a row had a non-finite loss or gradient, or when a weight, EMA or moment to save is not
    finite.
    """
    config = run.config
    if first_step == 0:
        _prepare(run)
    stop, stop_every, done, saved = StopRequest(run.runtime), 1, first_step, first_step
    try:
        if first_step:
            _make_up(run, first_step, draw_samples, evaluate)
        clock = Clock()
        for step in range(first_step, config.steps):
            # Take one step.
            train_step(run, step)
            done, last = step + 1, step + 1 == config.steps
            clock.steps += 1
            if run.recorder:
                run.recorder.advance()

            # Write metrics, checkpoint, sample grid and evaluation when they are due.
            if done % config.log_every == 0 or last:
                stop_every = _record(run, clock, done)
                if run.report:
                    clock.paused(run.report.update, run.say)
            if done % config.save_every == 0 or last:
                clock.paused(_save, run, done)
                saved = done
            if _grid_is_due(config, done):
                clock.paused(draw_samples, done)
            if _evaluation_is_due(config, done):
                clock.paused(evaluate, done)

            # Stop if any rank was asked to.
            if done % stop_every == 0 and not last and stop.granted():
                raise Stopped
    except Stopped:
        path = run.checkpoint_folder(done) if saved == done else _save(run, done)
        run.say(f"stopped by {stop.name or 'a signal'} after step {done}; saved {path}; go on with --resume")
        run.say(run.describe_skipped(done))
        return False
    return True


def _grid_is_due(config: Config, done: int) -> bool:
    """Return whether a sample grid is drawn after `done` steps; the final one is not counted."""
    return bool(config.sample_every) and done % config.sample_every == 0 and done != config.steps


def _evaluation_is_due(config: Config, done: int) -> bool:
    """Return whether an evaluation is made after `done` steps."""
    return bool(config.eval.every) and (done % config.eval.every == 0 or done == config.steps)


def _make_up(run: Run, done: int, draw_samples, evaluate) -> None:
    """Make the sample grid and the evaluation of the resumed step that an end of the process prevented. A collective.

    A checkpoint is written before both of them.
    """
    folder, decide = run.folder, run.runtime.decide
    if _grid_is_due(run.config, done) and not decide(lambda: grid_file(folder, done).exists()):
        draw_samples(done)
    if _evaluation_is_due(run.config, done) and not decide(lambda: eval_log.find(folder, done) is not None):
        evaluate(done)


def _save(run: Run, step: int) -> Path:
    """Write a checkpoint by `run.save`, a collective. Return its folder.

    Raises UserError if the system refuses to write, or if the run's folder is gone. No part of the checkpoint is left.
    """
    run.runtime.decide(lambda: _check_folder(run.folder))
    final = run.checkpoint_folder(step)
    try:
        with writing(final):
            return run.save(step)
    except BaseException:
        if run.runtime.first:
            shutil.rmtree(final.with_name(f".{final.name}.partial"), ignore_errors=True)
        raise


def _check_folder(folder: Path) -> None:
    """Raise UserError if the run's folder was removed or renamed while the run trained."""
    if not (folder / CONFIG_FILE).exists():
        raise UserError(
            f"{folder}: was removed or renamed while the run trained into it; move it back and go on with --resume, "
            "or start a new run"
        )


def _prepare(run: Run) -> None:
    """Let the method prepare itself on the first batches, and rewind the loader. The time counts as training."""
    begun, state = time.perf_counter(), run.loader.state_dict()
    run.method.prepare(run.loader, run.config.steps, run.say)
    if run.loader.state_dict() != state:
        run.loader.load_state_dict(state)
        run.seconds += run.runtime.agree([time.perf_counter() - begun])[0]


def train_step(run: Run, step: int) -> None:
    """Take optimizer step `step` (0-based)."""
    config, meter = run.config, run.meter

    # Set the schedules' values for this step.
    decays = {EMA: schedules.ema_decay(config.ema, step), **run.method.begin_step(step, config.steps)}
    for group in run.optimizer.param_groups:
        group["lr"] = schedules.learning_rate(config, step)
        group["emas"] = decays
    run.optimizer.forget_nonfinite()

    # Accumulate gradients over the micro-batches; the last `engine.step` updates the weights and their EMAs.
    for _ in range(run.deepspeed.accumulation):
        draws = _sample_generator(run)
        x0, y = next(run.loader)
        outcome = run.method.loss(run.engine, x0, y, draws)
        run.optimizer.require_finite(outcome.loss)
        run.skipped_steps.note_loss(step + 1, outcome.loss)
        run.engine.backward(outcome.loss)
        run.engine.step()
        meter.add(outcome.terms)

    # Refresh the replicas of the EMAs, let the method end the step, and note whether the update was skipped.
    run.follow(decays)
    meter.add(run.method.end_step())
    skipped = _skipped(run)
    meter.step(skipped, step + 1)
    run.skipped_steps.note_step(step + 1, skipped)


def _sample_generator(run: Run) -> SampleGenerator:
    """Return the generator of the loader's next micro-batch, whose numbers follow from the samples' positions."""
    first = run.loader.position + run.runtime.rank * run.deepspeed.micro_batch
    return SampleGenerator(run.config.seed, first, run.runtime.device)


def _skipped(run: Run) -> torch.Tensor:
    """Return 1 if the last update was skipped because a loss or gradient is not finite, else 0, 0-dim float32."""
    if not run.engine.was_step_applied():  # DeepSpeed checked the norm and did not call the optimizer
        return torch.ones(())
    return run.optimizer.nonfinite


def _grad_norm(run: Run) -> torch.Tensor | float | None:
    """Return the norm of the last step's gradients before clipping; None if DeepSpeed does not compute it.

    The gradients are averaged over ranks and accumulated over micro-batches.
    """
    if run.deepspeed.clip is None or not run.engine.was_step_applied():
        return run.engine.get_global_grad_norm()
    return run.optimizer.grad_norm


def too_many_skipped(run: Run, first_bad: int, count: int) -> UserError:
    """Return the error for `count` skipped steps in a row from step `first_bad`, counted from 1. A collective."""
    return UserError(
        f"step {first_bad}: loss or gradient not finite, and so for {count} steps in a row (all skipped); "
        f"{run.remedy(first_bad)}"
    )


def _record(run: Run, clock: Clock, step: int) -> int:
    """Write one line of metrics. Return the number of steps in about a second, after which to check for a stop.

    It is a collective. Raises UserError after `max_nonfinite` skipped steps in a row.
    """
    # Collect the running means, times and rates.
    values = run.meter.read()  # waits for the device
    seconds, steps, memory = run.runtime.agree([*clock.read(), peak_memory(run.runtime.device)])
    worst, first_bad = values.pop("worst_streak"), values.pop("first_bad")
    run.seconds += seconds
    images = run.deepspeed.batch * steps
    values |= {
        "lr": schedules.learning_rate(run.config, step - 1),
        "images": run.deepspeed.batch * step,
        "images_per_sec": images / seconds,
        "seconds_per_step": seconds / steps,
        "seconds": run.seconds,
        "memory_gb": memory,
        "corrupt_skipped": run.loader.skipped,
    }
    if (norm := _grad_norm(run)) is not None:
        values["grad_norm"] = float(norm)
    if peak := peak_flops(run.runtime.device):
        flops = sum(run.method.flops(run.engine.module).values()) * images
        values["mfu"] = flops / seconds / run.runtime.world / peak
    if run.recorder:
        run.recorder.log(step, values)

    # Name the skipped steps, and end the run if too many steps in a row were skipped.
    run.skipped_steps.report(values["skipped"], run.runtime, run.loader, run.say)
    if worst >= run.config.max_nonfinite:
        raise too_many_skipped(run, int(first_bad), int(worst))
    return max(1, min(run.config.log_every, round(steps / seconds)))
