"""Run one rank of tests/data/test_cache.py: `cache_ranks.py RANK WORLD RENDEZVOUS SHARDS OUT`.

The ranks share the cached latents. Each reads batches, once straight and once resumed by other loaders, and saves them.
"""

import sys
from contextlib import closing

import torch
import torch.distributed as dist

from fastdit.data import make_loader, open_source

OPTIONS = {"batch": 3, "size": (5, 7), "channels": 3, "seed": 4}
STEPS, STOP = 9, 5


def main(rank: int, world: int, rendezvous: str, shards: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    source = open_source(shards)

    def loader(place: str):
        return make_loader(source, rank=rank, world=world, cache=place, group=dist.group.WORLD, **OPTIONS)

    with closing(loader("device")) as straight:
        batches = [next(straight) for _ in range(STEPS)]
        size = straight.held.bytes
    with closing(loader("cpu")) as first, closing(loader("cpu")) as second:
        for _ in range(STOP):
            next(first)
        next(second)
        second.load_state_dict(first.state_dict())
        resumed = [next(second) for _ in range(STEPS - STOP)]
    torch.save({"batches": batches, "resumed": resumed, "bytes": size}, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
