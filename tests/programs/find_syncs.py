"""A program of tests/training/test_waits.py: says where a training step would make the host wait for a GPU.

python find_syncs.py [flags of a run]   writes a list of the calls in two steps to waits-RANK.json in its folder.

That is where a tensor's value is asked for (`item`, `bool`, `float`), and where DeepSpeed waits for its device; on a
GPU also what torch's own watch finds, copies that wait among it.
"""

import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import distributed
from fastdit.parser import parse


class Waits(TorchDispatchMode):
    """`calls`: "FILE:LINE" of each, of the nearest frame outside torch."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def note(self, *args) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        self.calls.append(f"{frames[-1].filename}:{frames[-1].lineno}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::is_nonzero"):
            self.note()
        return func(*args, **(kwargs or {}))


def watch(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def main(argv: list[str]) -> None:
    config = parse(argv)
    ranks = distributed.start(config)
    from deepspeed.accelerator import get_accelerator

    from fastdit.training import loop
    from fastdit.training.session import Session

    session, waits = Session(config, ranks), Waits()
    for step in range(4):
        loop.train_step(session.run, step)
    get_accelerator().synchronize = waits.note
    with waits, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        watch("warn")
        for step in range(4, 6):
            loop.train_step(session.run, step)
        watch("default")
    waits.calls += [f"{w.filename}:{w.lineno}" for w in heard if "called a synchronizing" in str(w.message)]
    (Path(config.out) / f"waits-{ranks.rank}.json").write_text(json.dumps(waits.calls))
    session.close()


if __name__ == "__main__":
    main(sys.argv[1:])
