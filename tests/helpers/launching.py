"""Start real runs: the launchers in processes of their own, and quick one-rank runs forked from a server."""

import contextlib
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastdit.rundir.checkpoint_files import METHOD_FILE, SHARDS, sampled_weights
from fastdit.rundir.shards import PieceReader
from fastdit.rundir.state_files import load_state

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
PATIENCE = 300.0  # seconds; a run here takes a few, on a busy machine half a minute
MARK = "FASTDIT_TEST_RUN"
TIMES = {"seconds", "seconds_per_step", "images_per_sec", "memory_gb", "mfu"}  # what may differ between equal runs
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
# Of a launcher, or a `make`, that the tests themselves run under.
NOT_OURS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL"}
TINY = shlex.split(
    "--device cpu --threads 1 --data.source fashion_mnist --data.size 28 --data.channels 1 --data.threads 1 "
    "--model.depth 2 --model.width 32 --model.heads 2 --model.patch 7 --batch 8 --lr 2e-3 "
    "--log_every 1 --sample.steps 2 --sample.per_class 1"
)

# What a run imports, at its start or later.
PRELOADED = [
    "fastdit.train",
    "fastdit.evaluation.evaluator",
    "fastdit.evaluation.sample_grids",
    "fastdit.training.loop",
    "fastdit.data.pipeline",
    "fastdit.training.dry_run",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "docstring_parser",
    "matplotlib.backends.backend_agg",
    "narwhals.dataframe",
    "plotly.offline",
    "torch._dynamo",
]

# Every schedule at work, and a log interval that the checkpoint at half way cuts through. A large eps: some gradients
# are zero but for rounding (a key's bias cancels in a softmax), and AdamW must not blow that up.
RECIPE = shlex.split(
    f"{shlex.join(TINY)} --steps 40 --warmup 5 --schedule cosine --weight_decay 0.1 --eps 1e-4 "
    "--grad_clip 0.5 --ema.decay 0.8 --log_every 3 --save_every 20"
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, stdout and stderr together."""

    code: int
    text: str

    def succeeded(self) -> "Outcome":
        assert self.code == 0, self.text
        assert "Traceback" not in self.text, self.text
        return self


class Launched:
    """A command at work, in a process group of its own; used as a context manager that leaves nothing behind."""

    def __init__(self, command: list[str], log: Path):
        self.log, self.mark = log, uuid.uuid4().hex
        own = {MARK: self.mark, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
        kept = {key: value for key, value in os.environ.items() if key not in NOT_OURS}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=kept | THREADS | own,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell without job control lets its background jobs, such as a whole test run, ignore Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *error) -> None:
        self.kill()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All living processes of this command, adopted ones too."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to launcher and ranks at once: none gets to do anything more. Returns when all are gone."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in self.processes():
                process.send_signal(number)
        self.process.wait()
        end = time.monotonic() + PATIENCE
        while (left := self.processes()) and time.monotonic() < end:
            for process in left:  # one that takes its time to end, or was being born
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.01)

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait for `happened()`; fails when the command ends before or takes too long."""
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"ended before {what}:\n{self.text}"
            assert time.monotonic() < end, f"waited in vain for {what}:\n{self.text}"
            time.sleep(0.01)

    def wait(self, patience: float = PATIENCE) -> Outcome:
        """The command's end, and that of every process it started."""
        end = time.monotonic() + patience
        code = self.process.wait(patience)
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left, f"processes are left: {left}\n{self.text}"
        return Outcome(code, self.text)


def run(command: list[str], log: Path, patience: float = PATIENCE) -> Outcome:
    with Launched(command, log) as launched:
        return launched.wait(patience)


def python(*args) -> list[str]:
    return [sys.executable, *map(str, args)]


def deepspeed(*flags, ranks: int = 2, script: str = "fastdit/train.py") -> list[str]:
    where = ["--num_gpus", str(ranks), "--master_port", free_port()]
    return [str(SCRIPTS / "deepspeed"), *where, script, *map(str, flags)]


def torchrun(*flags, ranks: int = 2, script: str = "fastdit/train.py") -> list[str]:
    where = ["--nproc_per_node", str(ranks), "--master_port", free_port()]
    return [str(SCRIPTS / "torchrun"), *where, "--", script, *map(str, flags)]  # else it takes --run for its own


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def forked(*flags, ranks: int = 1, program: str = "fastdit.train") -> Outcome:
    """Run `python fastdit/train.py ...`, or another program's `main(argv)`, on each rank, and return how it ended.

    The ranks fork from a server that has done the slow imports. The code is the first one that is not 0.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(THREADS, DS_ACCELERATOR="cpu")
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"fastdit-{uuid.uuid4().hex}.log"
    launched = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    launched |= {"MASTER_PORT": free_port()}
    processes = []
    try:
        environment = dict(os.environ)  # the server keeps the one it was started with
        for rank in range(ranks):
            own = launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            argv = [str(flag) for flag in flags]
            processes.append(server.Process(target=_train, args=(program, argv, environment | own, str(log))))
            processes[-1].start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    try:
        codes = [-1 if process.exitcode is None else process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return Outcome(next((code for code in codes if code), 0), log.read_text())
    finally:
        log.unlink()


def on_ranks(ranks: int, function: Callable, *args, folder: Path) -> list:
    """Return what `function(rank, *args)` returns on each of `ranks` gloo ranks, one process each.

    The processes fork from a server: this one may have a process group of its own.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(_one_rank, (ranks, str(folder), function, args), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def _one_rank(rank: int, ranks: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(function(rank, *args), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def _train(program: str, argv: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see `Launched`
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)
    importlib.import_module(program).main(argv)


def metrics(folder: Path, untimed: bool = False) -> list[dict]:
    """The lines of a run's metrics; `untimed` leaves out what a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not (untimed and k in TIMES)} for line in lines]


def averages(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The EMA in a run's checkpoint."""
    return sampled_weights(checkpoint(folder, step))


def method_state(folder: Path, step: int) -> dict:
    """The method's state in a run's checkpoint."""
    return load_state(checkpoint(folder, step) / METHOD_FILE)


def pieces(folder: Path, step: int, kind: str = "weights") -> dict[str, torch.Tensor]:
    """One kind of state in a run's checkpoint, such as the weights in fp32, by name."""
    reader = PieceReader(checkpoint(folder, step) / SHARDS)
    return {name: reader.read_whole(kind, name) for name in reader.shapes(kind)}


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"
