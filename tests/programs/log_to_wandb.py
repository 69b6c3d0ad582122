"""A program of tests: sends 50 lines of metrics to Weights & Biases as training does, and meets the trouble named.

Its arguments: the run's folder, and `none` or a signal that the library's process wandb-core gets after the first line.
It prints JSON: the longest time of a call, the time of the end, the messages, and whether signal handlers changed.
"""

import json
import signal
import sys
import time
from pathlib import Path

import psutil

from fastdit.rundir import wandb_run
from fastdit.wandb_settings import WandbSettings

START_SECONDS = 4  # that W&B may take to answer; the time that a call would take if it waited


def main(folder: str, trouble: str) -> None:
    wandb_run.START_SECONDS, wandb_run.FINISH_SECONDS = START_SECONDS, 3
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    settings = WandbSettings("project")
    wandb_run.check(settings)
    run, longest = wandb_run.WandbRun(Path(folder), settings, {"lr": 0.1, "model.depth": 2}), 0.0
    for step in range(50):
        begun = time.perf_counter()
        run.log(step, {"loss": 1 / (step + 1)})
        longest = max(longest, time.perf_counter() - begun)
        if step == 0 and trouble != "none":
            wait_for_start(run)
            for child in psutil.Process().children():
                child.send_signal(signal.Signals[trouble])
    begun = time.perf_counter()
    run.close()
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    told = {"longest": longest, "end": time.perf_counter() - begun, "messages": run.take_messages()}
    print(json.dumps(told | {"handlers": before == after}))


def wait_for_start(run: wandb_run.WandbRun) -> None:
    """Wait until the library has begun the run."""
    end = time.monotonic() + 60
    while run._run is None and time.monotonic() < end:
        time.sleep(0.05)
    assert run._run is not None


if __name__ == "__main__":
    main(*sys.argv[1:])
