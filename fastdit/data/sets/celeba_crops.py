"""Cut the face out of CelebA's aligned images, in the two ways that papers on 64 x 64 pixels do.

    ddim       128 x 128 around (x, y) = (89, 121), as DDIM's and PNDM's code have it
    score_sde  the central 140 x 140, as Score SDE's code has it

Each is then scaled to 64 x 64 by Pillow's bilinear filter, which is what DDIM's code calls; Score SDE's calls
TensorFlow's bilinear filter with antialiasing, which is the same up to rounding. Which one SADM used is not known.
"""

import io

import numpy as np
from PIL import Image

from fastdit.data.sets.image_sets import png
from fastdit.errors import UserError

ALIGNED = (178, 218)  # width and height
BOXES = {"ddim": (25, 57, 153, 185), "score_sde": (19, 39, 159, 179)}  # left, top, right, bottom
SIZE = 64


def face(content: bytes, name: str, crop: str) -> bytes:
    """Return the face of an aligned image as a PNG file. Raises UserError if the image is damaged or not aligned."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # Pillow's parsers fail in many ways
        raise UserError(f"{name}: cannot be decoded ({error}); download the archive again") from None
    if image.size != ALIGNED:
        found = " x ".join(map(str, image.size))
        raise UserError(f"{name}: is {found} pixels; give img_align_celeba.zip, whose images are 178 x 218")
    return png(np.asarray(image.crop(BOXES[crop]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
