"""Runs that several tests look at, and a process that every file of tests finds as the first one did."""

import os
import signal
from pathlib import Path

import kernel_checks  # noqa: F401 - before anything imports triton: it may choose the interpreter
import pytest
import torch
from launching import RECIPE, deepspeed, run, torchrun

STARTERS = {"zero2": torchrun}  # every other by deepspeed


@pytest.fixture(scope="module", autouse=True)
def as_it_was():
    """Restore what a command that runs in this process changes: variables, threads, handlers and process group."""
    before, threads = dict(os.environ), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """`straight(ds_config)`: the folder of RECIPE on 2 ranks, from the first step to the last without a stop."""
    folders: dict[str, Path] = {}

    def trained(ds_config: str) -> Path:
        if ds_config not in folders:
            base = tmp_path_factory.mktemp(ds_config)
            start = STARTERS.get(ds_config, deepspeed)
            run(start(*RECIPE, "--ds_config", ds_config, "--out", base / "run"), base / "log").succeeded()
            folders[ds_config] = base / "run"
        return folders[ds_config]

    return trained
