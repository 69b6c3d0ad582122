"""Warm-start the encoder Psi of `sadm` and `psi_align`: train it to classify the data before it is used (ours).

`fastdit-warm-start` uses this, as does a run before its step 0. The classifier on top of the features is discarded.
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

WINDOW = 20  # batches over which accuracy is averaged, and between two checks of the loss
LR = 2e-3
WEIGHT_DECAY = 0.01
MOST_STEPS = 10_000  # upper limit of the default number of steps before a run


class Diverged(Exception):
    """Signal a loss that is not finite. The argument is the number of finished steps."""


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
    """Train `encoder` in place as a classifier for `steps` steps, with AdamW and a cosine schedule that ends at zero.

    Return the accuracy on the last WINDOW batches of all ranks, each measured before its update. Gradients are averaged
    over ranks, and all ranks end with the same encoder. The host waits for the device every WINDOW steps.

    Args:
        encoder: the encoder in training mode, with trainable weights. Its output has `encoder.features` dimensions.
        batches: (x, y) of this rank, x as the encoder takes it and y (B,) int64.
        report: called every WINDOW steps and at the end with the number of finished steps and the accuracy.

    Raises `Diverged`, on every rank, if the loss is not finite.
    """
    # Put a linear classifier on top. It starts at zero, so no random numbers are drawn.
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

        # Check the loss every WINDOW steps only, because the check waits for the device.
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
    """Return the number of warm-start steps of Psi before a run of `steps` steps of `method`.

    asked: the setting psi_warm_steps. None stands for half of the run's steps, at most MOST_STEPS, and for no step if
    there is a single class. Raises UserError for steps that are asked for with a single class.
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
    """Train `psi` for `count` steps as a classifier, in place, and freeze it. Raises UserError if training diverges.

    method: the method whose settings messages name. say: prints a line.
    """
    # Announce the warm start, because it may take minutes.
    setting = f"{method}.psi_warm_steps"
    say(f"{method}: {count:,} steps in which Psi learns to classify the data; set {setting} to change that")

    # Train Psi, and freeze it.
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
