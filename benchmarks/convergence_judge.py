"""Judges a run of the convergence benchmark: `python benchmarks/convergence_judge.py --run DIR`.

At each checkpoint, and before the first step: the plain denoising loss of the sampled weights, all patches visible, on
the first training images with fixed noise (methods share it, and no run sees its data often), and, if asked, FD-lite0
of samples. At the end also class agreement, as in a run's report, and the run's health signals. Prints one JSON list;
of the checkpoints only the last stays.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdit.command_line import OneLineParser
from fastdit.config import CONFIG_FILE, Config, EvalConfig, load
from fastdit.engine import build, drawing, judge, runtime
from fastdit.engine.checkpoint_files import checkpoints, choose, classes_of, manifest, sampled_weights
from fastdit.engine.evaluation import Evaluator
from fastdit.engine.layout import CHECKPOINTS
from fastdit.engine.records import read_metrics
from fastdit.errors import run_command

LOSS_IMAGES = 2048
HEALTH = (
    "grad_norm", "structure_loss", "real_distance", "fake_distance", "distance_correlation", "psi_grad_norm",
    "teacher_entropy", "teacher_student_kl", "prototype_usage", "centre_norm",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Leaves the process: 0, or 2 after a UserError."""
    run_command(_judge, argv)


def _judge(argv: list[str]) -> None:
    parser = OneLineParser(prog="convergence_judge.py", description="Judge a finished run of convergence.py.")
    parser.add_argument("--run", type=str, required=True, help="its folder")
    parser.add_argument("--samples", type=int, default=500, help="for class agreement")
    parser.add_argument("--guidance", type=str, default="1,3", help="scales at which they are drawn, with commas")
    parser.add_argument("--fd", type=int, default=0, help="samples for FD-lite0 at each point; 0 is off")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse(argv)
    torch.set_num_threads(args.threads)
    folder = Path(args.run)
    config = load(folder / CONFIG_FILE)
    last = choose(folder, None)
    shape = build.shape_of(config, classes_of(last))
    module, method = build.build_training(config, shape)  # as it was before the first step
    device = torch.device("cuda" if runtime.on_gpu(config) else "cpu")
    network = method.sampled_network(module).to(device).eval()
    known = judge.known_images(config, build.open_data(config))
    images, labels = (part[:LOSS_IMAGES] for part in known)
    distance = _distance(config, shape, device, args.fd) if args.fd else lambda network, step: None
    rows, saved = [], sorted(checkpoints(folder / CHECKPOINTS))
    for path in (None, *saved):
        step = 0
        if path:
            step = manifest(path)["step"]
            network.load_state_dict(sampled_weights(path))
        found = {"loss": loss(network, build.build_noise(config), images, labels), "fd": distance(network, step)}
        rows.append({"step": step, "images": step * config.batch, **found, "agreement": None, "health": None})
    rows[-1]["agreement"] = {
        f"{scale:g}": _agreement(network, config, shape, args.samples, scale, known)
        for scale in map(float, args.guidance.split(","))
    }
    rows[-1]["health"] = health(read_metrics(folder))
    print(json.dumps(rows))
    for path in saved[:-1]:
        shutil.rmtree(path)


def _distance(config: Config, shape: build.Shape, device: torch.device, n: int):
    """FD-lite0, value and floor, of n samples and n images, by the run's sampler settings, as evaluate.py has it."""
    config = replace(config, eval=EvalConfig(n=n, n_real=n))
    evaluator = Evaluator(config, shape, runtime.Runtime(0, 1, 0, device), live=False)

    def distance(network: nn.Module, step: int) -> dict[str, float]:
        return evaluator(network, step)["figures"]["FD-lite0"]

    return distance


@torch.no_grad()
def loss(network: nn.Module, noise, x0: Tensor, y: Tensor) -> float:
    """Mean over samples x0 (n, C, H, W) with labels y (n,); noise is the same in every call."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    generator, total = torch.Generator().manual_seed(0), 0.0
    for images, classes in zip(x0.split(128), y.split(128)):
        level = noise.draw(len(images), generator=generator, device="cpu").to(device)
        eps = torch.randn(images.shape, generator=generator).to(device)
        images = images.to(device)
        out = network(*noise.network_input(noise.add_noise(images, eps, level), level), classes.to(device))
        total += float(noise.loss(out, images, eps, level)[0].sum())
    return total / len(x0)


def health(lines: list[dict]) -> dict[str, list[float]]:
    """Of each health signal that a run's metrics have: least, most, last."""
    found = {}
    for name in HEALTH:
        if values := [line[name] for line in lines if name in line]:
            found[name] = [min(values), max(values), values[-1]]
    return found


def _agreement(network, config: Config, shape: build.Shape, n: int, guidance: float, known) -> float:
    labels = drawing.balanced_labels(n, range(shape.classes))
    device = next(network.parameters()).device
    settings = replace(config.sample, guidance=guidance)
    process = build.build_noise(config)
    drawn = drawing.draw(network, process, settings, shape, labels, indices=range(n), seed=0, device=device)
    return judge.agreement(drawing.to_uint8(drawn), labels, known)


if __name__ == "__main__":
    main()
