"""Teach SADM's encoder its data: `python fastdit/warm_start.py --preset quickstart --steps 500 --out psi.safetensors`.

It learns to classify the data that the diffusion transformer will be trained on. The file holds it without the
classifier, for `load_structure_encoder`.
"""

from collections import deque
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastdit.command_line import OneLineParser
from fastdit.config import Config, DataConfig, ModelConfig, parse, presets
from fastdit.engine import build, runtime
from fastdit.errors import UserError, run_command
from fastdit.models.structure_encoders import LatentResNet, save_structure_encoder

WINDOW = 20  # batches over which accuracy is told
NAMES = ", ".join(presets())


def main(argv: list[str] | None = None) -> None:
    """The command, also installed as `fastdit-warm-start`. Leaves the process: 0, or 2 after a UserError."""
    run_command(_warm_start, argv)


def _parser(base: Config) -> OneLineParser:
    """What is not given is as in `base`."""
    psi = base.sadm
    parser = OneLineParser(prog="fastdit-warm-start", description="Train SADM's encoder as a classifier of the data.")
    parser.add_argument("--preset", type=str | None, default=None, help="data and encoder as in this one: " + NAMES)
    parser.add_argument("--out", type=str, required=True, help="file of the encoder's weights, .safetensors")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=256, help="samples per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW's, from here along a cosine to zero")
    parser.add_argument("--weight_decay", type=float, default=0.01, help="AdamW's, decoupled")
    parser.add_argument("--width", type=int, default=psi.psi_width, help="the run's sadm.psi_width")
    parser.add_argument("--features", type=int, default=psi.psi_features, help="the run's sadm.psi_features")
    parser.add_argument("--spectral_norm", type=bool, default=psi.spectral_norm, help="the run's sadm.spectral_norm")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_class_arguments(DataConfig, "data")
    parser.set_defaults({"data": asdict(base.data)})
    return parser


def _warm_start(argv: list[str]) -> None:
    args = _parser(Config()).parse(argv)
    if args.preset:
        args = _parser(parse(["--preset", args.preset])).parse(argv)
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors")
    shared = ("steps", "batch", "lr", "weight_decay", "seed", "device", "data")
    config = Config(model=ModelConfig(patch=1), **{field: getattr(args, field) for field in shared})  # checks ranges
    device = torch.device("cuda" if runtime.on_gpu(config) else "cpu")
    out.parent.mkdir(parents=True, exist_ok=True)

    source = build.open_data(config)
    if config.data.standardise != "factor":
        raise UserError(
            "data.standardise: depends on the run's noise process; give data.latent_scale and data.latent_shift of its "
            "config.yaml instead"
        )
    encoder = LatentResNet(
        channels=config.data.channels,
        features=args.features,
        width=args.width,
        spectral_norm=args.spectral_norm,
        seed=config.seed,
    ).to(device)
    with closing(build.build_loader(config, source, batch=config.batch, rank=0, world=1, device=device)) as loader:
        accuracy = _train(encoder, source.classes, loader, config, device)
    save_structure_encoder(encoder, out)
    epochs = config.steps * config.batch / source.n
    print(
        f"accuracy {accuracy:.1%} on the last {min(WINDOW, config.steps)} batches, each before it was trained on, "
        f"in epoch {epochs:.1f}; encoder in {out}"
    )


def _train(
    encoder: LatentResNet, classes: int, loader: Iterable[tuple[Tensor, Tensor]], config: Config, device: torch.device
) -> float:
    """Returns the accuracy on the last batches, each before its own step. Raises UserError when training diverges."""
    classifier = nn.Linear(encoder.features, classes, device=device)
    nn.init.zeros_(classifier.weight), nn.init.zeros_(classifier.bias)
    weights = [*encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    right: deque[Tensor] = deque(maxlen=WINDOW)
    bar = tqdm(range(1, config.steps + 1), desc="warm start", unit="step")
    for step, (x, y) in zip(bar, loader):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = encoder(x)
        scores = classifier(features)
        loss = F.cross_entropy(scores, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right.append((scores.argmax(1) == y).float().mean())
        if step % WINDOW == 0 or step == config.steps:
            if not loss.isfinite():
                raise UserError(f"--lr {config.lr}: the loss is not finite by step {step}; lower it")
            accuracy = torch.stack(list(right)).mean().item()
            bar.set_postfix_str(f"accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
