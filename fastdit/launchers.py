"""Read this process's rank from the variables of `srun` and `mpirun`, which do not set RANK as torch's launchers do.

Without this, each task of such a launcher would start a run of its own.
"""

import os
import re

from fastdit.errors import UserError

# Rank, number of ranks, rank on this node, number of ranks on this node. Open MPI and Hydra (MPICH, Intel MPI) may
# start their processes by `srun`, whose variables then count those instead, so Slurm comes last.
OPEN_MPI = "OMPI_COMM_WORLD_"
VARIABLES = {
    "mpirun": tuple(OPEN_MPI + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
DEFAULT_PORT = 29500
SLURM_PORTS = range(20_000, 32_000)  # below the ports that Linux gives to outgoing connections


def adopt_rank() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as `torchrun` does.

    Nothing changes if RANK is set, or without several tasks of `srun`, `mpirun` or `mpiexec`. Values of MASTER_ADDR and
    MASTER_PORT that are set are kept. Raises UserError if the address of rank 0 is not known.
    """
    launcher = next((name for name, (_, size, *_) in VARIABLES.items() if _whole(size, 1) > 1), None)
    if launcher is None or "RANK" in os.environ:
        return
    rank, size, local_rank, local_size = VARIABLES[launcher]
    world, local_world = _whole(size), _tasks_on_node() if launcher == "srun" else _whole(local_size, 1)
    place = {
        "RANK": _whole(rank),
        "WORLD_SIZE": world,
        "LOCAL_RANK": 0 if _has_one_gpu() else _whole(local_rank, 0),
        "LOCAL_WORLD_SIZE": local_world,
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _address(launcher, alone=local_world == world),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or _port(),
    }
    os.environ.update({name: str(value) for name, value in place.items()})


def first_host(nodes: str) -> str:
    """Return the first name of a list of nodes as Slurm writes it: "gpu[03-07,09],login" gives "gpu03"."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0])


def tasks_per_node(text: str) -> list[int]:
    """Return the numbers of tasks as Slurm writes them: "2(x3),1" gives [2, 2, 2, 1]."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]


def _whole(name: str, default: int | None = None) -> int:
    """Return the whole number in the variable `name`, or `default` without it. Raises UserError if it is no number."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text}: must be a whole number; start all ranks by one launcher, which sets it")
    return int(text)


def _tasks_on_node() -> int:
    """Return the number of Slurm's tasks on this node, at least 1."""
    counts, node = tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")), _whole("SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def _has_one_gpu() -> bool:
    """Return whether the launcher lets this process see one GPU alone, as `srun --gpus-per-task 1` does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return bool(visible) and "," not in visible


def _address(launcher: str, alone: bool) -> str:
    """Return the address of rank 0. alone: all ranks are on this node. Raises UserError if it is not known."""
    if alone:
        return "127.0.0.1"
    nodes = os.environ.get("SLURM_STEP_NODELIST") if launcher == "srun" else os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError(f"MASTER_ADDR: {launcher} does not tell the address of rank 0; set it to that node's name")
    return first_host(nodes)


def _port() -> int:
    """Return the port of rank 0: under Slurm one that other jobs and steps on the node do not take."""
    job, step = _whole("SLURM_JOB_ID", 0), os.environ.get("SLURM_STEP_ID", "")
    if not job:
        return DEFAULT_PORT
    return SLURM_PORTS[(7 * job + (int(step) if step.isdecimal() else 0)) % len(SLURM_PORTS)]
