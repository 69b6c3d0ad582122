"""What a budget of training time buys: `python benchmarks/convergence.py --set sd_dit --budget 150`.

Every contender is a run of fastdit/train.py with the same preset, data, batch and seeds, and as many steps as the
budget allows it. Steps are priced first: all contenders in one process, step by step in turns, the median of each. On
a CPU the price is processor time, so that a busy machine does not move the budget; on a GPU it is time. Schedules span
each run's own steps. Evaluation is not counted.

Who judges: convergence_judge.py; what is made of it: convergence_tables.py.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import record as records
import torch
from convergence_tables import BASELINE, COLUMNS, CONVERGENCE, lines

from fastdit.command_line import OneLineParser
from fastdit.config import parse
from fastdit.errors import UserError, run_command

ROOT = Path(__file__).parents[1]
SETS = {
    "sd_dit": {
        "sd_dit": "--method sd_dit",
        "sd_dit mask_token": "--method sd_dit --sd_dit.decoder extra --sd_dit.hidden_tokens mask_token",
        "sd_dit zeros": "--method sd_dit --sd_dit.hidden_tokens zeros",
        "sd_dit beta 0.01": "--method sd_dit --sd_dit.beta 0.01",
        "sd_dit beta 1": "--method sd_dit --sd_dit.beta 1",
    },
    "sadm": {
        "sadm fixed": "--method sadm --sadm.structure fixed",
        "sadm adversarial": "--method sadm",
    },
    "both": {"sd_dit+sadm": "--method sd_dit+sadm"},
    "psi_align": {
        "psi_align": "--method psi_align",
        "psi_align random psi": "--method psi_align --psi_align.psi_warm_steps 0",
        "psi_align+sadm": "--method psi_align+sadm",
    },
}


def main(argv: list[str] | None = None) -> None:
    """Leaves the process: 0, or 2 after a UserError."""
    run_command(_benchmark, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="convergence.py", description="Train contenders for an equal time, and judge them.")
    parser.add_argument("--set", type=str, default="sd_dit", help="with commas: " + ", ".join(SETS))
    parser.add_argument("--contender", type=list[str], default=[], help="more, each NAME=FLAGS of fastdit/train.py")
    parser.add_argument("--preset", type=str, default="quickstart", help="of all contenders")
    parser.add_argument("--common", type=str, default="", help="flags of all contenders")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds of training for each run")
    parser.add_argument("--seeds", type=str, default="0,1,2", help="with commas")
    parser.add_argument("--points", type=int, default=6, help="of each run at which its loss is taken")
    parser.add_argument("--samples", type=int, default=500, help="for class agreement, at the end of each run")
    parser.add_argument("--fd", type=int, default=0, help="samples for FD-lite0 at each point; 0 is off")
    parser.add_argument("--guidance", type=str, default="1,3", help="scales at which samples are drawn, with commas")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument(
        "--out", type=str, default="runs/convergence", help="folder of the runs; finished ones are kept"
    )
    parser.add_argument(
        "--stop_after", type=float | None, default=None, help="seconds; save what trains then; the same command goes on"
    )
    parser.add_argument("--json", type=str | None, default=None, help="write the record")
    parser.add_argument("--csv", type=str | None, default=None, help="write the rows")
    parser.add_argument("--png", type=str | None, default=None, help="draw the curves")
    parser.add_argument(
        "--readme", type=bool, default=False, nargs="?", const=True, help="only: put all records into README.md"
    )
    return parser


def _benchmark(argv: list[str]) -> None:
    args = _parser().parse(argv)
    if args.readme:
        records.write_charts(CONVERGENCE)
        return records.write_readme(section=CONVERGENCE)
    if args.points < 1:
        raise UserError(f"--points {args.points}: must be at least 1")
    contenders = _contenders(args)
    deadline = time.monotonic() + args.stop_after if args.stop_after is not None else None
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    common = f"--preset {args.preset} --threads {args.threads} {args.common}"
    prices = _prices(contenders, common, out / "prices.json")
    record = _record(args, common, argv)

    def work(job: tuple[str, str, int]) -> list[dict]:
        name, flags, seed = job
        steps, price = max(1, round(args.budget / prices[name])), prices[name]
        run = f"{common} {flags} --seed {seed} --steps {steps} --save_every {-(-steps // args.points)}"
        found = _run(out / f"{name.replace(' ', '_')}-seed{seed}", run, args, deadline)
        if not found:
            print(f"{name} seed {seed}: not finished; the same command goes on", flush=True)
            return []
        end = found[-1]
        print(f"{name} seed {seed}: {steps} steps, loss {end['loss']:.4f}, agreement {end['agreement']}", flush=True)
        head = {"contender": name, "flags": flags, "seed": seed, "step_seconds": price}
        return [{**head, "seconds": row["step"] * price, **row} for row in found]

    jobs = [(name, flags, int(seed)) for seed in args.seeds.split(",") for name, flags in contenders.items()]
    with ThreadPoolExecutor(args.jobs) as pool:
        for rows in pool.map(work, jobs):
            record["rows"] += rows
            if args.json:
                records.write_json(record, records.writable("json", args.json))
    if args.csv:
        records.write_csv(record, records.writable("csv", args.csv), COLUMNS)
    if args.png and record["rows"]:
        CONVERGENCE.chart(record, records.writable("png", args.png))
    print("\n".join(lines(record)))


def _record(args, common: str, argv: list[str]) -> dict:
    from fastdit.engine import runtime

    config = parse([*shlex.split(common), "--out", args.out])
    device = torch.device("cuda" if runtime.on_gpu(config) else "cpu")
    dtype = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    scales = [float(scale) for scale in args.guidance.split(",")]
    settings = {"dtype": dtype, "batch": config.batch, "budget_seconds": args.budget, "guidance": scales}
    settings |= {name: getattr(args, name) for name in ("points", "samples", "fd", "jobs", "threads")}
    return records.start(shlex.join(["python", "benchmarks/convergence.py", *argv]), device, settings, "convergence")


def _contenders(args) -> dict[str, str]:
    contenders = {BASELINE: ""}
    for name in args.set.split(",") if args.set else ():
        if name not in SETS:
            raise UserError(f"--set {name}: unknown; choose of {', '.join(SETS)}")
        contenders |= SETS[name]
    return contenders | read_contenders(args.contender)


def read_contenders(texts: list[str]) -> dict[str, str]:
    """Return flags of fastdit/train.py by name from texts NAME=FLAGS. Raises UserError."""
    contenders = {}
    for text in texts:
        name, separator, flags = text.partition("=")
        if not separator:
            raise UserError(f"--contender {text}: give NAME=FLAGS")
        contenders[name] = flags
    return contenders


def _prices(contenders: dict[str, str], common: str, path: Path) -> dict[str, float]:
    """Seconds of a step of each contender; kept in `path`, so that a continued benchmark spends the same budgets."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    if contenders.keys() <= kept.keys():
        return kept
    configs = {
        name: parse([*shlex.split(f"{common} {flags} --sadm.start 0"), "--out", str(path.parent / "none")])
        for name, flags in contenders.items()
    }
    from fastdit.engine import runtime

    ranks = runtime.start(configs[BASELINE])
    from fastdit.engine.loop import train_step
    from fastdit.engine.session import Session

    on_gpu = ranks.device.type == "cuda"
    runs = {name: Session(config, ranks).run for name, config in configs.items()}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(12):
        for name, run in runs.items():
            begun = time.perf_counter() if on_gpu else time.process_time()
            train_step(run, turn)
            if on_gpu:
                torch.cuda.synchronize()
            spent[name].append((time.perf_counter() if on_gpu else time.process_time()) - begun)
    prices = {name: median(times[2:]) for name, times in spent.items()}
    threads = 1 if on_gpu else torch.get_num_threads()
    kept = {**{name: price / threads for name, price in prices.items()}, **kept}
    path.write_text(json.dumps(kept, indent=1))
    return kept


def _run(folder: Path, flags: str, args, deadline: float | None) -> list[dict]:
    """Train and judge in processes of their own; the result of a finished run is read.

    Returns the judge's rows, none when the deadline came first. Raises UserError when one of the processes fails, or
    the folder's result is of other flags.
    """
    done, asked = folder / "judged.json", f"{flags} --samples {args.samples} --guidance {args.guidance} --fd {args.fd}"
    if done.exists():
        found = json.loads(done.read_text())
        if found["asked"] != asked:
            raise UserError(f"{folder}: was trained or judged with other flags; choose another --out")
        return found["rows"]
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of the process that priced the steps
    env = {key: value for key, value in os.environ.items() if key not in own}
    env |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(args.threads)}
    small = f"--sample.agreement 0 --sample.per_class 1 --sample_every 0 --keep_checkpoints {args.points} --resume"
    train = ["fastdit/train.py", *shlex.split(flags), *small.split(), "--out", str(folder.resolve())]
    judge = ["benchmarks/convergence_judge.py", "--run", str(folder.resolve()), "--guidance", args.guidance]
    judge += ["--samples", str(args.samples), "--fd", str(args.fd), "--threads", str(args.threads)]
    for command in (train, judge):
        answer = _ask([sys.executable, *command], env, deadline, folder)
        if answer is None:
            return []
    rows = json.loads(answer.strip().splitlines()[-1])
    done.write_text(json.dumps({"asked": asked, "rows": rows}))
    return rows


def _ask(command: list[str], env: dict, deadline: float | None, folder: Path) -> str | None:
    """What a command printed; None after the deadline, when it is told to stop (a training run saves first)."""
    if deadline is not None and time.monotonic() > deadline:
        return None
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, problem = process.communicate(timeout=deadline and max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        return None
    if process.returncode:
        raise UserError(f"{folder}: {shlex.join(command)} failed: {(problem or out)[-500:]}")
    return out


if __name__ == "__main__":
    main()
