"""Compare a run's samples with real images: `python fastdit/evaluate.py --run runs/x --n 10000`.

It also runs under `deepspeed` or `torchrun`. The figures, and all conditions that they depend on, are added to the
run's eval.json, report and TensorBoard.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from fastdit import distributed
from fastdit.command_line import COLUMNS, OneLineParser, add_column_flags
from fastdit.config import EvalConfig
from fastdit.errors import run_command
from fastdit.evaluation.open_run import add_run_flags, add_sampler_flags, open_run, settings_of
from fastdit.files import prepare_folder
from fastdit.rundir import eval_log
from fastdit.rundir.run_files import EVALUATIONS


def main(argv: list[str] | None = None) -> None:
    """Run the command, also installed as `fastdit-evaluate`. Exit with 0, or with 2 after a UserError."""
    run_command(_evaluate, argv)


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-evaluate", description="Compare a run's samples with real images.")
    add_run_flags(parser)
    parser.add_argument(
        "--n",
        "--samples",
        type=int,
        default=50_000,
        help="number of samples; under a launcher write --samples, since it takes --n for its own flag",
    )
    parser.add_argument(
        "--data",
        type=str | None,
        default=None,
        help="real images: folder (of class folders or of images), shards, Hugging Face data set, shipped set, or ADM "
        "reference .npz; their channels are converted; default: the run's data",
    )
    add_column_flags(parser, "as --data.{}; default: the run's")
    parser.add_argument("--n_real", type=int | None, default=None, help="number of real images; default: all")
    parser.add_argument("--labels", type=Literal["balanced", "random"], default="balanced", help="class labels")
    parser.add_argument("--features", type=Literal["lite0", "inception"], default="lite0", help="feature network")
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="file of its weights; default: the package's or the cached file",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; sample i depends on it and on i alone")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads per rank; 0 shares the cores evenly")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    add_sampler_flags(parser)
    return parser


def _evaluate(argv: list[str]) -> None:
    """Evaluate by the flags `argv`, and add the figures to the run's files. Raises UserError."""
    # Read the settings, and join the other ranks.
    args = _parser().parse(argv)
    fields = ("n", "data", "n_real", "labels", "features", "weights", "seed")
    settings = EvalConfig(**{field: getattr(args, field) for field in fields})
    config = replace(settings_of(args), eval=settings, device=args.device, threads=args.threads)
    columns = {name: getattr(args, name) for name in COLUMNS if getattr(args, name)}
    config = replace(config, data=replace(config.data, **columns))
    run = Path(args.run)
    ranks = distributed.start(config)
    ranks.decide(lambda: prepare_folder(run, f"--run {run}"))

    from fastdit import run_parts
    from fastdit.evaluation.evaluator import Evaluator
    from fastdit.rundir.report import check_files, write_report

    # Evaluate the checkpoint, unless its figures could not be added to the run's files afterwards.
    ranks.decide(lambda: check_files(run))
    opened = open_run(args, config, ranks.decide)
    decoder = run_parts.build_decoder(config, opened.shape)
    evaluator = Evaluator(config, opened.shape, ranks, decoder=decoder and decoder.to(ranks.device))
    record = evaluator(opened.network.to(ranks.device), opened.step, str(opened.checkpoint))

    # Add the figures to the run's files, and print them.
    if record is not None:
        eval_log.append(run, record)
        eval_log.to_board(run, record)
        report = write_report(run)
        for name, figure in record["figures"].items():
            print(f"{name}: {eval_log.shown(name, figure)}")
        print(f"{opened.checkpoint}; {eval_log.conditions(record)}")
        print(f"added to {run / EVALUATIONS} and {report}")
    ranks.leave()


if __name__ == "__main__":
    main()
