"""Saving and resuming, to the bit, with the files' side left to `checkpoint_files`."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fastdit.distributed import Runtime
from fastdit.errors import UserError
from fastdit.rundir.checkpoint_files import EMA_FILE, checkpoints, manifest, seal, sync
from fastdit.training.ema import ema_state

STATE = "deepspeed"
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
    keep: int,
) -> Path:
    """Write the checkpoint of `step` (a collective) and remove all but the `keep` newest. Returns its folder.

    `network` is the part of the engine's module that is sampled; `rank_state` differs between ranks, `method_state`
    does not.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    if runtime.first:
        for left in folder.glob(".step-*.partial"):  # by a crash while saving
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    runtime.barrier()
    engine.save_checkpoint(str(partial), tag=STATE, save_latest=False, exclude_frozen_parameters=False)
    torch.save(rank_state, partial / f"rank-{runtime.rank}.pt")
    weights = ema_state(engine, network, "cpu")
    if runtime.first:
        torch.save(method_state, partial / METHOD_FILE)
        save_file(weights, partial / EMA_FILE)
    del weights
    runtime.barrier()
    if runtime.first:
        for script in partial.glob("*.py"):  # DeepSpeed copies its converters beside every checkpoint
            script.unlink()
        seal(partial, {"step": step, "world": runtime.world, **meta})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(folder)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    runtime.barrier()
    return final


def restore(engine, runtime: Runtime, checkpoint: Path, meta: dict) -> tuple[int, dict, dict]:
    """Load `checkpoint` into the engine (a collective). Returns its step, this rank's own state, and the method's.

    Raises UserError when it belongs to another network or number of ranks.
    """
    written = manifest(checkpoint)
    for key, mine in {"world": runtime.world, **meta}.items():
        if written.get(key) != mine:
            raise UserError(
                f"{checkpoint}: was written with {key} {written.get(key)}, this run has {mine}; make them equal"
            )
    zero = vars(engine.optimizer)
    rules = {name: zero[name] for name in ("clip_grad", "compute_grad_norm") if name in zero}
    if "compute_grad_norm" in zero:  # without, DeepSpeed refuses a checkpoint of a run in which it clipped
        zero["compute_grad_norm"] = True
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=STATE)
    zero.update(rules)  # it has taken the checkpoint's limit for clipping
    if loaded is None:
        raise UserError(f"{checkpoint}: DeepSpeed could not read it; resume from another folder")
    # This program wrote it, and the hashes were just checked.
    rank_state = torch.load(checkpoint / f"rank-{runtime.rank}.pt", weights_only=True)
    method_state = torch.load(checkpoint / METHOD_FILE, map_location="cpu", weights_only=True)
    return written["step"], rank_state, method_state
