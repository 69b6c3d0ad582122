"""Runs that several tests look at, and a process that every file of tests finds as the first one did."""

import os
import signal
from pathlib import Path

import kernel_checks  # noqa: F401 - before anything imports triton: it may choose the interpreter
import pytest
import torch
from launching import RECIPE, deepspeed, forked, run, torchrun

LAUNCHERS = {"zero1": deepspeed, "zero2": torchrun}  # the ranks of every other one are forked
# The files that take minutes come first, so that no process is left alone with one of them at the end.
LONGEST = (
    *("test_train", "test_sd_dit_training", "test_gpu_suite", "test_sadm_training", "test_resume", "test_zero"),
    *(
        "test_made_up",
        "test_recipes",
        "test_sample",
        "test_evaluate",
        "test_tables",
        "test_qk_norm_rope",
        "test_dry_run",
        "test_stop",
    ),
    *("test_new_method", "test_convergence", "test_warm_start", "test_benchmarks", "test_run_lock", "test_elastic"),
    *("test_sample_files", "test_evaluate_images"),
    *("test_grad_checkpoint", "test_count_launches", "test_cache", "test_graphs", "test_psi_alignment", "test_rates"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first, and mark as slow what `make test-fast` leaves out.

    These are runs by a launcher, the longest files, benchmarks, and kernels in Triton's interpreter.
    """
    place = {name: k for k, name in enumerate(LONGEST)}
    for item in items:
        slow = item.path.stem in place or item.path.parent.name == "benchmarks" or "triton" in item.name
        if slow or item.get_closest_marker("launch"):
            item.add_marker("slow")
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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
            flags = [*RECIPE, "--ds_config", ds_config, "--out", base / "run"]
            if launcher := LAUNCHERS.get(ds_config):
                run(launcher(*flags), base / "log").succeeded()
            else:
                forked(*flags, ranks=2).succeeded()
            folders[ds_config] = base / "run"
        return folders[ds_config]

    return trained
