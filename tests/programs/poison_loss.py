"""A program of test_nonfinite.py: trains, and puts infinities where the environment says, on the last rank.

POISONED_STEPS: steps whose loss is infinite while its gradients are finite, counted from 1 over this start.
POISONED_STATE: a state of the optimizer, or "weights", that gets an infinity after the second step of this start.
"""

import os

import torch

from fastdit.methods.denoising import Denoising


def main(argv: list[str]) -> None:
    from fastdit import train

    last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    if last and "POISONED_STEPS" in os.environ:
        poison_losses([int(step) for step in os.environ["POISONED_STEPS"].split(",")])
    if last and "POISONED_STATE" in os.environ:
        poison_state(os.environ["POISONED_STATE"])
    train.main(argv)


def poison_losses(steps: list[int]) -> None:
    plain, calls = Denoising.compute_loss, []

    def compute_loss(self, *args):
        calls.append(None)
        outcome = plain(self, *args)
        return outcome._replace(loss=outcome.loss + torch.inf) if len(calls) in steps else outcome

    Denoising.compute_loss = compute_loss


def poison_state(name: str) -> None:
    from fastdit.training import loop

    plain, calls = loop.train_step, []

    def train_step(run, step):
        plain(run, step)
        calls.append(None)
        if len(calls) == 2:
            weights, state = next(iter(run.optimizer.state.items()))
            (weights if name == "weights" else state[name]).detach().view(-1)[3] = torch.inf

    loop.train_step = train_step
