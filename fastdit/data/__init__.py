"""Data: sources of labelled images or latents -> DALI pipelines -> an exactly resumable stream of batches."""

from fastdit.data.loader import Loader, make_loader
from fastdit.data.shards import write_shards
from fastdit.data.sources import Source, open_source

__all__ = ["Loader", "Source", "make_loader", "open_source", "write_shards"]
