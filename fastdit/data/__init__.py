"""Read data: sources of labeled images or latents -> DALI pipelines -> an exactly resumable stream of batches."""

from fastdit.data.loader import Loader, make_loader
from fastdit.data.sequential_reader import read_in_order
from fastdit.data.shards import UNFINISHED, write_shard, write_shards
from fastdit.data.sources import Source, open_source

__all__ = [
    "UNFINISHED",
    "Loader",
    "Source",
    "make_loader",
    "open_source",
    "read_in_order",
    "write_shard",
    "write_shards",
]
