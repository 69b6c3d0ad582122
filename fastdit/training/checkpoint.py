"""Save and resume a training run to the bit. `rundir/checkpoint_files.py` makes the files survive a crash."""

from pathlib import Path

import torch
from torch import nn

from fastdit.distributed import Runtime
from fastdit.errors import UserError
from fastdit.files import plain_path, save_tensors
from fastdit.rundir.checkpoint_files import EMA_FILE, manifest, prune, publish, seal, start_partial
from fastdit.training.deepspeed_internals import precision_written, preserve_clipping
from fastdit.training.ema import ema_state

STATE = "deepspeed"  # folder of the files that DeepSpeed writes
METHOD_FILE = "method.pt"


def save(
    engine,
    network: nn.Module,
    runtime: Runtime,
    folder: Path,
    step: int,
    *,
    rank_state: dict,
    method_state: dict,
    meta: dict,
    keep: int | None,
) -> Path:
    """Write the checkpoint of `step` into `folder`, keep `keep` of those up to it, and return the new one's folder.

    It is a collective. With `keep` None, no other checkpoint is removed. `network` is the part of the engine's module
    that is sampled. `rank_state` differs between ranks, `method_state` does not. `meta` is what a run that resumes must
    agree with.
    """
    # Make an empty folder under a temporary name.
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    if runtime.first:
        start_partial(partial)
    runtime.barrier()

    # Write the state of the engine, of this rank and of the method, and the EMA weights.
    engine.save_checkpoint(str(partial), tag=STATE, save_latest=False, exclude_frozen_parameters=False)
    torch.save(rank_state, partial / f"rank-{runtime.rank}.pt")
    weights = ema_state(engine, network, "cpu")
    if runtime.first:
        torch.save(method_state, partial / METHOD_FILE)
        save_tensors(weights, partial / EMA_FILE)
    del weights
    runtime.barrier()

    # Seal the checkpoint, give it its name, and remove old ones.
    if runtime.first:
        for script in partial.glob("*.py"):  # DeepSpeed copies its converters beside every checkpoint
            script.unlink()
        seal(partial, {"step": step, "world": runtime.world, **meta})
        publish(partial, final)
        if keep is not None:
            prune(final, keep)
    runtime.barrier()
    return final


def restore(engine, runtime: Runtime, checkpoint: Path, meta: dict) -> tuple[int, dict, dict]:
    """Load `checkpoint` into the engine, a collective. Return its step, this rank's state and the method's state.

    Raises UserError when the checkpoint differs from this run in the number of ranks or a field of `meta`, or when
    DeepSpeed cannot read it.
    """
    # Check that the checkpoint fits this run.
    written = manifest(checkpoint)
    for field, expected in {"world": runtime.world, **meta}.items():
        if written.get(field) != expected:
            raise UserError(
                f"{checkpoint}: was written with {field} {written.get(field)}, this run has {expected}; make them equal"
            )

    precision = "bf16" if engine.bfloat16_enabled() else "fp32"
    if (other := precision_written(checkpoint / STATE) or precision) != precision:
        raise UserError(
            f"{checkpoint}: was written in {other}, this run trains in {precision}; add --precision {other}"
        )

    # Load the engine's state, then the states of this rank and of the method.
    with preserve_clipping(engine.optimizer), plain_path(checkpoint) as path:  # DeepSpeed globs it
        loaded, _ = engine.load_checkpoint(str(path), tag=STATE)
    if loaded is None:
        raise UserError(f"{checkpoint}: DeepSpeed could not read it; resume from another folder")
    rank_state = torch.load(checkpoint / f"rank-{runtime.rank}.pt", weights_only=True)
    method_state = torch.load(checkpoint / METHOD_FILE, map_location="cpu", weights_only=True)
    return written["step"], rank_state, method_state
