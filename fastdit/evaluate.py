"""Figures of a run's samples: `python fastdit/evaluate.py --run runs/x --n 10000`, or by `deepspeed` or `torchrun`.

They are added to the run's eval.json, report and TensorBoard, with all that they depend on.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from fastdit import distributed
from fastdit.command_line import OneLineParser
from fastdit.config import EvalConfig
from fastdit.errors import run_command
from fastdit.evaluation.open_run import add_run_flags, add_sampler_flags, open_run, settings_of
from fastdit.rundir import eval_log
from fastdit.rundir.run_files import EVALUATIONS


def main(argv: list[str] | None = None) -> None:
    """The command, also installed as `fastdit-evaluate`. Leaves the process: 0, or 2 after a UserError."""
    run_command(_evaluate, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="fastdit-evaluate", description="Compare a run's samples with real images.")
    add_run_flags(parser)
    parser.add_argument("--n", "--samples", type=int, default=50_000, help="samples; launchers take --n for their own")
    parser.add_argument(
        "--data",
        type=str | None,
        default=None,
        help="folder, shards, shipped set, or ADM reference .npz; default: the run's",
    )
    parser.add_argument("--n_real", type=int | None, default=None, help="images of the data; default: all")
    parser.add_argument("--labels", type=Literal["balanced", "random"], default="balanced", help="of the samples")
    parser.add_argument("--features", type=Literal["lite0", "inception"], default="lite0", help="feature network")
    parser.add_argument("--weights", type=str | None, default=None, help="its weights; default: packaged, or in cache")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; sample i depends on the seed and i alone")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads per rank; 0 shares the cores evenly")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    add_sampler_flags(parser)
    return parser


def _evaluate(argv: list[str]) -> None:
    args = _parser().parse(argv)
    asked = ("n", "data", "n_real", "labels", "features", "weights", "seed")
    settings = EvalConfig(**{field: getattr(args, field) for field in asked})
    config = replace(settings_of(args), eval=settings, device=args.device, threads=args.threads)
    eval_log.read(Path(args.run))  # damaged: better known now than when all is done
    ranks = distributed.start(config)

    from fastdit import run_parts
    from fastdit.evaluation.evaluator import Evaluator
    from fastdit.rundir.report import refresh_report

    opened = open_run(args, config, ranks.decide)
    decoder = run_parts.build_decoder(config, opened.shape)
    evaluator = Evaluator(config, opened.shape, ranks, decoder=decoder and decoder.to(ranks.device))
    record = evaluator(opened.network.to(ranks.device), opened.step, str(opened.checkpoint))
    if record is not None:
        run = Path(args.run)
        eval_log.append(run, record)
        eval_log.to_board(run, record)
        report = refresh_report(run)
        for name, figure in record["figures"].items():
            print(f"{name}: {eval_log.shown(name, figure)}")
        print(f"{opened.checkpoint}; {eval_log.conditions(record)}")
        print(f"added to {run / EVALUATIONS} and {report}")
    ranks.leave()


if __name__ == "__main__":
    main()
