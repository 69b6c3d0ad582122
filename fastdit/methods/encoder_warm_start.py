"""Warm start of the encoder Psi of `sadm` and `psi_align`: it learns to classify the data before it is used.

Both `fastdit-warm-start` and a run before its step 0 use this. The classifier on top of the features is discarded.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.errors import UserError
from fastdit.methods.ranks import average_over_ranks, copy_from_first_rank

WINDOW = 20  # batches over which the accuracy is averaged, and between two looks at the loss
LR = 2e-3
WEIGHT_DECAY = 0.01
MOST_STEPS = 10_000  # before a run, unless it asks for more


class Diverged(Exception):
    """Say that the loss is not finite; the argument is the number of finished steps."""


def warm_start_encoder(
    encoder: nn.Module,
    classes: int,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float = LR,
    weight_decay: float = WEIGHT_DECAY,
    bf16: bool = False,
    report: Callable[[int, float], None] = lambda step, accuracy: None,
) -> float:
    """Train `encoder` for `steps` steps as a classifier, with AdamW and a cosine to zero, in place.

    encoder: in training mode, with trainable weights; `encoder.features` is the dimension of its output.
    batches: (x, y) of this rank. Gradients are averaged over ranks, and all ranks end with the same encoder.
    report: called every WINDOW steps and at the end with the finished steps and the accuracy.
    Returns the accuracy on the last WINDOW batches of all ranks, each measured before its own update. The host waits
    for the device every WINDOW steps. Raises `Diverged`, on every rank, when the loss is not finite.
    """
    # The classifier starts at zero, so no random numbers are drawn.
    device = next(encoder.parameters()).device
    classifier = nn.Linear(encoder.features, classes, device=device)
    nn.init.zeros_(classifier.weight), nn.init.zeros_(classifier.bias)
    weights = [*encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    correct: deque[Tensor] = deque(maxlen=WINDOW)

    for step, (x, y) in zip(range(1, steps + 1), batches):
        # One step of data-parallel training.
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = encoder(x)
        scores = classifier(features.float())
        loss = F.cross_entropy(scores, y)
        optimizer.zero_grad()
        loss.backward()
        average_over_ranks([p.grad for p in weights])
        optimizer.step()
        schedule.step()
        correct.append((scores.argmax(1) == y).float().mean())

        # Look at the loss now and then: every look waits for the device.
        if step % WINDOW == 0 or step == steps:
            seen = torch.stack([loss.detach(), torch.stack(list(correct)).mean()])
            average_over_ranks([seen])
            value, accuracy = seen.tolist()
            if value - value != 0:
                raise Diverged(step)
            report(step, accuracy)
    optimizer.zero_grad()
    copy_from_first_rank([*encoder.parameters(), *encoder.buffers()])
    return accuracy


def count_warm_steps(method: str, asked: int | None, steps: int, classes: int) -> int:
    """Return how many steps Psi takes as a classifier before a run of `steps` steps of `method`. Raises UserError.

    asked: the setting psi_warm_steps. None: half of the run's steps, at most MOST_STEPS, and none for a single class.
    """
    if asked and classes < 2:
        raise UserError(f"{method}.psi_warm_steps: the data has a single class, which teaches Psi nothing; set it to 0")
    if asked is None:
        return min(MOST_STEPS, math.ceil(steps / 2)) if classes > 1 else 0
    return asked


def warm_start_before_run(
    method: str,
    psi: nn.Module,
    classes: int,
    batches: Iterator[tuple[Tensor, Tensor]],
    count: int,
    bf16: bool,
    say: Callable[[str], None],
) -> None:
    """Train `psi` for `count` steps as a classifier, in place, and freeze it. Raises UserError when training diverges.

    say: prints a line. `method` names the settings in messages.
    """
    setting = f"{method}.psi_warm_steps"
    say(f"{method}: {count:,} steps in which Psi learns to classify the data; set {setting} to change that")
    begun = time.perf_counter()
    psi.train().requires_grad_(True)
    try:
        accuracy = warm_start_encoder(psi, classes, batches, steps=count, bf16=bf16)
    except Diverged as error:
        raise UserError(
            f"{setting}: Psi's loss is not finite by step {error} of {count}; check the data, or give "
            f"{method}.psi_weights that fastdit-warm-start wrote with a lower --lr"
        ) from None
    psi.eval().requires_grad_(False)
    seconds = time.perf_counter() - begun
    say(f"{method}: Psi classifies {accuracy:.1%} of its last batches, after {seconds:.1f} s, which count as training")
