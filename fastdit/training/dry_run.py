"""Estimate time, memory and disk of a run from a few of its training steps, and write nothing.

The cost of a step may change along the run: SADM's loss begins late, SD-DiT's may end early or be in one of a few steps
only. So the steps are taken at several places of the schedule. Each place begins with a step that is not timed, in
which kernels are chosen and memory is allocated.
"""

import os
import resource
import shutil
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from tqdm import tqdm

from fastdit.errors import UserError
from fastdit.files import describe_bytes
from fastdit.rundir.checkpoint_files import checkpoints
from fastdit.rundir.run_files import CHECKPOINTS
from fastdit.training import checkpoint, loop
from fastdit.training.session import Session

PLACES = 4  # in the middle of as many equal parts of the run
TIMED = 4  # steps at each place, after the one that is not timed


class _Enough(Exception):
    """End a method's preparation, whose speed is known."""


def estimate(session: Session) -> None:
    """Take PLACES * (1 + TIMED) training steps of a session, and print what the run needs. A collective.

    The session is of no use for training afterwards. Raises UserError if the run has no step left, and where a training
    step raises it, or if all of the steps were skipped.
    """
    run, first, last = session.run, session.first_step, session.config.steps
    if first >= last:
        raise UserError(f"--dry_run: {run.folder} has all of its {last:,} steps; give more --steps")

    # Take the steps. The schedules end with the last step, so it is repeated where a short run has too few.
    untimed, timed, skipped = [], [], float(run.meter.skipped)
    for place in range(PLACES):
        at = first + (2 * place + 1) * (last - first) // (2 * PLACES)
        steps = [min(at + i, last - 1) for i in range(1 + TIMED)]
        untimed.append(_seconds_per_step(run, steps[:1]))
        timed.append(_seconds_per_step(run, steps[1:]))
    run.skipped_steps.report(float(run.meter.skipped), run.runtime, run.loader, run.say)
    count = PLACES * (1 + TIMED)
    # Let a run end that would skip its first steps one after the other.
    if float(run.meter.skipped) - skipped == count and last - first >= run.config.max_nonfinite:
        raise loop.too_many_skipped(run, first + 1, min(count, last - first, run.config.max_nonfinite))

    # Count the bytes of a checkpoint, and measure the memory.
    own = checkpoint.bytes_of_rank(run.trained, run.method.state_dict())
    (whole,), (largest,) = run.runtime.agree([own], dist.ReduceOp.SUM), run.runtime.agree([own])
    memory = _describe_memory(run)

    # Time the preparation before step 0, which changes the method, at last.
    batches = 0 if first else run.method.preparation_batches(last)
    preparation = _preparation_seconds(run, batches) if batches else 0.0

    epochs = run.deepspeed.batch * last / session.source.n
    found = {
        "parameters": f"{session.parameters:,}",
        "data": f"{session.source.n:,} samples; {last:,} steps are {epochs:.3g} epochs",
        "step": _describe_steps(run, untimed[0], timed),
        "time": _describe_time(statistics.mean(timed) * (last - first), preparation, first, last),
        "memory": memory,
        **_describe_disk(run, int(whole), int(largest), first),
    }
    run.say("\n".join(f"{name}: {text}" for name, text in found.items()))
    run.say(
        f"These are estimates from {PLACES * (1 + TIMED)} steps: a long run may be slower, and sample grids and "
        "evaluations need time and memory of their own. Nothing was written."
    )


def _wait(run: loop.Run) -> None:
    """Wait until the device has done its work."""
    if run.runtime.device.type == "cuda":
        torch.cuda.synchronize(run.runtime.device)


def _seconds_per_step(run: loop.Run, steps: list[int]) -> float:
    """Take training steps, and return the mean time of one on the slowest rank. A collective."""
    _wait(run)
    begun = time.perf_counter()
    for step in steps:
        loop.train_step(run, step)
    _wait(run)
    return run.runtime.agree([(time.perf_counter() - begun) / len(steps)])[0]


def _preparation_seconds(run: loop.Run, count: int) -> float:
    """Return how long the method's preparation on `count` batches would take. A collective.

    The method begins to prepare itself, and is stopped after a few batches.
    """
    times: list[float] = []

    def few_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in run.loader:
            _wait(run)
            times.append(time.perf_counter())
            if len(times) == 2 + TIMED:  # the first one is not timed
                raise _Enough
            yield batch

    begun = time.perf_counter()
    try:
        run.method.prepare(few_batches(), run.config.steps, lambda text: None)
        seconds = time.perf_counter() - begun
    except _Enough:
        seconds = count * (times[-1] - times[1]) / TIMED
    return run.runtime.agree([seconds])[0]


def _describe_steps(run: loop.Run, first: float, timed: list[float]) -> str:
    """Return a step's time in words. first: seconds of the first step; timed: seconds of a step at each place."""
    median = statistics.median(timed)
    places = ", ".join(f"{seconds:.3g}" for seconds in timed)
    return (
        f"{median:.3g} s, {run.deepspeed.batch / median:.3g} images/s (median of {places} s along the run; the first "
        f"step took {first:.3g} s)"
    )


def _describe_time(training: float, preparation: float, first: int, last: int) -> str:
    """Return the time of the steps `first` to `last` in words. training, preparation: seconds of both parts."""
    before = f", {tqdm.format_interval(preparation)} of it before step 0 to prepare the method" if preparation else ""
    whole = tqdm.format_interval(training + preparation)
    return f"{whole} for steps {first:,} to {last:,}{before}; without sample grids, evaluations and checkpoints"


def _describe_memory(run: loop.Run) -> str:
    """Return the peak of memory in words, the largest of all ranks. A collective."""
    device, agree = run.runtime.device, run.runtime.agree
    ranks = f" (the largest of {run.runtime.world} ranks)" if run.runtime.world > 1 else ""
    if device.type != "cuda":
        (resident,) = agree([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])
        return f"{describe_bytes(int(resident))} resident at the peak{ranks}"
    peaks = agree([torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)])
    allocated, reserved = (describe_bytes(int(peak)) for peak in peaks)
    total = describe_bytes(torch.cuda.get_device_properties(device).total_memory)
    return f"{allocated} allocated and {reserved} reserved at the peak, of the GPU's {total}{ranks}"


def _describe_disk(run: loop.Run, whole: int, largest: int, first: int) -> dict[str, str]:
    """Return lines on checkpoints and disk, by name, with a warning if the checkpoints cannot be written there.

    whole, largest: bytes of a checkpoint, and of the largest rank's part. first: the number of finished steps.
    """
    # Count the checkpoints. While one is written, all that stay are there too.
    config, old = run.config, checkpoints(run.folder / CHECKPOINTS)
    new = -(-config.steps // config.save_every) - first // config.save_every
    kept = min(config.keep_checkpoints, len(old) + new)
    most = whole * (kept + (len(old) + new > kept))
    ranks = f", at most {describe_bytes(largest)} a rank" if run.runtime.world > 1 else ""

    # Ask for the space where the run's folder is or would be.
    folder = run.folder.absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    held = sum(file.stat().st_size for path in old for file in path.rglob("*") if file.is_file())
    lines = {
        "checkpoint": f"{describe_bytes(whole)} ({whole:,} bytes of tensors){ranks}; {new:,} to write, of which "
        f"{kept} stay, and {describe_bytes(most)} at most at a time",
        "disk": f"{describe_bytes(free)} free in {place}",
    }
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        lines["warning"] = f"--out {run.folder}: cannot be written; choose another folder, or change its permissions"
    elif most > free + held:
        lines["warning"] = (
            f"--out {run.folder}: has no space for the checkpoints; free some, lower --keep_checkpoints, or choose "
            "another folder"
        )
    return lines
