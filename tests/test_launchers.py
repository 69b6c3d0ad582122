"""Ranks of other launchers than torch's: the variables of srun and mpirun, and two nodes played by two launchers."""

import os
import shlex
import sys

import pytest
from launching import TINY, Launched, free_port, metrics

from fastdit import distributed, launchers
from fastdit.errors import UserError

# What Slurm 22.05 sets in task 3 of `srun -N3 -n5`, and Open MPI 4.1 in process 1 of 2 on one node.
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_JOB_NODELIST": "gpu[01-05]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def adopt(monkeypatch):
    """Return a function that adopts the rank which the given variables tell, and returns the place as a dict."""
    for name in (*os.environ,):
        if name in PLACE or name == "CUDA_VISIBLE_DEVICES" or name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_")):
            monkeypatch.delenv(name)

    def adopt(**variables: str) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", {**os.environ, **variables})
        launchers.adopt_rank()
        return {name: os.environ[name] for name in PLACE if name in os.environ}

    return adopt


def test_a_task_of_slurm(adopt):
    place = adopt(**SLURM)
    port = place.pop("MASTER_PORT")
    assert place == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu03",
    }
    assert 20_000 <= int(port) < 32_000


def test_steps_and_jobs_of_slurm_have_ports_of_their_own(adopt):
    ports = []
    for job, step in (("1234", "0"), ("1234", "1"), ("1235", "0"), ("1236", "4294967290")):
        ports.append(adopt(**SLURM | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})["MASTER_PORT"])
        for name in PLACE:
            del os.environ[name]
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize("visible", ["0", "GPU-8932f937"])
def test_a_task_with_one_gpu_of_its_own(adopt, visible):
    assert adopt(**SLURM, CUDA_VISIBLE_DEVICES=visible)["LOCAL_RANK"] == "0"


@pytest.mark.parametrize("visible", ["", "0,1"])
def test_a_task_that_shares_its_nodes_gpus(adopt, visible):
    assert adopt(**SLURM, CUDA_VISIBLE_DEVICES=visible)["LOCAL_RANK"] == "1"


def test_processes_of_mpirun_on_one_node(adopt):
    assert list(adopt(**OPEN_MPI).values()) == ["1", "2", "1", "2", "127.0.0.1", "29500"]


def test_mpirun_within_a_job_of_slurm(adopt):
    """Open MPI starts its daemons by srun, whose variables are not those of the ranks."""
    daemon = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    place = adopt(**daemon, **OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "7", "OMPI_COMM_WORLD_SIZE": "8"})
    assert (place["RANK"], place["WORLD_SIZE"], place["MASTER_ADDR"]) == ("7", "8", "gpu01")


def test_mpiexec_on_several_nodes_needs_an_address(adopt):
    with pytest.raises(UserError, match=r"^MASTER_ADDR: mpiexec does not tell the address of rank 0; set it"):
        adopt(**HYDRA)
    place = adopt(**HYDRA, MASTER_ADDR="head", MASTER_PORT="4000")
    assert list(place.values()) == ["1", "4", "1", "2", "head", "4000"]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_ID": "1",
            "SLURM_TASKS_PER_NODE": "1(x2)",
        },  # sbatch's script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["none", "batch script", "one task", "one process"],
)
def test_one_process_is_left_alone(adopt, variables):
    assert adopt(**variables) == {}


def test_the_ranks_of_torchrun_within_a_task_of_slurm_are_kept(adopt):
    assert adopt(**SLURM, RANK="9", WORLD_SIZE="10") == {"RANK": "9", "WORLD_SIZE": "10"}


@pytest.mark.parametrize("text", ["x", "-1", "", "1.5"])
def test_a_variable_that_is_no_number(adopt, text):
    with pytest.raises(
        UserError, match=f"^SLURM_PROCID={text}: must be a whole number; start all ranks by one launcher"
    ):
        adopt(**SLURM | {"SLURM_PROCID": text})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-07,09],login", "gpu03"),
        ("a[7,9]-b[1-2],c", "a7-b1"),
        ("r-1[0-3]", "r-10"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert launchers.first_host(nodes) == first


def test_slurms_numbers_of_tasks():
    assert launchers.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert launchers.tasks_per_node("4") == [4]
    assert launchers.tasks_per_node("") == []


@pytest.mark.parametrize(
    ("cores", "node", "ranks", "threads"),
    [(4, 8, 2, 4), (8, 8, 2, 4), (1, 8, 8, 1), (8, 0, 2, 4), (2, 0, 4, 1)],
    ids=["bound by Slurm", "not bound", "one core each", "no Slurm", "more ranks than cores"],
)
def test_threads_of_a_rank(monkeypatch, cores, node, ranks, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(node))
    assert distributed._fair_threads() == threads


def both(first: str, second: str) -> list[str]:
    """Return a command that runs two others at once, and fails if one does."""
    return ["bash", "-c", f"({first}) & one=$!; ({second}) & two=$!; wait $one && wait $two"]


def node_commands(launcher: str, port: str, folder) -> list[str]:
    """Return the commands that start a run of two ranks on two nodes, both of them this machine."""
    train = ["fastdit/train.py", *TINY, "--sample.agreement", "0", "--steps", "2", "--out", str(folder / "run")]
    if launcher == "torchrun":
        rendezvous = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
        return [shlex.join(["torchrun", *rendezvous, "--node_rank", str(node), *train]) for node in (0, 1)]
    if launcher == "deepspeed":
        (folder / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
        nodes = ["--hostfile", str(folder / "hosts"), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
        return [shlex.join(["deepspeed", *nodes, "--node_rank", str(node), *train]) for node in (0, 1)]
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "localhost,other"}
    step |= {"SLURM_LOCALID": "0", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "MASTER_PORT": port}
    tasks = [step | {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)} for node in (0, 1)]
    return [shlex.join(["env", *(f"{k}={v}" for k, v in task.items()), sys.executable, *train]) for task in tasks]


@pytest.mark.launch
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
def test_one_run_on_two_nodes(launcher, tmp_path):
    """Case: two tasks of srun started two runs into one folder."""
    command = both(*node_commands(launcher, free_port(), tmp_path))
    with Launched(command, tmp_path / "log") as started:
        outcome = started.wait().succeeded()
    assert "x 2 ranks" in outcome.text
    assert outcome.text.count("step 2/2") == 1
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
