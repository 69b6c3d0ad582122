"""A program of test_sd_dit_training.py: trains as fastdit/train.py does, and writes what each rank then holds."""

import sys
from pathlib import Path

import torch

from fastdit import distributed
from fastdit.parser import parse


def main(argv: list[str]) -> None:
    config = parse(argv)
    ranks = distributed.start(config)
    from deepspeed.utils import safe_get_full_optimizer_state

    from fastdit.training import loop
    from fastdit.training.session import Session

    session = Session(config, ranks)
    run = session.run
    loop.train(run, session.first_step, lambda step: None)
    optimizer = run.engine.optimizer
    held = {"centers": run.method.centers, "averages": {}, "persistent": []}
    for teacher, sources in run.method.ema_replicas(run.engine.module).values():
        names = [name for name, _ in run.method.teacher.named_parameters()]
        held["teacher"] = dict(zip(names, teacher, strict=True))
        for name, source in zip(names, sources, strict=True):
            whole = safe_get_full_optimizer_state(source, "teacher")
            held["averages"][name] = optimizer.state[source]["teacher"] if whole is None else whole
            if getattr(source, "ds_persist", True):
                held["persistent"].append(name)
    torch.save(held, Path(config.out) / f"held-{ranks.rank}.pt")
    session.close()


if __name__ == "__main__":
    main(sys.argv[1:])
