"""One case measured: every phase of every contender, and the memory each takes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from operations import Case, Steps
from record import OURS, failure
from timing import Clock, Memory, Quantiles, Runner, as_tuple, memory
from torch import Tensor

BASELINES = ("eager", "compile")


class Measured(NamedTuple):
    phase: str
    contender: str
    ran: str
    times: Quantiles | None  # None: it failed
    bytes: int
    memory: Memory | None


def measure(clock: Clock, case: Case | Steps, dtype: torch.dtype, against: list[str]) -> Iterator[Measured]:
    """fastdit's implementation and those of BASELINES named in `against`, in inputs of `dtype`.

    A contender that raises is shown as failed, with the first line of why.
    """
    torch.compiler.reset()  # else dynamo's limit on recompilations counts cases that have nothing in common
    return (_steps if isinstance(case, Steps) else _differentiable)(clock, case, dtype, against)


def _differentiable(clock: Clock, case: Case, dtype: torch.dtype, against: list[str]) -> Iterator[Measured]:
    functions = {
        OURS: (case.ours, case.ran),
        "eager": (case.eager, "torch"),
        "compile": (torch.compile(case.eager, dynamic=False), "torch.compile"),
    }
    first = _inputs(case, clock.device, dtype, 0)
    count = clock.sets_of(sum(x.nbytes for x in first))
    sets = [first, *(_inputs(case, clock.device, dtype, seed) for seed in range(1, count))]
    upstreams = [_upstreams(case, inputs) for inputs in sets]
    contenders, memories, ran = {}, {}, {}
    for name in (OURS, *against):
        function, ran[name] = functions[name]
        contender = _Contender(function, case.leaves, sets, upstreams)
        try:
            for index in range(2):
                contender.both(index)
            memories[name] = memory(clock.device, partial(contender.forward, 0), partial(contender.gradients, 0))
            contenders[name] = contender
        except Exception as error:  # a compiler's, or no memory left: a result, not the end of the run
            ran[name] = failure(error)
    moved = case.bytes(sets[0])
    for phase in ("forward", "backward", "both"):
        runners = {name: getattr(contender, f"{phase}_runner")() for name, contender in contenders.items()}
        times = clock.interleave(runners, count) if runners else {}
        for name, what in ran.items():
            held = memories.get(name) if phase == "both" else None
            yield Measured(phase, name, what, times.get(name), moved[phase], held)


class _Contender:
    """A function's phases, on sets of inputs and of gradients with respect to its outputs."""

    def __init__(self, function: Callable, leaves: int, sets: list[tuple[Tensor, ...]], upstreams: list[list[Tensor]]):
        self.function, self.leaves, self.sets, self.upstreams = function, leaves, sets, upstreams

    def forward(self, index: int) -> list[Tensor]:
        return _differentiable_of(self.function(*self.sets[index]))

    def gradients(self, index: int, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self.sets[index][: self.leaves], self.upstreams[index])

    def both(self, index: int) -> tuple[Tensor, ...]:
        return self.gradients(index, self.forward(index))

    def forward_runner(self) -> Runner:
        return Runner(self.forward)

    def both_runner(self) -> Runner:
        return Runner(self.both)

    def backward_runner(self) -> Runner:
        """A set's forward runs right after its backward: other sets' turns come before its saved tensors' next."""
        graphs = [self.forward(index) for index in range(len(self.sets))]

        def again(index: int) -> None:
            graphs[index] = self.forward(index)

        return Runner(lambda index: self.gradients(index, graphs[index]), again)


def _inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return tuple(x.detach().requires_grad_(place < case.leaves) for place, x in enumerate(case.make(randn)))


def _upstreams(case: Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.enable_grad():
        return [torch.randn_like(x) for x in _differentiable_of(case.eager(*inputs))]


def _differentiable_of(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [x for x in as_tuple(results) if x.requires_grad]


def _steps(clock: Clock, case: Steps, _, against: list[str]) -> Iterator[Measured]:
    runners, memories, ran = {}, {}, {}
    for name, what, step in case.contenders("eager" in against, "compile" in against):
        ran[name] = what
        try:
            for _ in range(2):
                step()
            memories[name] = memory(clock.device, step, None)
            runners[name] = Runner(lambda _, step=step: step())
        except Exception as error:
            ran[name] = failure(error)
    times = clock.interleave(runners, 1) if runners else {}
    for name, what in ran.items():
        yield Measured("step", name, what, times.get(name), case.bytes, memories.get(name))
