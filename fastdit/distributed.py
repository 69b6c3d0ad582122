"""Where a run happens: device, ranks, threads, and the host-side agreement among ranks."""

import ctypes
import logging
import os
import signal
import socket
import warnings
from dataclasses import dataclass, field

import psutil
import torch
import torch.distributed as dist

from fastdit.config import Config
from fastdit.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass
class Runtime:
    """This process's place among the ranks, and its device."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    hosts: object = field(repr=False, default=None)  # gloo group: what hosts agree on never waits for a GPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.hosts)

    def leave(self) -> None:
        """Leave the process group, so that no rank complains about others."""
        dist.destroy_process_group()

    def agree(self, values: list[float], op=dist.ReduceOp.MAX) -> list[float]:
        """Reduce host numbers over the ranks; every rank gets the same list."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self.hosts)
        return tensor.tolist()

    def share(self, value):
        """Rank 0's `value` (any picklable object of ours) on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def decide(self, work):
        """Rank 0's work(), on every rank; or the UserError that it raised. The others wait."""
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

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, on every rank; they lie on the ranks' devices."""
        tensor = tensor.clone()
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list | None:
        """Every rank's `value`, in rank order, on rank 0; None elsewhere."""
        if self.world == 1:
            return [value]
        parts = [None] * self.world if self.first else None
        dist.gather_object(value, parts, dst=0, group=self.hosts)
        return parts


def on_gpu(config: Config) -> bool:
    """Whether the run uses a GPU. Raises UserError when one is asked for and there is none."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or install a CUDA build of torch"
        )
    return available and config.device != "cpu"


def start(config: Config) -> Runtime:
    """Join the ranks the launcher started (deepspeed or torchrun; a plain `python` is one rank)."""
    gpu = on_gpu(config)
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"
    import deepspeed  # reads DS_ACCELERATOR when imported

    _quiet()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if gpu:
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        keep_memory()
        # gloo serves CPU ranks as it is; DeepSpeed's shared-memory op would cost a minute of compiling at first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(config.threads or _fair_threads())
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)
    hosts = dist.new_group(backend="gloo") if world > 1 else None
    return Runtime(rank, world, local_rank, device, hosts)


def keep_memory() -> None:
    """Let glibc keep what tensors on CPUs free. It would give large blocks back to the kernel and take them page by
    page again: on two cores of an AMD EPYC 300,000 page faults a step of SD-DiT-S/2 in fp32 (batch 2), half a second
    of system time where now are 0.03."""
    allocator = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if allocator:
        allocator(M_MMAP_MAX, 0)
        allocator(M_TRIM_THRESHOLD, -1)


def _fair_threads() -> int:
    """This rank's share of the cores it may run on. Launchers set OMP_NUM_THREADS=1 or leave it, so it says little."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here())


def ranks_here() -> int:
    """How many ranks the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _quiet() -> None:
    """Only warnings that a user can act on."""
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


class StopRequest:
    """SIGTERM and Ctrl-C as a wish that the ranks grant together, at a step's end. Launchers send more than one: the
    first counts. SIGTERM to `deepspeed` itself ends that alone and reaches no rank, so its end is a wish too."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.name: str | None = None
        self.launchers = _launchers()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._wish)

    def _wish(self, number, frame):
        self.name = self.name or signal.Signals(number).name

    def granted(self) -> bool:
        """Whether any rank was asked to stop: the same answer everywhere."""
        if self.launchers != _launchers():
            self.name = self.name or "the end of its launcher"
        return bool(self.runtime.agree([float(self.name is not None)])[0])


def _launchers() -> list[int]:
    """Process ids of the `deepspeed` command's two parts above this rank; none under other launchers."""
    try:
        starter = psutil.Process().parent()
        return [starter.pid, starter.ppid()] if starter and "deepspeed.launcher.launch" in starter.cmdline() else []
    except psutil.Error:  # it ended while we looked
        return []
