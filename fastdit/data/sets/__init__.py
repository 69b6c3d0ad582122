"""Known sets of images, from where they can be had to shards: `fastdit-data fetch` and `convert-imagenet`."""
