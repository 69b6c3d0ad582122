"""Compare samples with real images: `python fastdit/evaluate.py --run runs/x --n 10000`.

The samples are a run's, or images made elsewhere (`--samples_from FOLDER --data data/val`). It also runs under
`deepspeed` or `torchrun`. A run's figures, and all conditions that they depend on, are added to its eval.json, report
and TensorBoard.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from fastdit import distributed
from fastdit.command_line import COLUMNS, OneLineParser, add_column_flags
from fastdit.config import Config, DataConfig, EvalConfig, ModelConfig
from fastdit.data.image_rules import Crop
from fastdit.errors import UserError, run_command
from fastdit.evaluation.open_run import (
    SAMPLER_FLAGS,
    add_batch_flag,
    add_run_flags,
    add_sampler_flags,
    add_weights_flag,
    open_run,
    settings_of,
)
from fastdit.files import prepare_file, prepare_folder, read_json, write_text
from fastdit.rundir import eval_log
from fastdit.rundir.run_files import EVALUATIONS

SAMPLES = 50_000  # of a run, by default


def main(argv: list[str] | None = None) -> None:
    """Run the command, also installed as `fastdit-evaluate`. Exit with 0, or with 2 after a UserError."""
    run_command(_evaluate, argv)


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-evaluate", description="Compare samples with real images.")
    add_run_flags(parser, required=False)
    parser.add_argument(
        "--samples_from",
        type=str | None,
        default=None,
        help="images made elsewhere, in place of a run's samples: folder, shards or .npz; --data names the real ones",
    )
    add_weights_flag(parser, "--sampled_weights")
    parser.add_argument(
        "--n",
        "--samples",
        type=int | None,
        default=None,
        help=f"number of samples, by default {SAMPLES:,} of a run or all of --samples_from; under a launcher write "
        "--samples, since it takes --n for its own flag",
    )
    parser.add_argument(
        "--data",
        type=str | None,
        default=None,
        help="real images: folder (of class folders or of images), shards, Hugging Face data set, shipped set, or ADM "
        "reference .npz; their channels are converted; default: the run's data",
    )
    parser.add_argument("--crop", type=Crop | None, default=None, help="as --data.crop; default: the run's, or center")
    add_column_flags(parser, "as --data.{}; default: the run's")
    parser.add_argument("--n_real", type=int | None, default=None, help="number of real images; default: all")
    parser.add_argument("--labels", type=Literal["balanced", "random"], default="balanced", help="class labels")
    parser.add_argument("--features", type=Literal["lite0", "inception"], default="lite0", help="feature network")
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="file of the feature network's weights; default: the package's or the cached file",
    )
    parser.add_argument(
        "--save", type=str | None, default=None, help="with --samples_from: .json file that the figures are added to"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; sample i depends on it and on i alone")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads per rank; 0 shares the cores evenly")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    add_batch_flag(parser)
    add_sampler_flags(parser)
    return parser


def _evaluate(argv: list[str]) -> None:
    """Evaluate by the flags `argv`. Raises UserError."""
    args = _parser().parse(argv)
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: must be at least 1")
    if (args.run is None) == (args.samples_from is None):
        raise UserError("--run: names the run to evaluate; or give --samples_from, images made elsewhere, and no --run")
    (_evaluate_run if args.run else _evaluate_images)(args)


def _settings(args: Namespace, n: int) -> EvalConfig:
    """Return the settings of evaluation on the command line. Raises UserError."""
    fields = ("data", "n_real", "labels", "features", "weights", "seed")
    return EvalConfig(n=n, **{field: getattr(args, field) for field in fields})


def _evaluate_run(args: Namespace) -> None:
    """Evaluate a run, and add the figures to its files. Raises UserError."""
    # Read the settings, and join the other ranks.
    if args.save:
        raise UserError("--save: is for --samples_from; a run's figures are added to its own files")
    settings = _settings(args, SAMPLES if args.n is None else args.n)
    config = replace(settings_of(args), eval=settings, device=args.device, threads=args.threads)
    data = {name: getattr(args, name) for name in (*COLUMNS, "crop") if getattr(args, name)}
    config = replace(config, data=replace(config.data, **data))
    run = Path(args.run)
    ranks = distributed.start_sampling(config)
    ranks.decide(lambda: prepare_folder(run, f"--run {run}"))

    from fastdit import run_parts
    from fastdit.evaluation.evaluator import Evaluator
    from fastdit.rundir.report import check_files, write_report

    # Evaluate the checkpoint, unless its figures could not be added to the run's files afterwards.
    ranks.decide(lambda: check_files(run))
    opened = open_run(args, config, ranks.decide, args.sampled_weights)
    decoder = run_parts.build_decoder(config, opened.shape)
    options = {"batch": args.batch, "weights": args.sampled_weights}
    evaluator = Evaluator(config, opened.shape, ranks, decoder=decoder and decoder.to(ranks.device), **options)
    record = evaluator(opened.network.to(ranks.device), opened.step, str(opened.checkpoint))

    # Add the figures to the run's files, and print them.
    if record is not None:
        eval_log.append(run, record)
        eval_log.to_board(run, record)
        report = write_report(run)
        print(f"{eval_log.block(record)}\n\nadded to {run / EVALUATIONS} and {report}")
    ranks.leave()


def _evaluate_images(args: Namespace) -> None:
    """Evaluate images made elsewhere. Raises UserError."""
    # Check the flags, and join the other ranks.
    if not args.data:
        raise UserError("--samples_from: needs the real images to compare with; give --data")
    idle = [name for name in ("checkpoint", "autoencoder", *SAMPLER_FLAGS) if getattr(args, name) is not None]
    if idle:
        raise UserError(f"--{idle[0]}: is for sampling a run; --samples_from draws nothing, leave it out")
    if args.n is not None and args.n < 2:
        raise UserError(f"--n {args.n}: must be at least 2")
    ranks = distributed.start_sampling(Config(device=args.device, threads=args.threads))
    ranks.decide(lambda: _saved(args.save))

    from fastdit import run_parts
    from fastdit.evaluation import given_samples
    from fastdit.evaluation.evaluator import Evaluator

    # Open both sides. Rank 0 looks at all files.
    columns = {name: getattr(args, name) for name in COLUMNS}
    notes = ranks.decide(lambda: list(given_samples.open_samples(args.samples_from, args.n, **columns).notes))
    samples = given_samples.open_samples(args.samples_from, args.n, check=False, **columns)
    height, width, channels = samples.size
    data = DataConfig(size=(height, width), channels=channels, crop=args.crop or "center", **columns)
    config = Config(data=data, model=ModelConfig(patch=1), eval=_settings(args, samples.n))
    shape = run_parts.Shape(channels, height, width, max(1, len(samples.class_names)))
    evaluator = Evaluator(config, shape, ranks, batch=args.batch)
    notes += given_samples.check_reference(samples, evaluator.source) if evaluator.source else []

    # Compare them, and print the figures.
    record = evaluator.judge(samples)
    if record is not None:
        record["notes"] = notes
        print(eval_log.block(record))
        if args.save:
            write_text(Path(args.save), json.dumps([*_saved(args.save), record], indent=1))
            print(f"\nadded to {args.save}")
    ranks.leave()


def _saved(path: str | None) -> list:
    """Return the records in the file of `--save`, or [] if there is none. Raises UserError if it cannot be written."""
    if path is None:
        return []
    prepare_file(Path(path), f"--save {path}")
    records = read_json(Path(path), "name another file") if Path(path).exists() else []
    if not isinstance(records, list):
        raise UserError(f"--save {path}: is no list of evaluations; name another file")
    return records


if __name__ == "__main__":
    main()
