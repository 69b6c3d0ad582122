"""Train a diffusion transformer: `deepspeed fastdit/train.py --preset quickstart --ds_config zero1 --out runs/x`."""

from functools import partial
from pathlib import Path

from fastdit.config import Config
from fastdit.errors import UserError, run_command
from fastdit.parser import parse
from fastdit.rundir import wandb_run
from fastdit.rundir.checkpoint_files import holds_run
from fastdit.rundir.run_lock import RunLock


def main(argv: list[str] | None = None) -> None:
    """Run the command, also installed as `fastdit-train`. Exit with 0, or with 2 after a UserError."""
    run_command(_train, argv)


def _train(argv: list[str]) -> None:
    """Train by the flags `argv`, a new run or a resumed one. Raises UserError."""
    config = parse(argv)
    _refuse_finished(config)

    # `start` sets DeepSpeed's accelerator, so it runs before anything that imports DeepSpeed is imported.
    from fastdit import distributed

    ranks = distributed.start(config)
    ranks.decide(partial(wandb_run.check, config))
    lock = RunLock(Path(config.out))
    ranks.decide(lock.check_place if config.dry_run else lock.acquire)
    from fastdit.evaluation import evaluator, sample_grids
    from fastdit.rundir.report import check_files
    from fastdit.training import dry_run, loop
    from fastdit.training.session import Session

    try:
        ranks.decide(partial(_refuse_finished, config))  # once more: another run may have come first
        if config.resume:
            ranks.decide(partial(check_files, Path(config.out)))
        session = Session(config, ranks, argv)
        evaluate = evaluator.during_training(session)
    except (UserError, KeyboardInterrupt):
        lock.withdraw()
        raise
    if config.dry_run:
        dry_run.estimate(session)
    else:
        with session.run.reporting():
            if loop.train(session.run, session.first_step, partial(sample_grids.write_grid, session), evaluate):
                try:
                    sample_grids.finish(session)
                except distributed.Stopped:
                    session.run.say("stopped before the final samples and the report; --resume makes them")
    session.close()
    lock.release()


def _refuse_finished(config: Config) -> None:
    """Raise UserError if a new run would write into a folder that holds one."""
    if not config.resume and holds_run(Path(config.out)):
        raise UserError(f"--out {config.out}: already holds a run; go on with --resume, or choose another folder")


if __name__ == "__main__":
    main()
