"""Draw samples from a run: `python fastdit/sample.py --run runs/x --classes 0,3 --n 64 --guidance 2 --out grid.png`.

Without a run, `--weights` names a file or folder of weights, or published ones (`--weights dit-xl-2-256`). It also runs
under `deepspeed` or `torchrun`, whose ranks share the work.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse import Namespace
from tqdm import tqdm

from fastdit import api, distributed, run_parts
from fastdit.command_line import OneLineParser
from fastdit.config import Config, SampleConfig
from fastdit.errors import UserError, run_command
from fastdit.evaluation import draw_samples, grids, sample_requests
from fastdit.evaluation.open_run import (
    SAMPLER_FLAGS,
    add_batch_flag,
    add_run_flags,
    add_sampler_flags,
    add_weights_flag,
    class_names,
    open_run,
    settings_of,
)
from fastdit.evaluation.sample_files import Files, check_replaceable, save_picture, writing_npz
from fastdit.evaluation.sample_requests import Place
from fastdit.files import prepare_file, prepare_folder, sha256_of
from fastdit.models import LatentDecoder
from fastdit.models.known_weights import KNOWN, verified_weights
from fastdit.noise import NoiseProcess
from fastdit.rundir.checkpoint_files import MANIFEST, SAMPLED_EMA

PICTURES = 64  # on a grid, by default


def main(argv: list[str] | None = None) -> None:
    """Run the command, also installed as `fastdit-sample`. Exit with 0, or with 2 after a UserError."""
    run_command(_sample, argv)


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-sample", description="Draw samples with a run's EMA weights.")
    add_run_flags(parser, required=False)
    add_weights_flag(parser, "--weights", "; without --run a file, a folder, or a name that fastdit-data weights knows")
    parser.add_argument(
        "--noise",
        type=str | None,
        default=None,
        help=f"without --run: noise process, where the file does not tell it: {', '.join(api.NOISES)}",
    )
    parser.add_argument(
        "--out",
        type=str,
        default="grid.png",
        help="grid.png; x.npz; a folder, for PNG files by class; or x-{000000..}.tar, WebDataset shards",
    )
    parser.add_argument(
        "--format",
        type=Literal["auto", "grid", "npz", "adm", "png", "shards"],
        default="auto",
        help="by default what --out ends in; adm: .npz with ADM's names, arr_0 and arr_1; shards: also in a folder",
    )
    parser.add_argument("--per_shard", type=int, default=5000, help="samples in a shard, rounded up to whole batches")
    parser.add_argument(
        "--classes",
        type=str | None,
        default=None,
        help="class labels, ranges or names, such as 0,3,10-19 or cat,dog; a number is a label; default: all in turn",
    )
    parser.add_argument(
        "--n",
        "--samples",
        type=int | None,
        default=None,
        help=f"number of samples, {PICTURES} by default; under a launcher write --samples, since it takes --n for its "
        "own flag",
    )
    parser.add_argument(
        "--seed", type=str, default="0", help="seed of the noise; sample i depends on it and on i; or several: 0,1,2"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, or one of several, such as cuda:1")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads per rank; 0 shares the cores evenly")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    add_batch_flag(parser)
    add_sampler_flags(parser, lists=True)
    return parser


@dataclass(frozen=True)
class Drawing:
    """Hold what samples are drawn with.

    Args:
        network: the network, in the dtype and on the device of sampling.
        noise: its noise process.
        settings: those of the sampler.
        shape: shape of a sample.
        origin: the checkpoint, or the weights.
        identity: text that differs where the weights differ.
        names: names of the classes.
        decoder: decoder of latents, on the device, or None.
        runtime: the ranks that share the work.
        batch: samples in a batch.
    """

    network: torch.nn.Module
    noise: NoiseProcess
    settings: SampleConfig
    shape: run_parts.Shape
    origin: Path
    identity: str
    names: Sequence[str]
    decoder: LatentDecoder | None
    runtime: distributed.Runtime
    batch: int

    @property
    def size(self) -> tuple[int, int, int]:
        """Return the height, width and channels of a picture."""
        shape, decoder = self.shape, self.decoder
        factor, channels = (decoder.autoencoder.factor, 3) if decoder else (1, shape.channels)
        return factor * shape.height, factor * shape.width, channels

    def __call__(
        self, labels: np.ndarray, ids: Sequence[int], seed: int, settings: SampleConfig | None = None
    ) -> np.ndarray:
        """Return the samples `ids` of a request with these labels, uint8 (len(ids), H, W, C)."""
        x = draw_samples.draw(
            self.network,
            self.noise,
            settings or self.settings,
            self.shape,
            labels,
            indices=ids,
            seed=seed,
            device=self.runtime.device,
            decoder=self.decoder,
            batch=self.batch,
        )
        return draw_samples.to_uint8(x)

    def bar(self, total: int) -> tqdm:
        """Return a progress bar of samples, which rank 0 shows."""
        return tqdm(total=total, desc="sampling", unit="img", disable=not self.runtime.first)


def _sample(argv: list[str]) -> None:
    """Draw samples by the flags `argv`, and write them. Raises UserError."""
    # Check the flags.
    args = _parser().parse(argv)
    place = sample_requests.place_of(args.out, args.format)
    guidances = sample_requests.numbers("guidance", args.guidance, float) if args.guidance else []
    seeds = sample_requests.numbers("seed", args.seed, int)
    if min(seeds) < 0 or (args.n is not None and args.n < 1):
        raise UserError(f"--n {args.n} --seed {args.seed}: take n from 1 and seeds from 0")
    for flag in ("batch", "per_shard"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    swept = len(guidances) > 1 or len(seeds) > 1
    if swept and place.kind != "grid":
        raise UserError(
            f"--out {args.out}: several seeds or guidance scales make a grid; name a .png, or give one each"
        )
    args.guidance = guidances[0] if guidances else None
    config = _settings(args)

    # Join the other ranks, and see whether the result can be written.
    runtime = _join(args, config)
    runtime.decide(lambda: _check_place(place))

    # Open the run, or the weights.
    drawing = _open_run(args, config, runtime) if args.run else _open_weights(args, runtime)
    settings = [replace(drawing.settings, guidance=scale) for scale in guidances or [drawing.settings.guidance]]
    classes = sample_requests.classes_of(args.classes, drawing.names)
    n = args.n or (PICTURES if not swept else len(classes) if args.classes else 1)
    labels = draw_samples.balanced_labels(n, classes)
    if place.kind == "grid":
        grids.check_page(n * len(seeds) * len(settings), drawing.size[:2], f"--out {args.out}")

    # Draw the samples, and write them.
    if swept:
        _draw_sweep(drawing, labels, seeds, settings, place.path)
    elif place.kind in ("png", "shards"):
        _write_files(drawing, labels, seeds[0], place, args)
    else:
        _write_one(drawing, labels, seeds[0], place)
    if runtime.first:
        count = f"{n} samples" if not swept else f"{n} x {len(seeds)} x {len(settings)} samples"
        print(f"{count} of {drawing.origin} in {args.out}")
    if runtime.world > 1:
        runtime.leave()


def _join(args: Namespace, config: Config) -> distributed.Runtime:
    """Return the ranks. Raises UserError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {args.device}: every rank takes a device of its own; give cuda, cpu or auto")
    return distributed.start_sampling(replace(config, device=args.device, threads=args.threads))


def _check_place(place: Place) -> None:
    """Raise UserError if the result cannot be written, or would replace a file that this command did not make."""
    if place.kind in ("png", "shards"):
        prepare_folder(place.path, f"--out {place.path}")
    else:
        prepare_file(place.path, f"--out {place.path}")
        check_replaceable(place.path, f"--out {place.path}")
        if place.kind != "grid" and place.path.with_name(f".{place.path.name}.partial").exists():
            print(f"{place.path}: was interrupted and begins anew; a folder or shards would go on", flush=True)


def _settings(args: Namespace) -> Config:
    """Return the settings of the run, or the defaults without one. Raises UserError if flags contradict each other."""
    if args.run:
        if args.noise:
            raise UserError("--noise: is for weights without a run; a run knows its noise process")
        return settings_of(args)
    if args.weights == SAMPLED_EMA:
        raise UserError("--run: name the folder of a run, or weights without one: --weights FILE")
    if args.checkpoint:
        raise UserError("--checkpoint: belongs to a run; give --run too")
    return Config()


def _open_run(args: Namespace, config: Config, runtime: distributed.Runtime) -> Drawing:
    """Open the run, its autoencoder and the names of its classes. Raises UserError."""
    opened = open_run(args, config, runtime.decide, args.weights)
    decoder, run = run_parts.build_decoder(config, opened.shape), Path(args.run)
    if decoder is None and opened.shape.channels not in (1, 3):
        raise UserError(
            f"{run}: samples are latents of {opened.shape.channels} channels; a picture needs their autoencoder: give "
            "--autoencoder here, or --data.autoencoder to the run"
        )
    return Drawing(
        network=draw_samples.prepare(opened.network, config.sample, runtime.device),
        noise=run_parts.build_noise(config),
        settings=config.sample,
        shape=opened.shape,
        origin=opened.checkpoint,
        identity=sha256_of(opened.checkpoint / MANIFEST),
        names=class_names(run, config, opened.shape.classes),
        decoder=decoder.to(runtime.device) if decoder else None,
        runtime=runtime,
        batch=args.batch or draw_samples.BATCH[runtime.device.type],
    )


def _open_weights(args: Namespace, runtime: distributed.Runtime) -> Drawing:
    """Open weights that belong to no run, and the autoencoder. Raises UserError."""
    # Find them.
    path, noise = Path(args.weights), args.noise
    if args.weights in KNOWN and not path.exists():
        path = runtime.decide(lambda: verified_weights(args.weights))
        noise = noise or (KNOWN[args.weights].network and KNOWN[args.weights].network.outputs)
    if not path.exists():
        raise UserError(
            f"--weights {args.weights}: no such file or folder, nor a name that `fastdit-data weights` lists; for the "
            "weights of a run, give --run"
        )

    # Open them.
    model = api.from_pretrained(path, noise=noise, autoencoder=args.autoencoder, device=runtime.device)
    if model.noise is None:
        raise UserError(f"--weights {args.weights}: does not tell its noise process; give --noise, as ddpm for a DiT")
    if model.decoder is None and model.shape.channels not in (1, 3):
        raise UserError(
            f"--weights {args.weights}: samples are latents of {model.shape.channels} channels; a picture needs their "
            "autoencoder: give --autoencoder, such as models/sd-vae-ft-ema"
        )
    settings = model.choose({name: getattr(args, name) for name in SAMPLER_FLAGS})
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return Drawing(
        network=draw_samples.prepare(model.network, settings, runtime.device),
        noise=model.noise,
        settings=settings,
        shape=model.shape,
        origin=path,
        identity=" ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files),
        names=model.class_names,
        decoder=model.decoder,
        runtime=runtime,
        batch=args.batch or draw_samples.BATCH[runtime.device.type],
    )


def _write_one(drawing: Drawing, labels: np.ndarray, seed: int, place: Place) -> None:
    """Draw samples, and write them into one file on rank 0: a grid, or an .npz. A collective.

    The ranks draw a batch each in turns. Rank 0 appends a turn's batches in order.
    """
    # Open the file.
    runtime, parts = drawing.runtime, []
    with ExitStack() as stack:
        append = parts.append
        if runtime.first and place.kind != "grid":
            names = ("images", "labels") if place.kind == "npz" else ("arr_0", "arr_1")
            append = stack.enter_context(writing_npz(place.path, labels, drawing.size, names))
        bar = stack.enter_context(drawing.bar(len(labels)))

        # Draw.
        turn = drawing.batch * runtime.world
        for start in range(0, len(labels), turn):
            first = start + runtime.rank * drawing.batch
            ids = range(first, min(first + drawing.batch, len(labels)))
            for images in runtime.gather(drawing(labels, ids, seed) if ids else None) or ():
                if images is not None:
                    append(images)
            bar.update(min(turn, len(labels) - start))
    if runtime.first and place.kind == "grid":
        save_picture(draw_samples.grid(np.concatenate(parts), labels, drawing.names), place.path)


def _write_files(drawing: Drawing, labels: np.ndarray, seed: int, place: Place, args: Namespace) -> None:
    """Draw samples, and write them into a folder: each rank writes files of its own. A collective. Raises UserError."""
    # Find out what is to be written.
    runtime, batch = drawing.runtime, drawing.batch
    unit = batch * math.ceil(args.per_shard / batch) if place.kind == "shards" else batch
    files = Files(place.path, labels, drawing.names, place.stem if place.kind == "shards" else None, unit)
    asked = _describe(drawing, labels, seed, args) | ({"per_shard": unit} if place.kind == "shards" else {})
    if runtime.decide(lambda: files.begin(asked)):
        return
    units = runtime.share([files.missing(rank, runtime.world) for rank in range(runtime.world)])[runtime.rank]
    waiting = sum(len(files.ids(unit)) for unit in units)
    done = len(labels) - sum(map(int, runtime.agree([waiting], torch.distributed.ReduceOp.SUM)))
    if runtime.first and done:
        print(f"{place.path}: goes on after {done:,} of {len(labels):,} samples", flush=True)

    # Draw and write.
    with drawing.bar(waiting) as bar:

        def batches(ids: range) -> Iterator[np.ndarray]:
            for at in range(0, len(ids), batch):
                yield drawing(labels, ids[at : at + batch], seed)
                bar.update(len(ids[at : at + batch]))

        try:
            for unit in units:
                files.write(unit, batches(files.ids(unit)))
        except KeyboardInterrupt:
            print(f"\n{place.path}: interrupted; the same command goes on", flush=True)
            raise
    runtime.barrier()
    runtime.decide(partial(files.finish, asked))


def _describe(drawing: Drawing, labels: np.ndarray, seed: int, args: Namespace) -> dict:
    """Return all that samples in files depend on, as JSON can hold it."""
    sample = drawing.settings
    return {
        "origin": str(drawing.origin.resolve()),
        "identity": drawing.identity,
        "weights": args.weights,
        "n": len(labels),
        "size": list(drawing.size),
        "labels": [int(label) for label in labels[: len(np.unique(labels))]],  # they repeat
        "seed": seed,
        "sampler": sample.describe_sampler(drawing.noise),
        "steps": sample.steps,
        "guidance": sample.guidance,
        "interval": list(sample.interval) if sample.interval else None,
        "guided_channels": sample.guided_channels,
        "autoencoder": drawing.decoder and drawing.decoder.autoencoder.hash,
        "precision": draw_samples.precision_on(sample, drawing.runtime.device),
        "batch": drawing.batch,
    }


def _draw_sweep(
    drawing: Drawing, labels: np.ndarray, seeds: list[int], settings: list[SampleConfig], path: Path
) -> None:
    """Draw all samples with each seed and each guidance scale, and write a table of them. A collective."""
    # Draw. The ranks take the combinations in turns.
    runtime, ids = drawing.runtime, range(len(labels))
    combinations = [(scale, seed) for scale in settings for seed in seeds]
    mine = combinations[runtime.rank :: runtime.world]
    with drawing.bar(len(mine) * len(labels)) as bar:
        drawn = []
        for scale, seed in mine:
            drawn.append(drawing(labels, ids, seed, scale))
            bar.update(len(labels))
    if (parts := runtime.gather(drawn)) is None:
        return

    # Lay them out: guidance scales are rows. Seeds are columns, or the samples are where there is one seed.
    pictures = [parts[k % runtime.world][k // runtime.world] for k in range(len(combinations))]
    table = np.stack(pictures).reshape(len(settings), len(seeds), len(labels), *drawing.size)
    names = [drawing.names[label] for label in labels]
    scales = [f"guidance {scale.guidance:g}" for scale in settings]
    if len(seeds) == 1:
        page = grids.sweep_grid(table[:, 0], scales, names)
    else:
        rows = [f"{name}, {scale}" if len(scales) > 1 else name for name in names for scale in scales]
        by_sample = table.transpose(2, 0, 1, 3, 4, 5).reshape(len(rows), len(seeds), *drawing.size)
        page = grids.sweep_grid(by_sample, rows, [f"seed {seed}" for seed in seeds])
    save_picture(page, path)


if __name__ == "__main__":
    main()
