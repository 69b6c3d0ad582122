"""Obtain known sets of images and write them as shards, for `fastdit-data fetch` and `convert-imagenet`."""
