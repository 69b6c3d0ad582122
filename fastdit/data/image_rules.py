"""Define rules for image files that every reader follows: the largest and longest size, and the number of channels."""

from typing import Literal

from fastdit.data.sources import Source
from fastdit.errors import UserError
from fastdit.files import stand_in

Crop = Literal["center", "adm"]  # ways to scale an image to a size: see pillow_images.fit
# Two damaged bytes of a JPEG can claim 4 billion pixels, which take minutes and 12 GB to decode.
MOST_PIXELS = 1 << 28
# An image of 1 x 12,000 pixels, scaled to cover 256 x 256, would take 2.4 GB.
MOST_ELONGATED = 64
_KINDS = {1: "gray", 2: "gray and alpha", 3: "color", 4: "color and alpha, or CMYK"}
# What to do about an image that cannot be decoded.
SKIP = "replace or remove it, or give --data.on_corrupt skip (--on_corrupt skip in encode)"


def decoding_fault(source: Source, i: int, remedy: str) -> str:
    """Return why image `i` cannot be decoded, and what to do: `remedy` for a corrupt image."""
    fault = stand_in(source.samples.read(i)[:512].tobytes())
    return fault or f"is corrupt and cannot be decoded; {remedy}"


def wrong_channels(source: Source, i: int, found: int, expected: int) -> UserError:
    """Return the error for image `i`, which has `found` channels where the model takes `expected`."""
    return UserError(
        f"{source.where(i)}: {found} channels ({_KINDS[found]}) where the model takes {expected}; "
        f"convert it to plain {_KINDS[expected]}, or give --data.convert true"
    )
