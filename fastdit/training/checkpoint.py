"""Save a training run, and resume it: to the bit, or on another number of ranks, ZeRO stage, precision or micro-batch.

Each rank writes the fp32 weights, moments and EMAs that it holds (rundir/shards.py), and none gathers any. To resume,
each rank reads what it holds now. `rundir/checkpoint_files.py` makes the files survive a crash.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastdit.distributed import Runtime
from fastdit.errors import UserError
from fastdit.files import sha256_of, writing
from fastdit.kernels import AdamWEMA
from fastdit.rundir.checkpoint_files import (
    BUFFERS,
    FORMAT,
    METHOD_FILE,
    PROGRESS,
    SHARDS,
    STEP,
    WEIGHTS,
    first_difference,
    manifest,
    prune,
    publish,
    seal,
    start_partial,
    sync,
)
from fastdit.rundir.shards import Piece, PieceReader, write_pieces
from fastdit.rundir.state_files import count_bytes, load_state, save_state
from fastdit.training import older_checkpoint
from fastdit.training.deepspeed_internals import Part, full_shape, local_parts, rewrite_weights, set_counters

MOMENTS = ("exp_avg", "exp_avg_sq")


class Trained(NamedTuple):
    """Hold the parts of a run whose state is a checkpoint, besides the method.

    Args:
        engine: DeepSpeed's engine.
        optimizer: the optimizer that the engine was given.
        network: the part of the engine's module that is sampled.
        runtime: this rank's place.
    """

    engine: object
    optimizer: AdamWEMA
    network: nn.Module
    runtime: Runtime


def save(
    trained: Trained,
    folder: Path,
    step: int,
    *,
    rank_state: dict,
    method_state: dict,
    meta: dict,
    keep: int | None,
) -> Path:
    """Write the checkpoint of `step` into `folder`, keep `keep` of those up to it, and return the new one's folder.

    It is a collective. With `keep` None, no other checkpoint is removed. `rank_state` is JSON and differs between
    ranks, `method_state` does not. `meta` is what a run that resumes must agree with.
    """
    # Make an empty folder under a temporary name.
    engine, runtime = trained.engine, trained.runtime
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"

    def begin() -> None:
        with writing(partial):
            start_partial(partial)
            (partial / SHARDS).mkdir()

    runtime.decide(begin)

    # Write this rank's pieces. If one rank fails, all of them raise its error.
    written = runtime.gather(_write_pieces(trained, partial))
    runtime.decide(lambda: _raise_first(written))

    # Write what is one for all ranks, seal the checkpoint, give it its name, and remove old ones.
    ranks = runtime.gather(rank_state)

    def finish() -> None:
        with writing(partial):
            save_state(method_state, partial / METHOD_FILE)
            counters = {"engine_steps": engine.global_steps, "engine_skipped": engine.skipped_steps}
            progress = counters | {"accumulation": engine.gradient_accumulation_steps(), "ranks": ranks}
            (partial / PROGRESS).write_text(json.dumps(progress))
            told = {"format": FORMAT, "step": step, "world": runtime.world, "sampled": _sampled_prefix(trained), **meta}
            seal(partial, told, {name: value for hashes in written for name, value in hashes.items()})
            publish(partial, final)
        if keep is not None:
            prune(final, keep)

    runtime.decide(finish)
    return final


def restore(
    trained: Trained, checkpoint: Path, meta: dict, *, accumulation: int, trust: bool
) -> tuple[int, dict, dict]:
    """Load `checkpoint` into the engine, a collective. Return its step, this rank's state and the method's state.

    accumulation: micro-batches that a rank accumulates in a step.
    trust: read a checkpoint of an older version, whose files can run code when they are read.

    Raises UserError when the checkpoint differs from this run in a field of `meta`, is of an older version and not
    trusted, or cannot be read.
    """
    # Check that the checkpoint fits this run.
    written, engine, runtime = manifest(checkpoint), trained.engine, trained.runtime
    if difference := first_difference(checkpoint, meta):
        field, before, now = difference
        raise UserError(f"{checkpoint}: was written with {field} {before}, this run has {now}; make them equal")
    if "format" not in written:
        return older_checkpoint.restore(engine, runtime, checkpoint, written, trust)

    # Load weights, moments and EMAs, and the buffers.
    reader = PieceReader(checkpoint / SHARDS)
    names = {param: name for name, param in engine.module.named_parameters()}
    _check_shapes(reader, names, checkpoint)
    _load_parts(trained, reader, names)
    rewrite_weights(engine, lambda param: reader.read_whole(WEIGHTS, names[param]))
    for name, buffer in _buffers(engine.module).items():
        buffer.copy_(reader.read_whole(BUFFERS, name))

    # Load the counters, and the states of this rank and of the method.
    progress = _read_progress(checkpoint / PROGRESS)
    set_counters(engine, progress["engine_steps"], progress["engine_skipped"])
    rank_state = _state_of_rank(progress["ranks"], runtime, accumulation / progress["accumulation"])
    return written["step"], rank_state, load_state(checkpoint / METHOD_FILE)


def bytes_of_rank(trained: Trained, method_state: dict) -> int:
    """Return the bytes of the tensors that this rank writes into a checkpoint, without JSON and headers of files."""
    pieces = sum(piece.values.nbytes for kind in _pieces(trained).values() for piece in kind)
    return pieces + (count_bytes(method_state) if trained.runtime.first else 0)


def _write_pieces(trained: Trained, partial: Path) -> dict[str, str] | UserError:
    """Write and flush this rank's files into `partial`. Return their SHA-256 by name, or what prevented it."""
    runtime = trained.runtime
    try:
        with writing(partial):
            files = [
                write_pieces(partial / SHARDS, kind, runtime.rank, runtime.world, pieces)
                for kind, pieces in _pieces(trained).items()
            ]
            for path in files:
                sync(path)
            return {str(path.relative_to(partial)): sha256_of(path) for path in files}
    except UserError as error:
        return error


def _raise_first(results: list) -> None:
    """Raise the first UserError among the results of the ranks."""
    for result in results:
        if isinstance(result, UserError):
            raise result


def _pieces(trained: Trained) -> dict[str, list[Piece]]:
    """Return the pieces that this rank writes, by kind. Before the first update there are weights and buffers only."""
    # Of what all ranks hold, each rank writes its share.
    engine, runtime = trained.engine, trained.runtime
    names = {param: name for name, param in engine.module.named_parameters()}
    pieces: dict[str, list[Piece]] = {WEIGHTS: []}
    for k, part in enumerate(local_parts(engine, lambda p: trained.optimizer.state.get(p, {}))):
        if k % part.copies != runtime.rank % part.copies:
            continue
        shape = full_shape(part.param)
        for kind, values in {WEIGHTS: part.weights, **part.state}.items():
            whole, start = ((), 0) if kind == STEP else (shape, part.start)
            pieces.setdefault(kind, []).append(Piece(names[part.param], whole, start, values.view(-1)))
    if runtime.first:
        buffers = _buffers(engine.module).items()
        pieces[BUFFERS] = [Piece(name, tuple(value.shape), 0, value.reshape(-1)) for name, value in buffers]
    return pieces


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's buffers that belong to its state, by name."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _sampled_prefix(trained: Trained) -> str:
    """Return what stands before the names of the sampled network's weights, such as "network."."""
    for name, module in trained.engine.module.named_modules():
        if module is trained.network:
            return f"{name}." if name else ""
    raise ValueError("the sampled network is no part of the trained module")


@torch.no_grad()
def _load_parts(trained: Trained, reader: PieceReader, names: dict[nn.Parameter, str]) -> None:
    """Copy this rank's parts of weights, moments and EMAs from the files."""
    emas = [kind for kind in reader.kinds if kind not in (WEIGHTS, BUFFERS, STEP, *MOMENTS)]
    updated = STEP in reader.kinds

    def state_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return trained.optimizer.state_of(tensor, emas) if updated else {}

    def load(part: Part, kind: str, values: torch.Tensor) -> None:
        values.copy_(reader.read(kind, names[part.param], part.start, len(values)))

    for part in local_parts(trained.engine, state_of):
        load(part, WEIGHTS, part.weights)
        for kind, values in part.state.items():
            if kind == STEP:  # one count for all parameters in a partition
                values.copy_(torch.maximum(values.cpu(), reader.read(STEP, names[part.param])[0]))
            else:
                load(part, kind, values)


def _check_shapes(reader: PieceReader, names: dict[nn.Parameter, str], checkpoint: Path) -> None:
    """Raise UserError if the checkpoint holds other weights than the module."""
    found, expected = reader.shapes(WEIGHTS), {name: full_shape(param) for param, name in names.items()}
    for name in found.keys() | expected.keys():
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{checkpoint}: {name} has shape {found.get(name)}, this run's has {expected.get(name)}; resume with "
                "the settings that it was trained with"
            )


def _read_progress(path: Path) -> dict:
    """Return the counters and the ranks' states. Raises UserError if the file does not hold them."""
    try:
        progress = json.loads(path.read_text())
        numbers = [progress[name] for name in ("engine_steps", "engine_skipped", "accumulation")]
        if not (all(isinstance(number, int) for number in numbers) and progress["accumulation"] > 0):
            raise ValueError(f"numbers {numbers}")
        if not all(isinstance(state, dict) for state in progress["ranks"]) or not progress["ranks"]:
            raise ValueError("no states of ranks")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use another checkpoint") from None
    return progress


def _state_of_rank(states: list[dict], runtime: Runtime, more: float) -> dict:
    """Return this rank's state: what its predecessor wrote or, for another number of ranks, what all wrote together.

    more: how many of this run's micro-batches show as many samples of a rank as one of the writing run's.
    """
    state = states[runtime.rank % len(states)]
    if len(states) != runtime.world:
        corrupt = sorted({i for other in states for i in other["loader"]["corrupt"]})
        meters = [other["meter"]["sums"] for other in states]
        sums = {name: sum(meter[name] for meter in meters) / len(meters) for name in state["meter"]["sums"]}
        state = state | {
            "loader": state["loader"] | {"corrupt": corrupt},
            "meter": state["meter"] | {"sums": sums},
        }
    if more == 1:
        return state
    # The running means of a step count as often as the steps that follow.
    meter = state["meter"]
    scaled = {kind: {name: value * more for name, value in meter[kind].items()} for kind in ("sums", "counts")}
    return state | {"meter": meter | scaled}
