"""Measure whole training steps: `python benchmarks/throughput.py --model S/4 --method sd_dit --batch 8`.

Also under `deepspeed benchmarks/throughput.py ...` or torchrun. What takes the steps is in contenders.py and peers.py,
how they are timed in stopwatch.py, what is kept in step_tables.py and record.py. Other modes: loaders.py, scaling.py.
"""

import os
import re
import shlex
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Literal

import record as records
import torch
from flags import split_flags
from journal import Journal
from loaders import LOADER, measure_loaders
from made_data import MADE, at_hand
from peers import build_peer, load_peer
from scaling import Links, Measured, Target, scaling, target_of
from step_record import GEMM, counted_rounds, step_record
from step_tables import PLAIN, THROUGHPUT, whole_step
from stopwatch import TURNS, Rounds, Stopwatch
from timing import Quantiles
from torch import nn

from fastdit import distributed
from fastdit.command_line import OneLineParser
from fastdit.config import Config
from fastdit.errors import UserError, run_command
from fastdit.models import SIZES
from fastdit.parser import parse
from fastdit.run_parts import Shape
from fastdit.rundir.metrics_log import peak_flops

STEPS = {"cuda": 40, "cpu": 10}
AGAINST = ("eager", "compile", "graphs")
FILES = ("json", "csv")
SWITCHES = {
    "loader_only": "no steps: fastdit's loader against torch's DataLoader, for --steps turns of a second each",
    "readme": "measure nothing; write the tables of RESULTS.md from benchmarks/records",
}
Against = dict[str, type[nn.Module] | None]  # by name; the class of a peer


def main(argv: list[str] | None = None) -> None:
    """Run the command. It ends the process with 0, or with 2 after a UserError."""
    run_command(_benchmark, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="throughput.py",
        description="Time training steps, whole and in parts. Any dotted setting of a run is a flag here too: "
        "--sd_dit.mask_ratio 0.5 (see fastdit/train.py --help).",
    )
    parser.add_argument("--model", type=str, default="S/2", help="size and patch")
    parser.add_argument("--method", type=str, default=PLAIN, help="as in training; any other runs beside dit")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, over all ranks")
    parser.add_argument("--size", type=int, default=32, help="height and width of an image or latent")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--classes", type=int | None, default=None, help="default: of the data; synthetic: 1000")
    parser.add_argument(
        "--precision",
        type=Literal["auto", "bf16", "fp8", "fp32"],
        default="auto",
        help="fp8: in fastdit's own steps; other contenders run in bf16, and both MFUs are relative to bf16 rates",
    )
    parser.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="eager, compile, graphs (fastdit itself, with --cuda_graphs), peer:NAME:FOLDER, with commas between",
    )
    parser.add_argument("--zero", type=Literal[0, 1, 2, 3], default=1, help="ZeRO's stage")
    parser.add_argument(
        "--data",
        type=str,
        default="synthetic",
        help=f"a source, as in training; for --loader_only also {', '.join(MADE)}",
    )
    parser.add_argument("--steps", type=int | None, default=None, help="timed, of each; default: 40 on a GPU, else 10")
    parser.add_argument("--scale_to", type=str | None, default=None, help="predict for so many GPUs: 8,64,1024")
    parser.add_class_arguments(Links)
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a rank; 0 shares the cores")
    parser.add_argument(
        "--journal", type=str | None, default=None, help="append each contender and round to this JSON-lines file"
    )
    parser.add_argument("--json", type=str | None, default=None, help="write the record, after each round")
    parser.add_argument("--csv", type=str | None, default=None, help="write the rows")
    for name, use in SWITCHES.items():
        parser.add_argument(f"--{name}", type=bool, default=False, nargs="?", const=True, help=use)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser


def _benchmark(argv: list[str]) -> None:
    own, dotted = split_flags(argv)
    args = _parser().parse(own)
    if args.readme:
        for section in (THROUGHPUT, LOADER):
            records.write_results(section=section)
        return
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be at least 1")
    if args.loader_only:
        _check_loader_only(args)
    links = Links(**{field.name: getattr(args, field.name) for field in fields(Links)})
    target = target_of(args.scale_to, links, int(os.environ.get("WORLD_SIZE", 1)), args.zero)
    config = _config(args, dotted)
    against = _against(args.against)
    files = {name: records.writable(name, value) for name in FILES if (value := getattr(args, name))}

    if config.precision == "auto":
        config = replace(config, precision="bf16" if distributed.on_gpu(config) else "fp32")
    ranks = distributed.start(config)
    if args.loader_only:
        with at_hand(args.data) as source:
            config = replace(config, data=replace(config.data, source=source))
            record = measure_loaders(config, ranks.device, args.steps, _command(argv), Journal(args.journal))
        record["settings"]["data"] = args.data
        section = LOADER
    else:
        steps, section = args.steps or STEPS[ranks.device.type], THROUGHPUT
        journal = Journal(args.journal if ranks.first else None)

        def keep() -> None:
            if ranks.first and "json" in files:
                records.write_json(step_record(journal.lines), files["json"])

        _measure(config, against, ranks, steps, target, _command(argv), journal, keep)
        record = step_record(journal.lines)
    if ranks.first:
        print("\n" + "\n".join(section.lines(record)))
        if "json" in files:
            records.write_json(record, files["json"])
        if "csv" in files:
            records.write_csv(record, files["csv"], tuple(record["rows"][0]))
        for name, path in files.items():
            print(f"{name}: {path}")
    ranks.barrier()
    torch.distributed.destroy_process_group()


def _measure(
    config: Config,
    against: Against,
    ranks: distributed.Runtime,
    steps: int,
    target: Target | None,
    command: str,
    journal: Journal,
    keep: Callable[[], None],
) -> None:
    """Measure all contenders into the journal; `keep` is called whenever a table can be made of more than before."""
    from contenders import DTYPES, Engine, Plain, Product  # imports DeepSpeed: after distributed.start

    device, turn, watch = ranks.device, TURNS[ranks.device.type], Stopwatch(ranks.device)
    dtype = DTYPES[config.precision]
    gemm = Product(device, dtype, watch)
    settings = _settings(config, ranks, dtype, steps) | {"gemm_size": gemm.n}
    journal.write("record", **records.start(command, device, settings, "throughput"))

    # What to build, in order: fastdit's own steps first.
    plain = replace(config, method=PLAIN)
    engines = {name: partial(Engine, replace(config, method=name), ranks, watch) for name in (PLAIN, config.method)}
    others = {
        name: partial(Plain, plain, ranks, watch, peer and partial(_peer, peer, plain), compiled=name == "compile")
        for name, peer in against.items()
        if name != "graphs"
    }
    if "graphs" in against:
        others["graphs"] = partial(Engine, replace(config, cuda_graphs=True), ranks, watch)

    # Warm them up one by one. A round after each: whoever comes next may take minutes to compile.
    contenders, turns = {GEMM: gemm}, Rounds(ranks, turn, journal)
    for name, make in {**engines, **others}.items():
        contender = _warm(name, make, ranks, watch, journal, required=name in engines)
        if contender is not None:
            contenders[name] = contender
            turns.take(contenders)
            keep()
    for _ in range(-(-steps // turn.timed) - 1):
        turns.take(contenders)
        keep()
    for contender in contenders.values():
        contender.close()
    if target:
        rounds = counted_rounds(journal.lines)
        whole = {name: whole_step([laps[name] for laps in rounds]) for name in engines}
        scaled = [_scaled(name, contenders[name], whole[name], config.batch, target) for name in engines]
        journal.write("scaling", scaling=scaled)
        keep()


def _warm(name: str, make, ranks: distributed.Runtime, watch: Stopwatch, journal: Journal, required: bool):
    """Return make()'s contender after its first steps; None where it raised on a rank, unless it is `required`."""
    from contenders import warm

    contender, problem = None, None
    try:
        contender = warm(make, ranks.device)
    except UserError:
        raise
    except Exception as error:  # a compiler's, a peer's, or no memory left: a result, not the end of the run
        if required:
            raise
        traceback.print_exc()
        problem = records.failure(error)
    watch.read()  # laps of the first steps, whole or not, are of no use
    if ranks.agree([float(problem is not None)])[0]:
        contender, problem = None, problem or "failed: on another rank"
    if contender is None:
        journal.write("contender", name=name, failed=problem)
    else:
        fields = ("ran", "flops", "held", "peak", "host")
        journal.write("contender", name=name, **{field: getattr(contender, field) for field in fields})
    if ranks.first:
        print(f"{name}: {problem or contender.ran}", flush=True)
    return contender


def _scaled(name: str, engine, whole: Quantiles, batch: int, target: Target) -> dict:
    measured = Measured(whole.p50 / 1e3, batch, engine.held, engine.peak, engine.run.deepspeed.stage)
    return scaling(name, engine.sizes(), measured, target)


def _settings(config: Config, ranks: distributed.Runtime, dtype: torch.dtype, steps: int) -> dict:
    return {
        "method": config.method,
        "model": f"{config.model.size}/{config.model.patch}",
        **config.model.dims(),
        "size": config.data.size,
        "channels": config.data.channels,
        "batch": config.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "precision": config.precision,
        "ranks": ranks.world,
        "zero": config.ds_config,
        "data": config.data.source,
        "noise": config.noise.name,
        "threads": torch.get_num_threads(),
        "kernels": os.environ.get("FASTDIT_KERNELS", "auto"),
        "steps": steps,
        **TURNS[ranks.device.type]._asdict(),
        "datasheet_flops": peak_flops(ranks.device) if dtype == torch.bfloat16 else None,
    }


def _peer(kind: type[nn.Module], config: Config, shape: Shape, out_channels: int) -> nn.Module:
    return build_peer(kind, config.model.dims(), config.model.mlp_ratio, config.model.patch, shape, out_channels)


def _check_loader_only(args) -> None:
    if args.against or args.scale_to or args.method != PLAIN:
        raise UserError("--loader_only: trains nothing; leave out --against, --method and --scale_to")
    if args.data.partition(":")[0] == "synthetic":
        raise UserError(f"--data {args.data}: there is nothing to decode; give fashion_mnist, a folder or shards")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--loader_only: measures one process; start it with python")


def _config(args, dotted: list[str]) -> Config:
    size, _, patch = args.model.partition("/")
    if size not in SIZES or not patch.isdecimal():
        raise UserError(f"--model {args.model}: is no size and patch, as S/2 is; sizes are {', '.join(SIZES)}")
    classes, source = args.classes, args.data
    if source == "synthetic":
        classes = classes or 1000
        source = f"synthetic:{args.channels}x{args.size}x{args.size}:{classes}:10000"
    flags = {
        "model.size": size,
        "model.patch": patch,
        "data.source": source,
        "data.size": args.size,
        "data.channels": args.channels,
        "ds_config": f"zero{args.zero}",
        "cuda_graphs": "false",
        **{name: getattr(args, name) for name in ("method", "batch", "precision", "device", "threads")},
    }
    if classes:
        flags["data.classes"] = classes
    return parse([word for name, value in flags.items() for word in (f"--{name}", str(value))] + dotted)


def _against(text: str | None) -> Against:
    """Return contenders by name, with the class of those that are peers. Raises UserError."""
    chosen = {}
    for name in text.split(",") if text else ():
        kind, *rest = name.split(":", 2)
        if kind == "peer" and len(rest) == 2:
            chosen[rest[0]] = load_peer(*rest)
        elif name in AGAINST:
            chosen[name] = None
        else:
            raise UserError(f"--against {text}: {name!r} is unknown; choose of {', '.join(AGAINST)}, peer:NAME:FOLDER")
    return chosen


def _command(argv: list[str]) -> str:
    """Return the command as given, without the place of peers' clones and the launcher's flags."""
    words = [word for word in argv if not word.startswith("--local_rank")]
    command = shlex.join(["python", "benchmarks/throughput.py", *words])
    return re.sub(r"(peer:[\w-]+):[^,\s']+", r"\1:FOLDER", command)


if __name__ == "__main__":
    main()
