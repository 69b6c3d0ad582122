"""Count the kernels that one training step launches on a GPU, on a machine without one.

    python benchmarks/count_launches.py --depths 12 --width 384 --heads 6 --method sd_dit
    python benchmarks/count_launches.py --depths 1,2 --sd_dit.mask_ratio 0.5      # the difference is one block

The step is fastdit's own, in bf16 under DeepSpeed's ZeRO-1, on a batch of four latents. A launch is a Triton launch,
which is compiled for an H100 and not run (`compile_only.py`), or a PyTorch operator that writes memory. Each operator
counts as one kernel. On a GPU a few take two or three, such as the backward pass of attention. The optimizer, one
kernel on a GPU, counts as the PyTorch operators that replace it here. So compare two versions of the code by their
counts, and do not expect a profile on a GPU to show exactly the same number.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from compile_only import compile_only
from flags import split_flags
from record import writable
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import distributed
from fastdit.command_line import OneLineParser
from fastdit.config import Config
from fastdit.errors import UserError, run_command
from fastdit.parser import parse

METHODS = Config.__dataclass_fields__["method"].type
SAMPLE = "--data.source synthetic:4x8x8:10:100 --data.size 8 --data.channels 4"
RUN = "--ds_config zero1 --batch 4 --precision bf16 --device cpu --threads 1 --out none --model.size S --model.patch 2"
RUN += " --model.attention sdpa"  # the launches are to be a GPU's; on CPUs, auto has a backward pass of many products
# The networks beside the DiT are small, which makes the step quick and changes no count.
SMALL = (
    "--sd_dit.decoder_width 32 --sd_dit.decoder_heads 2 --sd_dit.prototypes 64 --sd_dit.head_width 32 "
    "--sd_dit.bottleneck 16 --sadm.psi_width 32 --sadm.psi_features 16 --sadm.start 0"
)
# Operators that launch nothing although their schema does not say so: they allocate, or return a view.
NO_KERNEL = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided", "resize_",
    "set_",
}  # fmt: skip


@dataclass
class Launches:
    """Kernels that a step launches: Triton's by kernel, PyTorch's by operator, and all by part of the step."""

    triton: Counter = field(default_factory=Counter)
    torch: Counter = field(default_factory=Counter)
    parts: Counter = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.triton.total() + self.torch.total()


def main(argv: list[str] | None = None) -> None:
    """Run the command and leave the process: 0, or 2 after a UserError."""
    run_command(_count, argv)


def _count(argv: list[str]) -> None:
    parser = OneLineParser(
        prog="count_launches.py",
        description="Count the kernel launches of a step without a GPU. Any dotted setting of a run is a flag too.",
    )
    parser.add_argument("--depths", type=str, default="12", help="blocks of the DiT; several with commas between")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--method", type=METHODS, default="dit")
    parser.add_argument("--json", type=str | None, default=None, help="write the counts")
    own, dotted = split_flags(argv)
    args = parser.parse(own)
    depths = args.depths.split(",")
    if not all(depth.isdecimal() and int(depth) for depth in depths):
        raise UserError(f"--depths {args.depths}: must be whole numbers from 1 on, as 1,2")
    path = writable("json", args.json) if args.json else None

    own_flags = {"--model.depth": "--depths", "--model.width": "--width", "--model.heads": "--heads"}
    for word in dotted:
        if (name := word.partition("=")[0]) in own_flags:
            raise UserError(f"{name}: is set by {own_flags[name]} here; give that instead")

    # All steps run in this process, one after another.
    small = SMALL if args.method != "dit" else ""
    words = f"{RUN} {SAMPLE} --model.width {args.width} --model.heads {args.heads} --method {args.method} {small}"
    configs = [parse([*words.split(), "--model.depth", depth, *dotted]) for depth in depths]
    ranks = distributed.start(configs[0])
    rows = []
    for depth, config in zip(depths, configs):
        launches = count_step(config, ranks)
        rows.append({"depth": int(depth), "total": launches.total, **vars(launches)})
        print("\n".join(describe(launches, f"{args.method}, depth {depth}")), flush=True)
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    torch.distributed.destroy_process_group()


def count_step(config: Config, ranks: distributed.Runtime) -> Launches:
    """Return the launches of the second training step of `config`, which must be for one CPU rank."""
    from fastdit.training.loop import train_step  # imports DeepSpeed: after distributed.start
    from fastdit.training.session import Session

    class Silent(distributed.Runtime):
        """A rank that leaves no files of a run behind."""

        first = False

    # The first step runs the CPU's own kernels, so that every lazily made state exists before the counted step.
    silent = Silent(ranks.rank, ranks.world, ranks.local_rank, ranks.device, ranks.hosts)
    run = Session(config, silent).run
    train_step(run, 0)

    launches = Launches()
    parts = _Parts(launches)
    run.loader = _Counted(run.loader, parts)
    run.method.loss = parts.wrap("forward", run.method.loss)
    run.engine.backward = parts.wrap("backward", run.engine.backward)
    run.engine.step = parts.wrap("optimizer", run.engine.step)

    def on_launch(name: str, _) -> None:
        launches.triton[name] += 1

    with compile_only(on_launch), _Operators(launches):
        train_step(run, 1)
    parts.add("rest", launches.total - launches.parts.total())
    run.loader.close()
    return launches


class _Parts:
    """Attributes launches to the parts of a step, whose functions it wraps."""

    def __init__(self, launches: Launches):
        self.launches = launches

    def add(self, part: str, count: int) -> None:
        self.launches.parts[part] += count

    def wrap(self, part: str, function: Callable) -> Callable:
        """Return `function` with its launches added to `part`."""

        def counted(*args, **options):
            before = self.launches.total
            result = function(*args, **options)
            self.add(part, self.launches.total - before)
            return result

        return counted


class _Counted:
    """A loader whose launches count as the part "data"."""

    def __init__(self, loader, parts: _Parts):
        self.loader, self.parts = loader, parts

    def __next__(self):
        return self.parts.wrap("data", next)(self.loader)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


class _Operators(TorchDispatchMode):
    """Counts the operators that write memory, also those inside fastdit's own operators."""

    def __init__(self, launches: Launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastdit":
            # Run the operator's Python function with this mode on: what it launches is counted in its place.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("aten", "c10d") and _writes(func) and name not in NO_KERNEL:
            self.launches.torch[name] += 1
        return func(*args, **kwargs)


def _writes(func: torch._ops.OpOverload) -> bool:
    """Return whether an operator's schema says that it changes a tensor or returns a new one."""
    makes = any("Tensor" in str(result.type) for result in func._schema.returns)
    return func._schema.is_mutable or (makes and not func.is_view)


def describe(launches: Launches, title: str) -> list[str]:
    """Return lines that say how many kernels are launched, where and which."""
    parts = ", ".join(f"{part} {count}" for part, count in launches.parts.most_common())
    lines = [
        f"{title}: {launches.total} launches, {launches.triton.total()} of Triton kernels and "
        f"{launches.torch.total()} of PyTorch operators",
        f"by part: {parts}",
    ]
    for kind, counts in (("Triton", launches.triton), ("PyTorch", launches.torch)):
        lines += [f"{kind:8} {count:5}  {name}" for name, count in counts.most_common()]
    return lines


if __name__ == "__main__":
    main()
