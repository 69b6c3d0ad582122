"""Train in fp64, written out, with all ranks' batches in one process: launched runs are compared with it."""

import math
from contextlib import contextmanager

import torch

from fastdit import run_parts
from fastdit.kernels import SampleGenerator


@contextmanager
def rank_inputs(config, source, world: int, accumulation: int = 1):
    """For each of `world` ranks an iterator over what a run gives to its method: x0, y and the random numbers."""
    here = {"batch": config.batch // (world * accumulation), "world": world, "device": torch.device("cpu")}
    loaders = [run_parts.build_loader(config, source, rank=rank, **here) for rank in range(world)]
    yield [_with_draws(loader, config.seed, rank, world, here["batch"]) for rank, loader in enumerate(loaders)]
    for loader in loaders:
        loader.close()


def _with_draws(loader, seed: int, rank: int, world: int, batch: int):
    for number, (x0, y) in enumerate(loader):
        yield x0, y, SampleGenerator(seed, (number * world + rank) * batch, "cpu")


class MasterWeights:
    """fp64 weights of `module` under the recipes' optimizer: AdamW (0.9, 0.999), eps 1e-4, decay 0.1, gradients clipped
    to norm 0.5, learning rate 2e-3 after a linear warm-up along a cosine to zero."""

    def __init__(self, module: torch.nn.Module, warmup: int, steps: int, averages=("ema",)):
        names, self.params = zip(*module.named_parameters())
        self.warmup, self.steps, self.t = warmup, steps, 0
        self.weights = [p.detach().double() for p in self.params]
        self.first, self.second = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))
        self.averages = {name: dict(zip(names, (w.clone() for w in self.weights))) for name in averages}

    def no_gradient(self) -> list[torch.Tensor]:
        return [torch.zeros_like(w) for w in self.weights]

    def step(self, grads: list[torch.Tensor], **decays: float) -> float:
        """One update, and the averages'; the module gets the new weights, rounded. Returns the gradients' norm."""
        self.t += 1
        t, warmup = self.t, self.warmup
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
        done = (t - 1 - warmup) / (self.steps - warmup)
        lr = 2e-3 * (t / warmup if t <= warmup else 0.5 * (1 + math.cos(math.pi * done)))
        for w, g, m, v in zip(self.weights, grads, self.first, self.second):
            g = g / max(1.0, (norm + 1e-6) / 0.5)
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            w.mul_(1 - lr * 0.1)
            w -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-4)
        for name, decay in {"ema": min(0.8, t / (9 + t)), **decays}.items():
            for average, w in zip(self.averages[name].values(), self.weights):
                average.mul_(decay).add_((1 - decay) * w)
        with torch.no_grad():
            for p, w in zip(self.params, self.weights):
                p.copy_(w)
        return norm
