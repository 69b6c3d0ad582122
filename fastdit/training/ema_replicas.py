"""Keep whole replicas of an EMA that ZeRO shards as optimizer state, such as SD-DiT's teacher.

The EMA is fp32 and sharded. A replica is whole on every rank and has the dtype that it computes in. It costs one
all-gather after each update, as ZeRO gathers the weights themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdit.training.deepspeed_internals import gather_states


class EMAReplicas:
    """Replicate the EMA `name` of `sources`, parameters of `engine`, in `tensors`, which have the same order.

    A replica may hold the leading rows of its parameter only. All replicas have one dtype and one device. Raises
    ValueError when the numbers of tensors and sources differ.
    """

    def __init__(self, engine, name: str, tensors: Sequence[Tensor], sources: Sequence[nn.Parameter]) -> None:
        self.name, self.optimizer = name, engine.optimizer
        self.tensors = dict(zip(sources, tensors, strict=True))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the EMA to the replicas, a collective. Before the first update there is no EMA, and nothing changes."""
        like = next(iter(self.tensors.values()))
        for pairs in gather_states(self.optimizer, self.name, list(self.tensors), like):
            replicated = [(self.tensors[param], value) for param, value in pairs if param in self.tensors]
            if replicated:
                values = [value.flatten()[: replica.numel()].view_as(replica) for replica, value in replicated]
                torch._foreach_copy_([replica for replica, _ in replicated], values)
