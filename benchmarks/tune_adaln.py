"""Launch options of the adaLN kernels, timed against each other: `python benchmarks/tune_adaln.py`.

For each width the forward and the backward pass of gate_residual_modulate, the site that a block has twice, with every
choice below, in turns and with cold caches as in kernels.py. A choice whose results are not the default's is an error,
one that does not compile or fit is left out. What wins belongs into kernels/adaln_triton.py, by hand.
"""

import itertools
from functools import partial

import torch
from operations import SIZES
from timing import FULL, QUICK, Clock, Runner
from torch import Tensor

from fastdit.command_line import OneLineParser
from fastdit.errors import UserError, run_command
from fastdit.kernels import adaln_triton

Options = dict[str, int]
# Without a limit, Triton 3.6 takes 80 registers at width 1152 and Triton 3.7 takes 64.
FORWARD = {"TILE": (1, 2, 4, 8), "num_warps": (2, 4, 8, 16), "maxnreg": (None, 64)}
# First what decides how much is in flight, then with the best of those how it is cut. With 64 registers all choices
# spill. Rows that are loaded ahead take a few more registers.
BACKWARD = (
    {"TILE": (1, 2, 4), "num_warps": (2, 4, 8, 16), "maxnreg": (96, 128, 168)},
    {"STAGES": (1, 2, 3), "CHUNK": (8, 16, 32, 64), "maxnreg": (128, 168)},
)
VALUES = range(4, 33)  # of a row in a thread: others spill, or leave threads without work


def main(argv: list[str] | None = None) -> None:
    """Leaves the process: 0, or 2 after a UserError."""
    run_command(_tune, argv)


def _tune(argv: list[str]) -> None:
    parser = OneLineParser(prog="tune_adaln.py", description="Time launch options of the adaLN kernels on this GPU.")
    parser.add_argument("--widths", type=str | None, default=None, help="with commas between; default: S, B and XL")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--quick", type=bool, default=False, nargs="?", const=True, help="tiny, in the interpreter: does it run at all"
    )
    args = parser.parse(argv)
    if not (args.quick or torch.cuda.is_available()):
        raise UserError("tune_adaln.py: torch sees no CUDA device here; --quick runs a few choices in the interpreter")
    given = args.widths.split(",") if args.widths else [str(SIZES[size]["width"]) for size in ("S", "B", "XL")]
    widths = [int(width) for width in given if width.isdecimal() and 0 < int(width) <= adaln_triton.MAX_WIDTH]
    if len(widths) < len(given):
        raise UserError(
            f"--widths {args.widths}: must be whole numbers from 1 to {adaln_triton.MAX_WIDTH}, as 384,1152"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, QUICK if args.quick else FULL[device.type])
    copy = clock.copy_rate()
    print(f"copy: {copy:.0f} GB/s")
    for width in widths:
        for site in (Forward(args, width, device), Backward(args, width, device)):
            best = site.default
            for grid in site.grids:
                best = _race(site, best, grid, clock, copy, args.quick)


class Forward:
    """r and h of x, y and the vectors."""

    def __init__(self, args, width: int, device: torch.device):
        shape = (args.batch, args.tokens, width)
        dtype = torch.float32 if args.quick else torch.bfloat16
        randn = partial(torch.randn, device=device, dtype=dtype)
        self.name, self.default = f"forward, width {width}", adaln_triton.forward_options(width)
        self.grids: tuple = ({"TILE": (2, 4), "maxnreg": (None, 64)},) if args.quick else (FORWARD,)
        self.sets = [
            (randn(shape), randn(shape), *randn(args.batch, 3 * width).unflatten(1, (3, width)).unbind(1))
            for _ in range(1 if args.quick else 3)
        ]
        self.out = randn(shape), randn(shape), torch.zeros(*shape[:2], 2, device=device)
        self.bytes = 4 * self.out[0].nbytes

    def run(self, options: Options, index: int) -> tuple[Tensor, ...]:
        adaln_triton.forward(*self.sets[index], None, 1e-6, False, *self.out, options)
        return self.out


class Backward(Forward):
    """All gradients, that of the bias in y too, and h again, from r."""

    def __init__(self, args, width: int, device: torch.device):
        super().__init__(args, width, device)
        self.name, self.default = f"backward, width {width}", adaln_triton.backward_options(width, args.tokens)
        self.grids = ({"TILE": (1, 2), "STAGES": (1, 2)}, {"CHUNK": (4, 8)}) if args.quick else BACKWARD
        forward = adaln_triton.forward_options(width)
        runs = (super(Backward, self).run(forward, index) for index in range(len(self.sets)))
        self.results = [tuple(tensor.clone() for tensor in run) for run in runs]
        x, _, gate, *_ = self.sets[0]
        like = (x, x, *[gate.contiguous()] * 3)
        self.gradients = [torch.empty_like(tensor) for tensor in like]
        self.y_bias = torch.empty_like(gate[0])
        self.bytes = 7 * x.nbytes

    def run(self, options: Options, index: int) -> tuple[Tensor, ...]:
        x, *rest = self.sets[index]
        r, h, stats = self.results[index]
        out = (*self.gradients, self.out[1], self.y_bias)
        adaln_triton.backward(x, h, r, *rest, None, stats, False, False, *out, options)
        return out


def _race(site: Forward, start: Options, grid: dict, clock: Clock, copy: float, quick: bool) -> Options:
    """Print the choices of `grid`, else as `start`, from the fastest on. Returns the fastest."""
    expected = [tensor.float().clone() for tensor in site.run(site.default, 0)]
    runners, chosen = {}, {}
    for options in choices(start, grid, quick):
        try:
            found = site.run(options, 0)
        except Exception as error:  # a compiler's: a result, not the end of the run
            print(f"{named(options)}: {type(error).__name__}")
            continue
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.float(), theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
        name = named(options)
        runners[name], chosen[name] = Runner(partial(site.run, options)), options
    if not runners:
        return start
    times = clock.interleave(runners, len(site.sets))
    print(f"\n{site.name}; default: {named(site.default)}")
    order = sorted(times, key=lambda name: times[name].p50)
    for name in order[:12]:
        rate = site.bytes / times[name].p50 / 1e6
        print(f"  {times[name].p50:8.4f} ms {rate:6.0f} GB/s {rate / copy:6.1%} of copy  {name}", flush=True)
    return chosen[order[0]]


def choices(start: Options, grid: dict, quick: bool) -> list[Options]:
    found = [start | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [o for o in found if quick or o["BLOCK"] // (32 * o["num_warps"]) in VALUES]


def named(options: Options) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    main()
