"""Resume from checkpoints of fastdit 0.1, which DeepSpeed wrote: with the same number of ranks, stage and precision.

Python's pickle reads them, and can run code that somebody put there. So `--trust` is asked for.
"""

from pathlib import Path

import torch

from fastdit.distributed import Runtime
from fastdit.errors import UserError
from fastdit.files import plain_path
from fastdit.training.deepspeed_internals import precision_written, preserve_clipping

STATE = "deepspeed"  # folder of the files that DeepSpeed writes
METHOD_FILE = "method.pt"


def restore(engine, runtime: Runtime, checkpoint: Path, written: dict, trust: bool) -> tuple[int, dict, dict]:
    """Load `checkpoint`, whose manifest is `written`, as `checkpoint.restore` does.

    The random numbers of the steps that follow are not those that the older version would have drawn.

    Raises UserError without `trust`, for another number of ranks or precision, or when DeepSpeed cannot read it.
    """
    # Check that the checkpoint may be read, and that it fits this run.
    if not trust:
        raise UserError(
            f"{checkpoint}: is of an older version, whose files can run code when they are read; if you know where "
            "they come from, add --trust"
        )
    if written.get("world") != runtime.world:
        raise UserError(
            f"{checkpoint}: is of an older version, and was written with {written.get('world')} ranks; resume it with "
            f"as many, not {runtime.world}"
        )
    precision = "bf16" if engine.bfloat16_enabled() else "fp32"
    if (other := precision_written(checkpoint / STATE) or precision) != precision:
        raise UserError(
            f"{checkpoint}: is of an older version, and was written in {other}; resume it with --precision {other}"
        )

    # Load the engine's state, then the states of this rank and of the method.
    try:
        with preserve_clipping(engine.optimizer), plain_path(checkpoint) as place:
            loaded, _ = engine.load_checkpoint(str(place), tag=STATE)
    except (AssertionError, AttributeError, KeyError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{checkpoint}: is of an older version, and DeepSpeed could not read it ({reason}); resume it with the "
            "ZeRO stage that it was written with"
        ) from None
    if loaded is None:
        raise UserError(f"{checkpoint}: DeepSpeed could not read it; resume from another checkpoint")
    rank_state = torch.load(checkpoint / f"rank-{runtime.rank}.pt", weights_only=True)
    meter = rank_state["meter"]
    meter |= {"sums": {k: float(v) for k, v in meter["sums"].items()}, "skipped": float(meter["skipped"])}
    method_state = torch.load(checkpoint / METHOD_FILE, map_location="cpu", weights_only=True)
    return written["step"], rank_state, method_state
