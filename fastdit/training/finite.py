"""Find weights, EMAs and moments that are not finite before they reach a checkpoint."""

from collections.abc import Iterator

from torch import Tensor, nn

from fastdit.distributed import Runtime
from fastdit.kernels import AdamWEMA
from fastdit.kernels.adamw_ema import squared_norm
from fastdit.training.deepspeed_internals import local_part

MOMENTS = {"exp_avg": "the first moments", "exp_avg_sq": "the second moments"}


def find_nonfinite(module: nn.Module, optimizer: AdamWEMA, method_state: dict, runtime: Runtime) -> str | None:
    """Return which parts of a run's state are not finite on any rank, such as "the weights, the EMA 'ema'", or None.

    It is a collective. Each rank reads its own part of the state once and sends the names. For a rank with P of the
    weights and one EMA, that is 16 P bytes of optimizer state, besides the network's own weights and buffers. A save
    then writes the same bytes to disk.
    """
    # Collect this rank's tensors by what they are.
    parts: dict[str, list[Tensor]] = {"the weights": [local_part(p) for p in module.parameters()]}
    parts["the buffers"] = list(module.buffers())
    for weights, state in optimizer.state.items():  # ZeRO's flat fp32 partitions
        parts["the weights"].append(weights.detach())
        for name, value in state.items():
            if name != "step":
                parts.setdefault(MOMENTS.get(name, f"the EMA {name!r}"), []).append(value)
    parts["the method's state"] = list(_tensors_in(method_state))

    # Name those that are not finite, and agree on them.
    wrong = [name for name, tensors in parts.items() if not _all_finite(tensors)]
    by_rank = runtime.gather(wrong)
    names = runtime.share(by_rank and list(dict.fromkeys(name for found in by_rank for name in found)))
    return ", ".join(names) or None


def _all_finite(tensors: list[Tensor]) -> bool:
    """Return whether every element is finite, by one fused sum of squares for each dtype and device."""
    kinds: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    # Without the compiled kernel the sum may overflow, so its tensors are then looked at one by one.
    return all(
        bool(squared_norm(same).isfinite()) or all(bool(tensor.isfinite().all()) for tensor in same)
        for same in kinds.values()
    )


def _tensors_in(state: object) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors_in(value)
