"""Kill training runs at random moments, resume them, and compare them with a run that nobody disturbed.

    python benchmarks/random_kills.py --kills 100 --ranks 2 --out /tmp/kills     on a CPU, about 10 s a kill

A run of 60 small steps saves, evaluates and draws pictures all the time. It is started by the `deepspeed` command and
gets a SIGKILL, launcher and ranks at once, at a moment drawn evenly over the time that the undisturbed run took: during
imports, training, saving, evaluation or sampling. It is started again with `--resume` until it ends. Its metrics,
evaluations and last checkpoint must then be the undisturbed run's, to the bit. `--switch` starts again on another
number of ranks each time, and losses must agree within 1e-3.

It prints one line, and exits with 1 if a run differs.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
RUN = shlex.split(
    "--device cpu --threads 1 --data.source fashion_mnist --data.size 28 --data.channels 1 --data.threads 1 "
    "--model.depth 2 --model.width 32 --model.heads 2 --model.patch 7 --batch 12 --lr 2e-3 --eps 1e-4 --steps 60 "
    "--log_every 3 --save_every 5 --sample_every 20 --sample.steps 2 --sample.per_class 1 "
    "--eval.every 20 --eval.n 40 --eval.n_real 80 --keep_checkpoints 2"
)
TIMES = ("seconds", "seconds_per_step", "images_per_sec", "memory_gb", "mfu")  # what equal runs may differ in
LAST = "checkpoints/step-00000060"


def main() -> None:
    """Kill until `--kills` are done and the last run has ended; print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default 100)")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default 1)")
    parser.add_argument("--switch", action="store_true", help="resume on 1, 2 or 3 ranks, at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; it must not exist")
    args = parser.parse_args()
    args.out.mkdir(parents=True)

    # Let one run alone, and take its time.
    began = time.monotonic()
    straight = args.out / "straight"
    if (code := _start(straight, args.ranks).wait()) != 0:
        sys.exit(f"the undisturbed run failed with code {code}; see {straight}.log")
    duration = time.monotonic() - began

    # Kill others until all kills are done.
    rng, found, runs, wrong = random.Random(args.seed), Counter(), 0, []
    while sum(found.values()) < args.kills:
        folder = args.out / f"run-{runs}"
        runs += 1
        while not _ends(folder, rng, args, duration, found):
            pass
        wrong += [f"{folder.name}: {fault}" for fault in _differences(straight, folder, args.switch)]
        if not wrong:
            shutil.rmtree(folder)
    moments = ", ".join(f"{count} {moment}" for moment, count in found.most_common())
    end = "; ".join(wrong) or ("losses agree" if args.switch else "equal to the bit")
    print(f"{sum(found.values())} kills of {runs} runs on {args.ranks} ranks ({moments}): {end}")
    sys.exit(bool(wrong))


def _ends(folder: Path, rng: random.Random, args: argparse.Namespace, duration: float, found: Counter) -> bool:
    """Start or resume a run, and return whether it ended before its kill, or because no kill is left."""
    process = _start(folder, rng.choice([1, 2, 3]) if args.switch else args.ranks)
    try:
        wait = rng.uniform(0, duration) if sum(found.values()) < args.kills else None
        if code := process.wait(wait):
            sys.exit(f"{folder.name}: ended with code {code}; see {folder}.log")
        return True
    except subprocess.TimeoutExpired:
        _kill(process)
    log = Path(f"{folder}.log").read_text(errors="replace").rpartition("start of a process\n")[2]
    if list(folder.glob("checkpoints/.*.partial")):
        found["while saving"] += 1
    else:
        found["while training, evaluating or drawing" if "steps " in log else "before training"] += 1
    return False


def _start(folder: Path, ranks: int) -> subprocess.Popen:
    """Start the `deepspeed` command in a session of its own. Its output is appended to a log beside the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port]
    command = [*launcher, "fastdit/train.py", *RUN, "--ds_config", "zero1", "--resume", "--out", str(folder)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    with open(f"{folder}.log", "a") as log:
        log.write("start of a process\n")
        log.flush()
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _kill(process: subprocess.Popen) -> None:
    """Stop a launcher and all its ranks at once, then kill them, and wait until they are gone."""
    own = psutil.Process(process.pid)
    everyone = [own, *own.children(recursive=True)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for each in everyone:
            try:
                each.send_signal(number)
            except psutil.NoSuchProcess:
                continue
    process.wait()
    psutil.wait_procs(everyone, timeout=30)


def _differences(straight: Path, run: Path, switched: bool) -> list[str]:
    """Return in what a run differs from the undisturbed one."""
    one, other = _lines(straight / "metrics.jsonl"), _lines(run / "metrics.jsonl")
    if switched:
        losses, others = ({line["step"]: line["loss"] for line in lines if "loss" in line} for lines in (one, other))
        far = {s for s in losses.keys() & others.keys() if abs(losses[s] - others[s]) > 1e-3 * abs(losses[s])}
        wrong = sorted(far | (losses.keys() ^ others.keys()))
        return [f"losses of steps {wrong} differ"] if wrong else []
    found = [] if one == other else ["metrics differ"]
    if _evaluations(straight) != _evaluations(run):
        found.append("evaluations differ")
    names = sorted(str(path.relative_to(straight)) for path in (straight / LAST).rglob("*.safetensors"))
    return found + [name for name in names if (straight / name).read_bytes() != (run / name).read_bytes()]


def _lines(path: Path) -> list[dict]:
    """Return a run's metrics without its times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _evaluations(run: Path) -> list[dict]:
    """Return the figures of a run's evaluations, and what they depend on."""
    kept = ("step", "figures", "n", "real", "sampling")
    return [{key: entry[key] for key in kept} for entry in json.loads((run / "eval.json").read_text())]


if __name__ == "__main__":
    main()
