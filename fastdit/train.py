"""Train a diffusion transformer: `deepspeed fastdit/train.py --preset quickstart --ds_config zero1 --out runs/x`."""

from functools import partial
from pathlib import Path

from fastdit.config import parse
from fastdit.engine.checkpoint_files import holds_run
from fastdit.errors import UserError, run_command


def main(argv: list[str] | None = None) -> None:
    """The command, also installed as `fastdit-train`. Leaves the process: 0, or 2 after a UserError."""
    run_command(_train, argv)


def _train(argv: list[str]) -> None:
    config = parse(argv)
    if not config.resume and holds_run(Path(config.out)):
        raise UserError(f"--out {config.out}: already holds a run; go on with --resume, or choose another folder")

    from fastdit.engine import runtime  # sets DeepSpeed's accelerator: before anything that imports DeepSpeed

    ranks = runtime.start(config)
    from fastdit.engine import evaluation, gallery, loop
    from fastdit.engine.session import Session

    session = Session(config, ranks)
    evaluate = evaluation.during_training(session)
    if loop.train(session.run, session.first_step, partial(gallery.draw_grid, session), evaluate):
        gallery.finish(session)
    session.close()


if __name__ == "__main__":
    main()
