"""Help the tests of SADM: small smooth players, and methods.md's formulas loop by loop in fp64."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from fastdit.methods.denoising import Denoising
from fastdit.methods.structure_game import SADM, StructureGame
from fastdit.noise import EDM

CLASSES, CHANNELS, SIZE = 5, 2, (5, 6)
CPU = torch.device("cpu")


class Denoiser(nn.Module):
    """A network that is smooth in everything and whose output differs for every label and level."""

    def __init__(self, out_channels: int = CHANNELS):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.mix = nn.Parameter(0.4 * torch.randn(out_channels, CHANNELS, generator=generator))
        self.bias = nn.Parameter(0.3 * torch.randn(CLASSES + 1, out_channels, generator=generator))
        self.calls = 0

    def forward(self, x, t, y):
        self.calls += 1
        out = torch.einsum("oc,bchw->bohw", self.mix, x + torch.tanh(t / 500)[:, None, None, None])
        return out.tanh() + self.bias[y][:, :, None, None]


def tiny_psi(features: int = 4, values: int = CHANNELS * math.prod(SIZE)) -> nn.Module:
    """Return two smooth layers, far from linear on samples of [-1, 1]; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Linear(values, 9)
        return nn.Sequential(nn.Flatten(), first, nn.Tanh(), nn.Linear(9, features, bias=False))


def samples(n: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, CHANNELS, *SIZE, generator=generator) * 2 - 1
    return x0, torch.randint(CLASSES, (n,), generator=generator)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Silent(Denoising):
    """A base whose own loss is zero, so that only the structure loss is differentiated."""

    def compute_loss(self, out, x0, eps, level):
        outcome = super().compute_loss(out, x0, eps, level)
        return outcome._replace(loss=0 * outcome.loss)


class Scripted(Denoising):
    """A base whose noise and level belong to the sample; y is the sample's number, up to 32."""

    def draw(self, x0, y, generator):
        draws = seeded(11)
        level = self.noise.draw(32, generator=draws, device="cpu")
        eps = torch.randn(32, *x0.shape[1:], generator=draws)
        return level[y], eps[y], y % CLASSES


def game(process, base=Silent, psi: nn.Module | None = None, decoder=None, **settings) -> StructureGame:
    """Return a game that is ready to play, at weight 1 unless `settings` say otherwise."""
    settings = {"weight": 1.0, **settings}
    psi = tiny_psi() if psi is None else psi
    method = StructureGame(base(process, CLASSES, 0.3), SADM(**settings), psi, decoder=decoder)
    method.to(CPU, torch.float32)
    return method


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def first_gradients(method: StructureGame) -> list[torch.Tensor]:
    """Return Psi's gradients of L_str in its one step so far: Adam's first moment is -(1 - beta) times them."""
    beta = method.settings.psi_betas[0]
    return [-method.optimizer.state[p]["exp_avg"] / (1 - beta) for p in method.psi.parameters()]


@dataclass
class Exact:
    """Hold one micro-batch in fp64, with graphs to the parameters of `network` and `psi`."""

    network: nn.Module
    psi: nn.Module
    x0: torch.Tensor
    x0_hat: torch.Tensor  # as Psi sees it, clamped
    loss: torch.Tensor  # L_str

    def gradients(self, player: nn.Module, of: torch.Tensor | None = None) -> list[torch.Tensor]:
        loss = self.loss if of is None else of
        return list(torch.autograd.grad(loss, list(player.parameters()), retain_graph=True))


def exact(method: StructureGame, network: nn.Module, psi: nn.Module, x0, y, seed: int = 3) -> Exact:
    """Compute what `method.loss(network, x0, y, seeded(seed))` must find, by methods.md, section 2, (1) to (4)."""
    process, settings, draws = method.noise, method.settings, seeded(seed)
    level = process.draw(len(x0), generator=draws, device="cpu").double()
    eps = torch.randn(x0.shape, generator=draws).double()
    labels = method.drop_labels(y, draws)
    network, psi = (copy.deepcopy(player).double().requires_grad_(True) for player in (network, psi))
    x0, s = x0.double(), level[:, None, None, None]
    if process.name == "edm":
        sd = process.sigma_data
        total = s**2 + sd**2
        x_t, sigma = x0 + s * eps, level
        x0_hat = sd**2 / total * x_t + s * sd / total.sqrt() * network(x_t / total.sqrt(), level.log() / 4, labels)
    elif process.name == "flow":
        x_t, sigma = (1 - s) * x0 + s * eps, level / (1 - level)
        x0_hat = x_t - s * network(x_t, 1000 * level, labels)
    else:
        beta = torch.linspace(process.beta_start, process.beta_end, process.steps, dtype=torch.float64)
        signal = torch.cumprod(1 - beta, 0)[level.long()]
        sigma, a = ((1 - signal) / signal).sqrt(), signal[:, None, None, None]
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
        x0_hat = (x_t - (1 - a).sqrt() * network(x_t, level, labels)[:, :CHANNELS]) / a.sqrt()
    weight = sample_weights(sigma, settings)
    limit = x0.abs().max() if settings.clamp is None else settings.clamp
    x0, x0_hat = clamped(x0, limit), clamped(x0_hat, limit)
    return Exact(network, psi, x0, x0_hat, structure(psi(x0), psi(x0_hat), weight, settings))


def sample_weights(sigma: torch.Tensor, settings: SADM) -> torch.Tensor:
    """Compute w of samples at these noise-to-signal ratios."""
    faded = settings.sigma_data**2 / (sigma**2 + settings.sigma_data**2)
    return torch.where(sigma > settings.max_noise, 0, faded)


def clamped(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Limit the magnitudes of x; values outside get no gradient."""
    return torch.where(x > limit, limit, torch.where(x < -limit, -limit, x))


def structure(f, g, weight, settings: SADM) -> torch.Tensor:
    """Compute L_str of features f and g, pair by pair."""

    def distances(x):
        found = {}
        for i in range(len(x)):
            for j in range(len(x)):
                square = (x[i] - x[j]).square().sum()
                if settings.distance == "cosine":
                    found[i, j] = 1 - x[i] @ x[j] / (x[i].norm() * x[j].norm())
                elif i != j:
                    found[i, j] = square if settings.distance == "squared" else square.sqrt()
        pairs = {pair: d for pair, d in found.items() if pair[0] != pair[1]}
        power = {"rms": 2, "mean": 1}.get(settings.normalize, 0)
        total = sum(weight[i] * weight[j] for i, j in pairs)
        moment = sum(weight[i] * weight[j] * d**power for (i, j), d in pairs.items()) / total
        unit = moment ** (1 / power) if power else 1
        return {pair: d / unit for pair, d in pairs.items()}

    p, q = distances(f), distances(g)
    delta, cost, total = settings.huber_delta, 0, 0
    for i, j in p:
        e, w = (p[i, j] - q[i, j]).abs(), weight[i] * weight[j]
        huber = e**2 / 2 if e < delta else delta * (e - delta / 2)
        cost = cost + w * {"l2": e**2, "l1": e, "huber": huber}[settings.penalty]
        total = total + w
    return cost / total


def gradient_penalty(one: Exact, directions: torch.Tensor, relative: bool) -> torch.Tensor:
    """Compute the mean |d (v . Psi(x)) / d x|^2 of clean samples and of x0 predictions, and the mean of both."""
    total = 0
    for half, v in zip((one.x0, one.x0_hat.detach()), directions.double().chunk(2)):
        slopes, features = [], []
        for x, direction in zip(half, v):
            x = x[None].detach().requires_grad_()
            features.append(one.psi(x)[0])
            (slope,) = torch.autograd.grad(direction @ features[-1] / direction.norm(), x, create_graph=True)
            slopes.append(slope.square().sum())
        squares = [(a - b).square().sum() for a in features for b in features]
        distance = sum(squares) / (len(squares) - len(features)) if relative else 1
        total = total + sum(slopes) / len(slopes) / distance / 2
    return total


def scripted_step(numbers: torch.Tensor, features: int, accumulation: int = 1, **settings) -> dict:
    """Return what one rank finds in a step on these of eight samples, with the terms of the last micro-batch."""
    network, x0 = Denoiser(), samples(8)[0]
    method = game(EDM(), base=Scripted, psi=tiny_psi(features), **{"weight": 0.5, **settings})
    for part in numbers.chunk(accumulation):
        outcome = method.loss(network, x0[part], part, seeded())
        outcome.loss.backward()
    terms = outcome.terms | method.end_step()
    psi = [p.detach() for p in method.psi.parameters()]
    return {"terms": terms, "network": gradients(network), "psi": first_gradients(method), "weights": psi}


def one_of_two_ranks(rank: int, cases: list[dict]) -> list[dict]:
    """Return a list of `scripted_step` on half of the samples."""
    return [scripted_step(torch.arange(4) + 4 * rank, **case) for case in cases]
