"""Choose the device, join the other ranks, and let ranks exchange host-side values."""

import ctypes
import logging
import os
import signal
import socket
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import psutil
import torch
import torch.distributed as dist

from fastdit.config import Config
from fastdit.errors import UserError
from fastdit.methods.ranks import sum_over_ranks
from fastdit.rendezvous import join

ALONE = "FASTDIT_ALONE"  # environment variable: the port of one rank that no launcher started
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, from malloc.h


@dataclass
class Runtime:
    """Hold this process's rank and device, and exchange values with the other ranks.

    With one rank, every method returns at once.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    hosts: object = field(repr=False, default=None)  # gloo group of all ranks, which never waits for a GPU
    stop: "StopRequest | None" = field(repr=False, default=None)  # of a run that trains

    @property
    def first(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(group=self.hosts)

    def leave(self) -> None:
        """Leave the process group, so that no rank reports the end of another as an error."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def agree(self, values: list[float], op=dist.ReduceOp.MAX) -> list[float]:
        """Return host numbers reduced over ranks by `op`, in float64; every rank gets the same list."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self.hosts)
        return tensor.tolist()

    def share(self, value):
        """Return rank 0's `value`, any picklable object, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def decide(self, work):
        """Call `work()` on rank 0 and return its result on every rank. Raises its UserError on every rank."""
        result = None
        if self.first:
            try:
                result = work()
            except UserError as error:
                result = error
        result = self.share(result)
        if isinstance(result, UserError):
            raise result
        return result

    def stoppable(self, items: Iterable, count: int | None = None) -> Iterator:
        """Yield `items`, and look before each whether a rank was asked to stop. Raises Stopped on all ranks then.

        While a run trains it is a collective. Ranks may have different numbers of items, of which `count` is the
        largest; by default they have equal ones.
        """
        looked = 0
        for item in items:
            self._look()
            looked += 1
            yield item
        for _ in range(looked, count or 0):
            self._look()

    def _look(self) -> None:
        """Raise Stopped on all ranks if any was asked to stop; without a StopRequest do nothing."""
        if self.stop is not None and self.stop.granted():
            raise Stopped

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks of a tensor on the ranks' devices, on every rank."""
        return sum_over_ranks(tensor.clone())

    def gather(self, value) -> list | None:
        """Return the ranks' values, in rank order, on rank 0, and None elsewhere."""
        if self.world == 1:
            return [value]
        parts = [None] * self.world if self.first else None
        dist.gather_object(value, parts, dst=0, group=self.hosts)
        return parts


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that `--device` names, and make it the current one if it is a GPU.

    name: "auto" (a GPU if there is one), "cpu", "cuda" (the GPU with the number `local_rank`), or any other name that
        torch knows, such as "cuda:1".

    Raises UserError if the device cannot be used here.
    """
    kind = _resolve(name)
    try:
        device = torch.empty(0, device=f"cuda:{local_rank}" if kind == "cuda" else kind).device
    except (RuntimeError, AssertionError) as error:  # an unknown kind of device, or one that this torch lacks
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); give cpu or cuda") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def on_gpu(config: Config) -> bool:
    """Return whether the run uses a GPU. Raises UserError if `config.device` asks for one and there is none."""
    return _resolve(config.device) == "cuda"


def _resolve(name: str) -> str:
    """Return the name of a device, "auto" replaced by what is here. Raises UserError for "cuda" without a GPU."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or install a CUDA build of torch"
        )
    if name == "auto":
        return "cuda" if available else "cpu"
    return name


def start(config: Config) -> Runtime:
    """Join the ranks that a launcher started; a plain `python` is one rank. Raises UserError.

    `deepspeed` and `torchrun` set RANK and its kin; `fastdit.launchers` does so for `srun` and `mpirun`.
    """
    # Import DeepSpeed for the kind of device that is used.
    gpu = on_gpu(config)
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"
    import deepspeed  # reads DS_ACCELERATOR when imported

    _quiet()

    # Read this process's place from the environment, and prepare its device.
    alone = ALONE in os.environ and os.environ[ALONE] == os.environ.get("MASTER_PORT")
    if alone or "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
        os.environ[ALONE] = os.environ["MASTER_PORT"]  # a later start here or in a child needs another port
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = choose_device(config.device, local_rank)
    if not gpu:
        from fastdit.training.deepspeed_internals import disable_shared_memory_op

        keep_memory()
        disable_shared_memory_op()

    # Set the number of CPU threads, and join the process group.
    torch.set_num_threads(config.threads or _fair_threads())
    join("nccl" if gpu else "gloo")
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)  # takes the group that is there
    hosts = dist.new_group(backend="gloo") if world > 1 else None
    return Runtime(rank, world, local_rank, device, hosts)


def start_sampling(config: Config) -> Runtime:
    """Join the ranks as `start` does, but for commands that do not train. Raises UserError.

    One rank alone needs no process group, and so none of DeepSpeed, whose import takes seconds.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return start(config)
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_memory()
    torch.set_num_threads(config.threads or _fair_threads())
    return Runtime(0, 1, 0, device)


def keep_memory() -> None:
    """Let glibc keep the memory that CPU tensors free.

    By default it returns large blocks to the kernel and gets them back page by page. On two cores of an AMD EPYC, a
    step of SD-DiT-S/2 in fp32 (batch 2) took 300,000 page faults and 0.5 s of system time, and takes 0.03 s with this.
    """
    allocator = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if allocator:
        allocator(M_MMAP_MAX, 0)
        allocator(M_TRIM_THRESHOLD, -1)


def _fair_threads() -> int:
    """Return this rank's share of the cores that it may run on.

    OMP_NUM_THREADS is not read, because launchers either leave it unset or set it to 1 whatever the number of cores.
    Slurm may bind each rank to cores of its own; then this rank may run on no others.
    """
    cores, ranks = len(os.sched_getaffinity(0)), ranks_here()
    bound = cores * ranks <= int(os.environ.get("SLURM_CPUS_ON_NODE", 0))
    return cores if bound else max(1, cores // ranks)


def ranks_here() -> int:
    """Return the number of ranks that the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _free_port() -> str:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _quiet() -> None:
    """Silence log lines and warnings that a user cannot act on."""
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


class Stopped(Exception):
    """End sampling or an evaluation on all ranks, because one of them was asked to stop."""


class StopRequest:
    """Catch SIGTERM and Ctrl-C, so that all ranks stop together at the end of a step.

    `name` is the cause, or None. Launchers may send several signals, of which the first counts. SIGTERM to the
    `deepspeed` command ends only that process and reaches no rank, so the end of the launcher is a cause too. A
    launcher that waits for its ranks gives them 30 seconds (`deepspeed` and `torchrun`), and then kills them.
    """

    def __init__(self, runtime: Runtime):
        """Catch the signals, and let `runtime.stoppable` look for them."""
        self.runtime = runtime
        runtime.stop = self
        self.name: str | None = None
        self.launchers = _launchers()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number, frame) -> None:
        self.name = self.name or signal.Signals(number).name

    def granted(self) -> bool:
        """Return whether any rank was asked to stop. It is a collective, with the same answer on every rank."""
        if self.launchers != _launchers():
            self.name = self.name or "the end of its launcher"
        return bool(self.runtime.agree([float(self.name is not None)])[0])


def _launchers() -> list[int]:
    """Return the ids of the launcher's processes above this rank: two of `deepspeed`, one of `torchrun`, or none."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [os.getppid()]
    try:
        starter = psutil.Process().parent()
        return [starter.pid, starter.ppid()] if starter and "deepspeed.launcher.launch" in starter.cmdline() else []
    except psutil.Error:  # the launcher ended during the look-up
        return []
