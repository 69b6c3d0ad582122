"""Decode with Pillow. It accepts what DALI does, GIF and AVIF besides, and gives the same geometry (see pipeline.py).

    file -> decode -> turn by EXIF -> gray or RGB -> scale to cover -> crop the center -> mirror -> uint8 (C, H, W)

Pixels equal DALI's if a lossless image is not scaled. Otherwise they differ by a few levels: each decoder rounds JPEG's
transform in its own way, and at the border of a scaled image DALI repeats the edge, while Pillow renormalizes.
"""

import io
import math
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastdit.data.image_rules import MOST_ELONGATED, MOST_PIXELS, Crop

# An open list would start Ghostscript for a PostScript file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
_GRAY_16_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# A palette counts as RGB, with or without a transparent color.
_CHANNELS = {"1": 1, "L": 1, "F": 1, "LA": 2, "La": 2, "P": 3, **dict.fromkeys(_GRAY_16_BITS, 1)}
_CHANNELS |= {"RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3, "PA": 4, "RGBA": 4, "RGBa": 4, "RGBX": 4, "CMYK": 4}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(file: np.ndarray) -> tuple[Image.Image, int]:
    """Return the upright image of an encoded file, uint8 (size,), and the number of channels that the file has.

    Raises exceptions of many kinds for a file that is not a whole image.
    """
    encoded = file.tobytes()
    image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError("too many pixels")
    if image.format == "PNG":
        _check_png(encoded)
    image.load()
    channels = _CHANNELS[image.mode]
    if image.mode in _GRAY_16_BITS:  # Pillow's own conversion clips at 255
        levels = np.asarray(image).astype(np.int64)
        image_8_bits = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
        return _upright(image_8_bits, image), channels
    return _upright(image, image), channels


class Header(NamedTuple):
    """Hold what the first bytes of an image file tell."""

    height: int
    width: int
    channels: int
    format: str  # Pillow's name of it, such as JPEG


def read_header(file: np.ndarray) -> Header:
    """Return the header of an encoded file, uint8 (size,), before a turn by EXIF.

    Raises exceptions of many kinds for a file that is no image.
    """
    image = Image.open(io.BytesIO(file.tobytes()), formats=_FORMATS)
    return Header(image.height, image.width, _CHANNELS[image.mode], image.format)


def to_pnm(file: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Return the upright image of an encoded file as a PNM file, uint8 (size,): 8 bits, gray or RGB, not compressed.

    With it come the height, width and channels of the encoded file. Any decoder of PNM gives Pillow's pixels. Of a very
    long image it holds the `middle`. Raises exceptions of many kinds for a file that is not a whole image.
    """
    image, channels = decode(file)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    pixels = middle(image).convert("L" if channels < 3 else "RGB")
    header = f"P{5 if channels < 3 else 6} {pixels.width} {pixels.height} 255\n"
    return np.frombuffer(header.encode() + pixels.tobytes(), np.uint8), (image.height, image.width, channels)


def _check_png(encoded: bytes) -> None:
    """Raise ValueError if image data are damaged or the end is missing. Pillow accepts such a file, DALI refuses it."""
    start, kind = 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(encoded[start : start + 4], "big"), encoded[start + 4 : start + 8]
        end = start + 12 + length
        if end > len(encoded):
            raise ValueError("truncated")
        checksum = int.from_bytes(encoded[end - 4 : end], "big")
        if kind == b"IDAT" and zlib.crc32(memoryview(encoded)[start + 4 : end - 4]) != checksum:
            raise ValueError("damaged image data")
        start = end


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Return `image` turned as the EXIF tags of the file, `opened`, ask for."""
    for name in ("xmp", "XML:com.adobe.xmp"):  # Pillow would take the orientation from there too; DALI does not
        opened.info.pop(name, None)
    try:
        turn = _TURNS.get(opened.getexif().get(_ORIENTATION))
    except Exception:  # damaged tags make a parser of tags fail in many ways; the pixels are whole
        turn = None
    return image if turn is None else image.transpose(turn)


def middle(image: Image.Image) -> Image.Image:
    """Return the middle of an image that is over MOST_ELONGATED times as long as wide, and any other one unchanged.

    Whole, it could take gigabytes once it is scaled to cover a square, and all but the middle would be cut off.
    """
    most = MOST_ELONGATED * min(image.size)
    width, height = min(image.width, most), min(image.height, most)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fit(image: Image.Image, size: tuple[int, int], channels: int, crop: Crop = "center") -> np.ndarray:
    """Return the center of `image`, scaled until it just covers `size`, as uint8 (channels, *size), maybe a view.

    crop: "center" scales in one step, as DALI does. "adm" scales as guided-diffusion's `center_crop_arr` does
        (github.com/openai/guided-diffusion, guided_diffusion/image_datasets.py), to the same pixels: it halves the
        image by means of 2 x 2 pixels while both sides are at least twice those of `size`, and only then scales by the
        bicubic filter. The original takes square sizes only.
    """
    mode, image = "L" if channels == 1 else "RGB", middle(image)
    if image.mode != mode:
        image = image.convert(mode)
    image = (_cover_as_adm if crop == "adm" else _cover)(image, size)
    height, width = size
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the image scaled until it just covers `size`, by the bicubic filter with antialiasing."""
    # DALI computes extents in float32 and rounds halves up; other arithmetic gives another extent for some images.
    height, width = size
    scale = np.float32(max(height / image.height, width / image.width))
    covering = tuple(math.floor(np.float32(extent) * scale + np.float32(0.5)) for extent in image.size)
    return image.resize(covering, Image.Resampling.BICUBIC)


def _cover_as_adm(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the image scaled until it just covers `size`, in the steps of `center_crop_arr`."""
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
