"""Race the launch options of fastdit's kernels: `python benchmarks/rates.py --sweep`.

A site is a piece of rate_pieces.py whose kernel takes its options from a function of its module. Each choice below
stands in for what that function returns, with the function's other options, and is measured as a piece of its own. A
second grid starts from the first one's best. A choice with results unlike the default's, and one that does not compile
or fit, is a line with its error. What wins belongs into the function, by hand, with the figures.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from rate_pieces import Piece

from fastdit.kernels import adaln_triton, fp8, linear

Options = dict[str, int]
Grid = dict[str, tuple[int, ...]]
TOLERANCE = 2e-2  # of the largest value: sums of bf16 numbers in another order


@dataclass(frozen=True)
class Site:
    """A piece whose launch options are raced.

    Args:
        operation: the piece's.
        module, function: where its kernel's options come from.
        grids: the values of options, in all combinations; raced one grid after another.
    """

    operation: str
    module: ModuleType
    function: str
    grids: tuple[Grid, ...]


_ROWS = {"TILE": (1, 2, 4), "num_warps": (1, 2, 4, 8, 16)}
SITES = (
    Site("adaLN forward", adaln_triton, "forward_options", (_ROWS,)),
    Site(
        "adaLN backward from r, bias",
        adaln_triton,
        "backward_options",
        (
            {"TILE": (1, 2), "STAGES": (1, 2, 3, 4), "maxnreg": (96, 128, 168)},
            {"CHUNK": (16, 32, 64), "num_warps": (2, 4, 8, 16)},
        ),
    ),
    Site(
        "GELU backward, bias",
        linear,
        "gelu_backward_options",
        ({"TILE": (1, 2, 4), "STAGES": (1, 2, 3), "num_warps": (2, 4, 8)}, {"CHUNK": (32, 64, 128)}),
    ),
    Site("adaLN forward, fp8", adaln_triton, "forward_options", (_ROWS,)),
    Site("GELU forward, fp8", linear, "row_options", (_ROWS,)),
    *(Site(f"quantize rows of the {layer} gradient", fp8, "row_options", (_ROWS,)) for layer in ("fc1", "proj")),
)
QUICK = {"TILE": (1, 2)}  # on a CPU, in place of each grid


def race(take: Callable[[Piece], dict], pieces: list[Piece], quick: bool) -> None:
    """Race the options of all sites among `pieces`. `take` measures a piece and returns its line."""
    for site in SITES:
        for piece in pieces:
            if piece.operation == site.operation:
                _race(take, site, piece, quick)


def _race(take: Callable[[Piece], dict], site: Site, piece: Piece, quick: bool) -> None:
    usual, best = getattr(site.module, site.function), {}
    for grid in (QUICK,) if quick else site.grids:
        timed = []
        for values in itertools.product(*grid.values()):
            options = best | dict(zip(grid, values, strict=True))
            named = " ".join(f"{name}={value}" for name, value in options.items())
            make = _checked(site, usual, piece)
            with _options(site, usual, options):
                line = take(replace(piece, operation=f"sweep {piece.operation} {named}", make=make))
            if "failed" not in line:
                timed.append((line["ms_p50"], options))
        best = min(timed, key=lambda pair: pair[0])[1] if timed else best


@contextmanager
def _options(site: Site, usual: Callable[..., Options], chosen: Options) -> Iterator[None]:
    """Let `chosen` replace some of the options that `usual`, the site's own function, returns."""
    before = getattr(site.module, site.function)
    setattr(site.module, site.function, lambda *args, **kwargs: usual(*args, **kwargs) | chosen)
    try:
        yield
    finally:
        setattr(site.module, site.function, before)


def _checked(site: Site, usual: Callable[..., Options], piece: Piece) -> Callable[[], Callable[[], object]]:
    """Return `piece.make` with a comparison of the results by the present options and by the usual ones."""

    def make() -> Callable[[], object]:
        run = piece.make()
        found = run()
        with _options(site, usual, {}):
            expected = run()
        for mine, theirs in zip(found, expected, strict=True):
            if theirs.numel():
                mine, theirs = mine.float(), theirs.float()
                tolerance = TOLERANCE * theirs.abs().max().item()
                if not torch.allclose(mine, theirs, rtol=TOLERANCE, atol=tolerance):
                    raise ValueError("results are not those of the default options")
        return run

    return make
