"""Define the contenders of the throughput benchmark: fastdit's engine, plain PyTorch, and a product beside them.

All train on batches of their own loader, with the same method, noise process and sizes.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import torch
from scaling import BUCKET, KEPT, LIVE, Trained
from stopwatch import Contender, Stopwatch
from timing import memory, nbytes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdit import run_parts
from fastdit.config import Config
from fastdit.distributed import Runtime
from fastdit.methods.denoising import Denoising, Outcome
from fastdit.methods.psi_alignment import PsiAlignment
from fastdit.methods.self_discrimination import SelfDiscrimination
from fastdit.methods.structure_game import StructureGame
from fastdit.methods.wrapper import Wrapper
from fastdit.models import SplitDiT
from fastdit.training.loop import Run, train_step
from fastdit.training.session import Session

PRODUCT = {"cuda": 8192, "cpu": 2048}  # rows and columns
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}  # of weights and activations


class _Silent(Runtime):
    """Stand for a rank that leaves no files of a run behind."""

    first = False


class Engine(Contender):
    """Train as fastdit does: a `Session`, and the steps of `fastdit.training.loop.train`."""

    def __init__(self, config: Config, runtime: Runtime, watch: Stopwatch):
        """Build the session. `config.cuda_graphs` is True or False, so that the parts of a step are known."""
        super().__init__(watch)
        # Every step measured has all parts of the method, although a run's first steps may not.
        config = replace(config, sadm=replace(config.sadm, start=0.0))
        silent = _Silent(runtime.rank, runtime.world, runtime.local_rank, runtime.device, runtime.hosts)
        self.session = Session(config, silent)
        self.run, self.done = self.session.run, 0
        graphs = f", {self.session.graphs}" if self.session.graphs else ""
        fp8 = ", fp8 products" if config.precision == "fp8" else ""
        self.ran = f"ZeRO-{self.run.deepspeed.stage}, {self.session.attention}{fp8}{graphs}"
        self.flops = self.run.method.flops(self.run.engine.module)
        self.names = {"backward": "backward/network", "followers": "extras", "method": "extras"}
        for name, method in layers(self.run.method):
            if name in CUTS:
                self.names |= CUTS[name](self.run, method, watch)
        cut_step(self.run, self._lap)

    def step(self) -> None:
        self.watch.start()
        train_step(self.run, self.done)
        self._lap("rest")
        self.done += 1

    def _lap(self, part: str) -> None:
        self.watch.lap(self.names.get(part, part))

    def sizes(self) -> Trained:
        """Return the sizes that a prediction for other numbers of GPUs needs."""
        module, plan, method = self.run.engine.module, self.run.deepspeed, self.run.method
        weights = {p: getattr(p, "ds_numel", p.numel()) for p in module.parameters()}
        trained = [numel for p, numel in weights.items() if p.requires_grad]
        zero = plan.merged.get("zero_optimization", {})
        small = zero.get("stage3_param_persistence_threshold", KEPT)
        followers = [next(iter(follower.tensors.values())) for follower in self.run.ema_replicas]
        players = [each for _, each in layers(method) if getattr(each, "adversarial", False)]
        psi = players[0].psi.parameters() if players else ()
        return Trained(
            parameters=sum(trained),
            kept=sum(numel for numel in trained if numel < small),
            frozen=sum(weights.values()) - sum(trained),
            averages=len(self.run.optimizer.param_groups[0]["emas"]),
            replicas=nbytes([*module.buffers(), *_own_tensors(method)]),
            gathered=sum(sum(trained) * follower.itemsize for follower in followers),
            reduced=nbytes(psi),
            bf16=plan.precision == "bf16",
            accumulation=plan.accumulation,
            bucket=int(zero.get("reduce_bucket_size", BUCKET)),
            live=int(min(zero.get(f"stage3_max_{name}", LIVE) for name in ("live_parameters", "reuse_distance"))),
        )

    def close(self) -> None:
        self.run.loader.close()


def cut_step(run: Run, lap: Callable[[str], None]) -> None:
    """Make everything that `train_step` calls end a lap: `lap` is called with the name of the part."""

    def cut(owner: object, name: str, part: str) -> None:
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            result = call(*args, **kwargs)
            lap(part)
            return result

        setattr(owner, name, timed)

    cut(run.optimizer, "forget_nonfinite", "rest")
    run.loader = _CutLoader(run.loader, lap)
    cut(run.method, "loss", "forward")
    cut(run.optimizer, "require_finite", "rest")
    cut(run.engine, "backward", "backward")
    cut(run.engine, "step", "optimizer")
    cut(run, "follow", "followers")
    cut(run.method, "end_step", "method")


class _CutLoader:
    """Stand for a loader; each batch ends a lap."""

    def __init__(self, loader, lap: Callable[[str], None]):
        self._loader, self._lap = loader, lap

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(self._loader)
        self._lap("data")
        return batch

    def __getattr__(self, name: str):
        return getattr(self._loader, name)


def layers(method: Denoising) -> Iterator[tuple[str, Denoising]]:
    """Yield the method and those that it wraps, the outermost first, with their names."""
    yield method.name, method
    while isinstance(method, Wrapper):
        method = method.base
        yield method.name, method


def _own_tensors(method: Denoising) -> list[torch.Tensor]:
    """Return what a method keeps whole on every rank: a teacher, Psi and its optimizer's state, centers."""
    fields, found = [value for _, each in layers(method) for value in vars(each).values()], []
    for value in dict(zip(map(id, fields), fields)).values():
        if isinstance(value, nn.Module):
            found += [*value.parameters(), *value.buffers()]
        elif isinstance(value, torch.optim.Optimizer):
            found += [x for state in value.state.values() for x in state.values()]
        elif isinstance(value, torch.Tensor):
            found.append(value)
    return found


def cut_components(student: nn.Module, method: SelfDiscrimination, watch: Stopwatch, graphs: bool = False) -> str:
    """Cut the step into laps of SD-DiT's components; return the one that ends the backward pass.

    Forward, the components are modules, or the first and the other blocks of a split DiT. Backward, autograd runs the
    youngest node that is ready: first the losses, then head and prototypes, decoder, encoder. A hook on the last tensor
    that a component made therefore runs where that component's backward pass begins.

    graphs: a CUDA graph holds the whole of a split DiT, so encoder and decoder are one component, the denoiser.
    """
    network, split = student.network, isinstance(student.network, SplitDiT)
    first, second = ("network", "network") if split and graphs else ("encoder", "decoder")

    def cut(name: str):
        return lambda *_: watch.lap(name)

    def after_encoder(*call) -> None:
        watch.lap("forward/encoder")
        if (branch := call[-1][1]).requires_grad:
            branch.register_hook(cut("backward/decoder"))

    def after_decoder(*call) -> None:
        watch.lap(f"forward/{second}")
        out = call[-1] if isinstance(call[-1], torch.Tensor) else call[-1][0]
        out.register_hook(cut("backward/head"))

    def after_student(*call) -> None:
        watch.lap("forward/head")
        if method.compares:
            call[-1][2].loss.register_hook(cut("backward"))

    for module in (method.teacher, student):
        module.register_forward_pre_hook(cut("forward"))
    method.teacher.register_forward_hook(cut("forward/teacher"))
    if first == "encoder":
        encoder = network.blocks[network.split - 1] if split else network.encoder
        encoder.register_forward_hook(after_encoder)
    (network if split else network.decoder).register_forward_hook(after_decoder)
    student.register_forward_hook(after_student)
    return first


def cut_game(game: StructureGame, watch: Stopwatch, before: str) -> None:
    """End a lap after the loss of SADM's base, named `before`, and one after the base's end of a step.

    The structure term follows the base's loss and computes both players' gradients at once, down to the x0 prediction.
    So all of it lies in the forward pass, and Psi's step is what remains at the end of the step.
    """
    loss, end_step = game.base.loss, game.base.end_step

    def base_loss(*args) -> Outcome:
        outcome = loss(*args)
        watch.lap(before)
        return outcome

    def base_end_step() -> dict[str, torch.Tensor]:
        terms = end_step()
        watch.lap("extras")
        return terms

    game.base.loss, game.base.end_step = base_loss, base_end_step


def cut_alignment(method: PsiAlignment, watch: Stopwatch) -> None:
    """End a lap after psi_align's forward pass of Psi. The projector is a part of the denoiser."""
    targets_of = method.targets_of

    def cut(*args) -> torch.Tensor:
        targets = targets_of(*args)
        watch.lap("forward/psi")
        return targets

    method.targets_of = cut


def _cut_sd_dit(run: Run, method: SelfDiscrimination, watch: Stopwatch) -> dict[str, str]:
    last = cut_components(run.engine.module, method, watch, run.config.cuda_graphs)
    return {"backward": f"backward/{last}", "followers": "extras/refresh"}


def _cut_sadm(run: Run, method: StructureGame, watch: Stopwatch) -> dict[str, str]:
    cut_game(method, watch, "forward" if run.config.uses("sd_dit") else "forward/network")
    return {"forward": "forward/structure", "method": "extras/psi"}


def _cut_psi_align(run: Run, method: PsiAlignment, watch: Stopwatch) -> dict[str, str]:
    cut_alignment(method, watch)
    return {"forward": "forward/network"}


# By method: a function that makes a step end laps after the method's components, and returns the names of the laps of
# `train_step` where they differ then. The steps of a method that is not here have their phases alone.
CUTS: dict[str, Callable[[Run, Denoising, Stopwatch], dict[str, str]]] = {
    "sd_dit": _cut_sd_dit,
    "sadm": _cut_sadm,
    "psi_align": _cut_psi_align,
}


class Plain(Contender):
    """Train a DiT by PyTorch alone: torch.optim.AdamW (fused), `torch._foreach_lerp_` for the average; for bf16
    autocast over fp32 weights, for several ranks DistributedDataParallel. fastdit's operations run as their references.

    Args:
        config: of method dit. fp8 is taken as bf16.
        peer: makes a peer's model, called as `fastdit.models.DiT`, of a `Shape` and a number of output channels; None:
            that DiT itself, with torch's own attention.
        compiled: run it through `torch.compile`.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        watch: Stopwatch,
        peer: Callable[[run_parts.Shape, int], nn.Module] | None = None,
        compiled: bool = False,
    ):
        super().__init__(watch)
        self.ran = "torch.compile" if compiled else "torch"
        source = run_parts.open_data(config)
        shape = run_parts.shape_of(config, source.classes)
        precision = "bf16" if config.precision == "fp8" else config.precision
        config = replace(config, precision=precision, model=replace(config.model, attention="sdpa"))
        own, self.method = run_parts.build_training(config, shape)
        self.flops = self.method.flops(own)
        self.network = (peer(shape, own.out_channels) if peer else own).to(runtime.device).train()
        self.weights = [p for p in self.network.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.weights]
        rules = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}
        self.optimizer, self.decay = torch.optim.AdamW(self.weights, **rules, fused=True), config.ema.decay
        if compiled:
            self.network = torch.compile(self.network, dynamic=False)
        if runtime.world > 1:
            self.network = DistributedDataParallel(self.network)
        options = {"rank": runtime.rank, "world": runtime.world, "device": runtime.device}
        self.loader = run_parts.build_loader(config, source, batch=config.batch // runtime.world, **options)
        self.generator = torch.Generator(runtime.device).manual_seed(runtime.rank)
        self.autocast = torch.autocast(runtime.device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def step(self) -> None:
        lap = self.watch.lap
        with _reference_kernels():
            self.watch.start()
            x0, y = next(self.loader)
            lap("data")
            with self.autocast:
                loss = self.method.loss(self.network, x0, y, self.generator).loss
            lap("forward")
            loss.backward()
            lap("backward")
            self.optimizer.step()
            torch._foreach_lerp_(self.averages, self.weights, 1 - self.decay)
            self.optimizer.zero_grad()
            lap("optimizer")

    def close(self) -> None:
        self.loader.close()


@contextmanager
def _reference_kernels() -> Iterator[None]:
    before = os.environ.get("FASTDIT_KERNELS")
    os.environ["FASTDIT_KERNELS"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTDIT_KERNELS"]
        else:
            os.environ["FASTDIT_KERNELS"] = before


class Product(Contender):
    """Compute a large square product: what the device's GEMMs can do, in FLOP/s, while the others run."""

    def __init__(self, device: torch.device, dtype: torch.dtype, watch: Stopwatch):
        super().__init__(watch)
        self.n = PRODUCT[device.type]
        self.left, self.right = torch.randn(2, self.n, self.n, device=device).to(dtype)
        self.out = torch.empty_like(self.left)

    def step(self) -> None:
        self.watch.start()
        torch.mm(self.left, self.right, out=self.out)
        self.watch.lap("forward")

    def rate(self, milliseconds: float) -> float:
        """Return the rate in FLOP/s."""
        return 2 * self.n**3 / milliseconds * 1e3


def warm(make: Callable[[], Contender], device: torch.device) -> Contender:
    """Return make() after a few steps, with its memory measured: after the first step and during the second.

    On a GPU the host's time is measured too.
    """
    before = _held(device)
    contender = make()
    contender.step()
    contender.held = _held(device) - before
    contender.peak = contender.held + memory(device, contender.step, None).peak
    if device.type == "cuda":
        contender.host = median(_host_time(contender) for _ in range(3))
    return contender


def _host_time(contender: Contender) -> float:
    """Milliseconds until the host has launched a step on a GPU that waits for it."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    contender.step()
    return (time.perf_counter() - begun) * 1e3


def _held(device: torch.device) -> int:
    """Return the bytes of all tensors on the device: on a GPU by the allocator's counter."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and x.device == device]
    return sum(dict(map(_place, tensors)).values())


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address and the bytes of its storage; a compiler leaves tensors behind that have none."""
    storage = tensor.untyped_storage()
    try:
        return storage.data_ptr(), storage.nbytes()
    except RuntimeError:
        return 0, 0
