"""A program of test_one_rank.py: train with and without `shorten_step_on_one_rank`, and compare every bit.

python train_on_one_rank.py OUT 'flags of one run' 'flags of another' ...   writes OUT/records.json, a list.

Each run takes three steps, the second with a gradient that is not finite, and writes a checkpoint, which a run of the
other kind resumes for two more steps.
"""

import json
import shlex
import sys
from collections import Counter
from itertools import pairwise, zip_longest
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import distributed
from fastdit.parser import parse

NONFINITE = 1  # the step whose loss is NaN


class Operators(TorchDispatchMode):
    """Count the operators that run in this mode."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def bits(run) -> dict[str, torch.Tensor]:
    """Return copies of all weights, masters, optimizer states and results of the last step."""
    from fastdit.training import loop

    tensors = dict(run.engine.module.named_parameters())
    for i, group in enumerate(run.optimizer.param_groups):
        for j, param in enumerate(group["params"]):
            tensors[f"master {i} {j}"] = param
            tensors |= {f"{name} {i} {j}": state for name, state in run.optimizer.state.get(param, {}).items()}
    norm = loop._grad_norm(run)
    tensors["grad_norm"] = torch.tensor(-1.0) if norm is None else torch.as_tensor(norm).nan_to_num(nan=-2.0)
    tensors["skipped"] = loop._skipped(run)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differences(mine: list[dict], other: list[dict]) -> list[str]:
    """Return the names of the tensors whose bytes differ, with their steps."""
    return [
        f"{step}: {name}"
        for step, (a, b) in enumerate(zip_longest(mine, other, fillvalue={}))
        for name in a.keys() | b.keys()
        if name not in a or name not in b or a[name].content != b[name].content
    ]


class Bytes:
    """The bytes and the dtype of a tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.content = (str(tensor.dtype), tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def train(argv: list[str], folder: Path, steps: range, ranks, shortened: bool):
    """Return the bytes after each step, the operators of the last step, and the run. A checkpoint is written at 3."""
    from fastdit.training import loop, session

    original = session.shorten_step_on_one_rank
    if not shortened:
        session.shorten_step_on_one_rank = lambda *args: None
    try:
        resume = ["--resume", "true"] if steps.start else []
        opened = session.Session(parse([*argv, "--out", str(folder), *resume]), ranks)
    finally:
        session.shorten_step_on_one_rank = original
    run = opened.run
    assert opened.first_step == steps.start
    loss = run.method.loss

    def loss_of_step(*args):
        outcome = loss(*args)
        return outcome._replace(loss=outcome.loss * float("nan")) if step == NONFINITE else outcome

    run.method.loss = loss_of_step
    kept = []
    for step in steps:
        with Operators() as operators:
            loop.train_step(run, step)
        kept.append({name: Bytes(tensor) for name, tensor in bits(run).items()})
        if step == 2:
            run.save(3)
    run.loader.close()
    return kept, operators.counts, run


class Odd(torch.nn.Module):
    """Seven weights, to which ZeRO adds one to make their number even, and four of which get no gradient."""

    def __init__(self):
        super().__init__()
        self.used = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.idle = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        return (self.used * x).float().square().sum()


def train_odd(argv: list[str], ranks, shortened: bool) -> list[dict[str, Bytes]]:
    """Return the bytes after each of three steps of `Odd` with the DeepSpeed file of a run."""
    import deepspeed

    from fastdit.kernels import AdamWEMA
    from fastdit.training.deepspeed_config import make_deepspeed_config
    from fastdit.training.deepspeed_internals import shorten_step_on_one_rank

    settings, module = make_deepspeed_config(parse(argv), ranks.world, on_gpu=False), Odd()
    options = {"lr": 1e-2, "weight_decay": 0.1, "emas": {"ema": 0.9}, "max_norm": settings.clip or None}
    optimizer = AdamWEMA(module.parameters(), **options)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings.merged)
    if shortened:
        shorten_step_on_one_rank(engine, optimizer.update)
    kept = []
    for step in range(3):
        for micro in range(settings.accumulation):
            x = torch.tensor([0.3, 0.7, step + micro + 1.1]).to(module.used)
            engine.backward(engine(x))
            engine.step()
        partitions = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = [*module.parameters(), *partitions]
        tensors += [state for p in partitions for _, state in sorted(optimizer.state.get(p, {}).items())]
        kept.append({str(i): Bytes(tensor.detach().clone()) for i, tensor in enumerate(tensors)})
    return kept


def compare(argv: list[str], out: Path, ranks) -> dict:
    """Return what differs between the two kinds of step in one run, and what was replaced."""
    from fastdit.training import deepspeed_internals

    mine, operators, run = train(argv, out / "mine", range(3), ranks, shortened=True)
    plain, plain_operators, _ = train(argv, out / "plain", range(3), ranks, shortened=False)
    engine, zero = run.engine, run.engine.optimizer
    replaced = [
        name
        for owner in (engine, zero)
        for name, value in vars(owner).items()
        if getattr(value, "__module__", "") == deepspeed_internals.__name__
    ]
    names = {"engine": deepspeed_internals.ENGINE_NAMES, "zero": deepspeed_internals.ZERO_NAMES}
    skipped = [torch.frombuffer(bytearray(step["skipped"].content[1]), dtype=torch.float32) for step in mine]
    mine_by_plain, _, _ = train(argv, out / "mine", range(3, 5), ranks, shortened=False)
    plain_by_mine, _, _ = train(argv, out / "plain", range(3, 5), ranks, shortened=True)
    return {
        "replaced": sorted(replaced),
        "missing": [name for name in names["engine"] if not hasattr(engine, name)]
        + [name for name in names["zero"] if not hasattr(zero, name)],
        "parameters": len(list(engine.module.parameters())),
        "operators": [dict(operators), dict(plain_operators)],
        "different": differences(mine, plain),
        "skipped": [float(flag) for flag in skipped],
        "changed": [len(differences([a], [b])) for a, b in pairwise(mine)],
        "different after resuming": differences(mine_by_plain, plain_by_mine),
        "steps": len(mine_by_plain),
        "odd": differences(*(train_odd(argv, ranks, shortened) for shortened in (True, False))),
    }


def main(argv: list[str]) -> None:
    out, cases = Path(argv[0]), [shlex.split(case) for case in argv[1:]]
    ranks = distributed.start(parse(cases[0]))
    records = [compare(case, out / str(i), ranks) for i, case in enumerate(cases)]
    (out / "records.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main(sys.argv[1:])
