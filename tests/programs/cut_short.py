"""A program of tests: trains, and sends itself a signal at a moment that the environment names.

CUT_AT: the moment and the step, such as "evaluation 2". The moments: `grid` and `evaluation`, before they begin;
`figures`, when the evaluation is in its log and not in the metrics; `batch`, in a batch of an evaluation; `step`, after
a training step; `build`, while the run is built (step 0).
CUT_BY: the signal, SIGKILL by default; or REMOVE, which removes the run's folder instead.
"""

import os
import shutil
import signal


def main(argv: list[str]) -> None:
    from fastdit import train
    from fastdit.evaluation import draw_samples, evaluator, sample_grids
    from fastdit.rundir import eval_log
    from fastdit.training import loop, session

    moment, step = os.environ.get("CUT_AT", "none 0").split()
    plain_grid, plain_call, plain_append = sample_grids.write_grid, evaluator.Evaluator.__call__, eval_log.append
    plain_step, plain_build = loop.train_step, session.make_optimizer

    def cut(happens: str, done: int) -> None:
        if (happens, str(done)) == (moment, step):
            if os.environ.get("CUT_BY") == "REMOVE":
                shutil.rmtree(argv[argv.index("--out") + 1])
            else:
                os.kill(os.getpid(), signal.Signals[os.environ.get("CUT_BY", "SIGKILL")])

    def write_grid(session, done):
        cut("grid", done)
        plain_grid(session, done)

    def call(self, network, done, checkpoint=None):
        cut("evaluation", done)
        plain_draw = draw_samples.draw

        def draw(*args, **kwargs):
            cut("batch", done)
            return plain_draw(*args, **kwargs)

        draw_samples.draw = draw
        try:
            return plain_call(self, network, done, checkpoint)
        finally:
            draw_samples.draw = plain_draw

    def append(run, record):
        plain_append(run, record)
        cut("figures", record["step"])

    def train_step(run, done):
        plain_step(run, done)
        cut("step", done + 1)

    def make_optimizer(*args):
        cut("build", 0)
        return plain_build(*args)

    loop.train_step, session.make_optimizer = train_step, make_optimizer
    sample_grids.write_grid, evaluator.Evaluator.__call__, eval_log.append = write_grid, call, append
    train.main(argv)
