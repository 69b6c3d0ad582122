"""Run under a launcher: takes steps of each of several runs and tells what every rank holds and sends.

python tests/programs/measure_traffic.py OUT 'flags of one run' 'flags of another' ...   writes OUT/RANK.json, a list.
"""

import gc
import json
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from fastdit import distributed
from fastdit.parser import parse

SENT = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_gather": 1, "reduce_scatter": 1,
        "reduce": 1}  # fmt: skip


class Traffic:
    """Bytes that a ring would send for the collectives called, in (n - 1) / n; scalars not counted."""

    def __init__(self):
        self.bytes = {}
        for name in SENT:
            self._wrap(name, getattr(dist, name))

    def _wrap(self, name: str, collective) -> None:
        def counted(*args, **options):
            given = [*args, *options.values()]
            tensors = [x for arg in given for x in (arg if isinstance(arg, list | tuple) else [arg])]
            sizes = [x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor)]
            # The whole is the longest tensor, or a list of shards and one shard more.
            whole = sum(sizes) - min(sizes) if any(isinstance(arg, list) for arg in given) else max(sizes, default=0)
            if whole > 64:
                self.bytes[name] = self.bytes.get(name, 0) + SENT[name] * whole
            return collective(*args, **options)

        setattr(dist, name, counted)


def main(out: Path, cases: list[str]) -> None:
    configs = [parse(shlex.split(case)) for case in cases]
    traffic, told = Traffic(), []  # before DeepSpeed takes hold of the collectives
    ranks = distributed.start(configs[0])
    from contenders import Engine, warm
    from stopwatch import Stopwatch
    from timing import nbytes

    for config in configs:
        engine = warm(lambda config=config: Engine(config, ranks, Stopwatch(ranks.device)), ranks.device)
        traffic.bytes = {}
        engine.step()
        weights = list(engine.run.engine.module.parameters())
        parts = [p for group in engine.run.optimizer.param_groups for p in group["params"]]
        masters = [p for p in parts if all(p is not weight for weight in weights)]
        told.append({
            "held": engine.held,
            "weights": nbytes(weights),
            "masters": nbytes(masters),
            "state": nbytes(x for state in engine.run.optimizer.state.values() for x in state.values()),
            "pool": nbytes([engine.run.loader._reader._pool]),
            "sent": dict(traffic.bytes),
            "sizes": vars(engine.sizes()),
        })  # fmt: skip
        engine.close()
        del engine, weights, parts, masters
        gc.collect()  # before the next is weighed
    (out / f"{ranks.rank}.json").write_text(json.dumps(told))
    ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # the launcher's
    main(Path(given[0]), given[1:])
