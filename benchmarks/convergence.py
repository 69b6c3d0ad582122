"""What a budget of training time buys: `python benchmarks/convergence.py --set sd_dit --budget 150`.

Every contender is a run of fastdit/train.py with the same preset, data, batch and seeds, and as many steps as the
budget allows it. Steps are priced first: all contenders in one process, step by step in turns, the median of each. On
a CPU the price is processor time, so that a busy machine does not move the budget; on a GPU it is time. Schedules span
each run's own steps. Evaluation is not counted.

The judge: the plain denoising loss of the sampled weights, all patches visible, on the first training images with fixed
noise (methods share it, and no run sees its data often); and class agreement of samples, as in a run's report.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import record as records
import torch

from fastdit.command_line import OneLineParser
from fastdit.config import CONFIG_FILE, Config, load, parse
from fastdit.errors import UserError, run_command

ROOT = Path(__file__).parents[1]
BASELINE = "dit"
SETS = {
    "sd_dit": {
        "sd_dit": "--method sd_dit",
        "sd_dit mask_token": "--method sd_dit --sd_dit.hidden_tokens mask_token",
        "sd_dit zeros": "--method sd_dit --sd_dit.hidden_tokens zeros",
        "sd_dit beta 0.01": "--method sd_dit --sd_dit.beta 0.01",
        "sd_dit beta 1": "--method sd_dit --sd_dit.beta 1",
    },
    "sadm": {
        "sadm fixed": "--method sadm --sadm.structure fixed",
        "sadm adversarial": "--method sadm",
    },
    "both": {"sd_dit+sadm": "--method sd_dit+sadm"},
}
LOSS_IMAGES = 2048
COLUMNS = ("contender", "flags", "seed", "steps", "step_seconds", "images", "loss", "agreement")


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
    parser.add_argument("--samples", type=int, default=500, help="for class agreement")
    parser.add_argument("--guidance", type=str, default="1,3", help="scales at which samples are drawn, with commas")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument(
        "--out", type=str, default="runs/convergence", help="folder of the runs; finished ones are kept"
    )
    parser.add_argument("--json", type=str | None, default=None, help="write the record")
    parser.add_argument("--csv", type=str | None, default=None, help="write the rows")
    parser.add_argument(
        "--readme", type=bool, default=False, nargs="?", const=True, help="only: put all records into README.md"
    )
    parser.add_argument(
        "--judge", type=str | None, default=None, help="only judge this run's folder; used by the above"
    )
    return parser


def _benchmark(argv: list[str]) -> None:
    args = _parser().parse(argv)
    scales = [float(scale) for scale in args.guidance.split(",")]
    if args.readme:
        return records.write_readme(section=CONVERGENCE)
    if args.judge:
        print(json.dumps(_judge(Path(args.judge), args.samples, scales, args.threads)))
        return
    contenders = _contenders(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    common = f"--preset {args.preset} --threads {args.threads} {args.common}"
    command = shlex.join(["python", "benchmarks/convergence.py", *(argv if argv is not None else sys.argv[1:])])
    config = parse([*shlex.split(common), "--out", str(out / "none")])
    prices = _prices(contenders, common, out / "prices.json")
    device = _device(config)
    dtype = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    settings = {"dtype": dtype, "batch": config.batch, "budget_seconds": args.budget}
    settings |= {"samples": args.samples, "guidance": scales, "jobs": args.jobs, "threads": args.threads}
    record = records.start(command, device, settings, "convergence")

    def work(job: tuple[str, str, int]) -> dict:
        name, flags, seed = job
        steps = round(args.budget / prices[name])
        folder = out / f"{name.replace(' ', '_')}-seed{seed}"
        found = _run(folder, f"{common} {flags} --seed {seed} --steps {steps}", args)
        row = {"contender": name, "flags": flags, "seed": seed, "steps": steps, "step_seconds": prices[name], **found}
        print(f"{name} seed {seed}: {steps} steps, loss {row['loss']:.4f}, agreement {row['agreement']}", flush=True)
        return row

    jobs = [(name, flags, int(seed)) for seed in args.seeds.split(",") for name, flags in contenders.items()]
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(work, jobs):
            record["rows"].append(row)
            if args.json:
                records.write_json(record, records.writable("json", args.json))
    if args.csv:
        records.write_csv(record, records.writable("csv", args.csv), COLUMNS)
    print("\n".join(lines(record)))


def _contenders(args) -> dict[str, str]:
    contenders = {BASELINE: ""}
    for name in args.set.split(",") if args.set else ():
        if name not in SETS:
            raise UserError(f"--set {name}: unknown; choose of {', '.join(SETS)}")
        contenders |= SETS[name]
    for text in args.contender:
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
        name: parse([*shlex.split(f"{common} {flags}"), "--out", str(path.parent / "none")])
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


def _run(folder: Path, flags: str, args) -> dict:
    """Train and judge in processes of their own; the result of a finished run is read.

    Raises UserError when one of them fails, or the folder's result is of other flags.
    """
    done, asked = folder / "judged.json", f"{flags} --samples {args.samples} --guidance {args.guidance}"
    if done.exists():
        found = json.loads(done.read_text())
        if found.pop("asked") != asked:
            raise UserError(f"{folder}: was trained or judged with other flags; choose another --out")
        return found
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of the process that priced the steps
    env = {key: value for key, value in os.environ.items() if key not in own}
    env |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(args.threads)}
    small = "--sample.agreement 0 --sample.per_class 1 --sample_every 0 --keep_checkpoints 1 --resume"
    train = [sys.executable, "fastdit/train.py", *shlex.split(flags), *small.split(), "--out", str(folder.resolve())]
    judge = [sys.executable, "benchmarks/convergence.py", "--judge", str(folder.resolve())]
    judge += ["--samples", str(args.samples), "--guidance", args.guidance, "--threads", str(args.threads)]
    for command in (train, judge):
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if ended.returncode:
            raise UserError(f"{folder}: {shlex.join(command)} failed: {(ended.stderr or ended.stdout)[-500:]}")
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    done.write_text(json.dumps({"asked": asked, **found}))
    return found


def _device(config: Config) -> torch.device:
    from fastdit.engine import runtime

    return torch.device("cuda" if runtime.on_gpu(config) else "cpu")


def _judge(folder: Path, samples: int, scales: list[float], threads: int) -> dict:
    from fastdit.engine import build, judge
    from fastdit.engine.checkpoint_files import choose, classes_of, sampled_weights

    torch.set_num_threads(threads)
    config = load(folder / CONFIG_FILE)
    checkpoint = choose(folder, None)
    shape = build.shape_of(config, classes_of(checkpoint))
    network = build.build_network(config, shape)
    network.load_state_dict(sampled_weights(checkpoint))
    device = _device(config)
    network.to(device).eval()
    known = judge.known_images(config, build.open_data(config))
    images, labels = (part[:LOSS_IMAGES] for part in known)
    agreement = {f"{scale:g}": _agreement(network, config, shape, samples, scale, known) for scale in scales}
    return {
        "images": config.steps * (config.batch or 0),
        "loss": _loss(network, build.build_noise(config), images, labels, device),
        "agreement": agreement,
    }


@torch.no_grad()
def _loss(network, noise, x0: torch.Tensor, y: torch.Tensor, device: torch.device) -> float:
    generator, total = torch.Generator().manual_seed(0), 0.0
    for images, classes in zip(x0.split(128), y.split(128)):
        level = noise.draw(len(images), generator=generator, device="cpu").to(device)
        eps = torch.randn(images.shape, generator=generator).to(device)
        images = images.to(device)
        out = network(*noise.network_input(noise.add_noise(images, eps, level), level), classes.to(device))
        total += float(noise.loss(out, images, eps, level)[0].sum())
    return total / len(x0)


def _agreement(network, config: Config, shape, n: int, guidance: float, known) -> float:
    from fastdit.engine import build, drawing, judge

    labels = drawing.balanced_labels(n, range(shape.classes))
    device = next(network.parameters()).device
    settings = replace(config.sample, guidance=guidance)
    process = build.build_noise(config)
    drawn = drawing.draw(network, process, settings, shape, labels, indices=range(n), seed=0, device=device)
    return judge.agreement(drawing.to_uint8(drawn), labels, known)


def lines(record: dict) -> list[str]:
    """A Markdown table: for each contender its metrics by seed, their mean, and the spread (standard deviation)."""
    scales = [f"{scale:g}" for scale in record["settings"]["guidance"]]
    cells = [("contender", "ms/step", "steps", "loss by seed", "mean", *(f"agreement, guidance {s}" for s in scales))]
    for name in dict.fromkeys(row["contender"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["contender"] == name]
        losses = [row["loss"] for row in rows]
        shares = [[row["agreement"][scale] for row in rows] for scale in scales]
        cells.append(
            (
                name,
                f"{rows[0]['step_seconds'] * 1e3:.0f}",
                str(rows[0]["steps"]),
                " ".join(f"{loss:.4f}" for loss in losses),
                _spread(losses, ".4f"),
                *(" ".join(f"{s:.1%}" for s in by_seed) + f": {_spread(by_seed, '.1%')}" for by_seed in shares),
            )
        )
    return records.aligned(cells)


CONVERGENCE = records.Section("convergence", ("<!-- convergence: begin -->\n", "<!-- convergence: end -->\n"), lines)


def _spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}} ± {stdev(values) if len(values) > 1 else np.nan:{form}}"


if __name__ == "__main__":
    main()
