"""A program of test_convergence.py: is a contender's run what the training loop makes of it, to the bit?

It prices a session, trains another one as benchmarks/convergence.py does, and a third by the training loop.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from convergence_training import SilentRuntime, price_runs, train

from fastdit import distributed
from fastdit.parser import parse


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = parse([*argv, "--out", folder])
        ranks = distributed.start(config)
        from fastdit.training import loop
        from fastdit.training.ema import ema_state
        from fastdit.training.session import Session

        price_runs({"one": Session(config, SilentRuntime.like(ranks))}, 0.01)
        timed, plain = Session(config, SilentRuntime.like(ranks)), Session(config, ranks)
        notes = []
        trained = train(timed, 2, lambda *note: notes.append(note))
        assert loop.train(plain.run, 0, lambda step: None)
        states = []
        for run in (timed.run, plain.run):
            module = run.engine.module
            average = ema_state(run.engine, module, "cpu")
            states.append([*module.parameters(), *average.values(), *run.method.psi.parameters()])
        assert [step for step, *_ in notes] == [(config.steps + 1) // 2, config.steps]
        assert notes[-1][1] <= trained.seconds
        assert not trained.diverged
        assert all(x["loss"] > 0 for *_, x in notes)
        print("equal" if all(map(torch.equal, *states)) else "different")


if __name__ == "__main__":
    main(sys.argv[1:])
