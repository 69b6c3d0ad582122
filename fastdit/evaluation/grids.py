"""Lay pictures out on a page: a grid with the classes' names, or a table of a sweep over two settings."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastdit.errors import UserError

GAP = 2  # pixels between pictures
LARGEST_PAGE = 1 << 28  # pixels
ELONGATED = 2.0  # a page whose pictures take more times as much of one side as of the other is laid out anew
FEW = 16  # pictures, which are never laid out anew
_LINE = 18  # pixels, of a line of text above a column
_SHORTEST = 64  # pixels; smaller pictures are enlarged to about as much

Row = tuple[str, list[int]]  # its name, and the numbers of its pictures


def check_page(n: int, size: tuple[int, int], flag: str) -> None:
    """Raise UserError, which names `flag`, if n pictures of size (height, width) are too many for a page."""
    if n * (size[0] + GAP) * (size[1] + GAP) > LARGEST_PAGE:
        raise UserError(
            f"{flag}: {n:,} pictures of {size[0]}x{size[1]} are too many for one picture; lower --n, or give a .npz, a "
            "folder or .tar shards"
        )


def grid(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Return a page with one row for each class label, behind the name of the class.

    A page of many pictures that would be more than twice as long as wide is laid out anew, about square: rows are
    wrapped, or stacks of rows stand side by side.

    images: uint8 (n, H, W, 1 or 3). labels: (n,). names: the class names, by label.
    """
    # Measure the page for rows of each width, in each number of stacks side by side.
    rows = [(names[label], np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]
    cell, left = _cell(images), _room([name for name, _ in rows])
    longest = max(len(row) for _, row in rows)

    def extents(columns: int, stacks: int) -> tuple[int, int]:
        return stacks * (left + columns * cell[0]), GAP + -(-counts[columns] // stacks) * cell[1]

    lengths = np.array([len(row) for _, row in rows])
    counts = {columns: int((-(-lengths // columns)).sum()) for columns in range(1, longest + 1)}  # of rows
    columns, stacks = longest, 1
    if len(images) > FEW and _elongation((longest * cell[0], len(rows) * cell[1])) > ELONGATED:
        choices = [(narrower, 1) for narrower in counts] + [(longest, many) for many in range(1, len(rows) + 1)]
        columns, stacks = min(choices, key=lambda choice: (_elongation(extents(*choice)), -choice[0]))

    # Wrap the rows; only the first part of a class has its name in front.
    parts: list[Row] = [
        (name if at == 0 else "", row[at : at + columns]) for name, row in rows for at in range(0, len(row), columns)
    ]
    height = -(-len(parts) // stacks)
    page = Image.new("RGB", (stacks * (left + columns * cell[0]), GAP + height * cell[1]), "white")
    for stack in range(stacks):
        place = (stack * (left + columns * cell[0]), 0)
        _paste_rows(page, place, left, images, parts[stack * height : (stack + 1) * height])
    return page


def sweep_grid(images: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Return a page with the rows and columns of a table, each with its name.

    images: uint8 (rows, columns, H, W, 1 or 3).
    """
    flat = images.reshape(-1, *images.shape[2:])
    cell, left = _cell(flat), _room(rows)
    cell = (max(cell[0], _room(columns)), cell[1])  # no column is narrower than its name
    page = Image.new("RGB", (left + len(columns) * cell[0], _LINE + GAP + len(rows) * cell[1]), "white")
    pen, font = ImageDraw.Draw(page), _font()
    for c, name in enumerate(columns):
        pen.text((left + c * cell[0] + cell[0] // 2, _LINE // 2 + 1), name, fill="black", font=font, anchor="mm")
    numbers = np.arange(len(flat)).reshape(len(rows), len(columns)).tolist()
    _paste_rows(page, (0, _LINE), left, flat, list(zip(rows, numbers)), cell[0])
    return page


def _paste_rows(
    page: Image.Image, place: tuple[int, int], left: int, images: np.ndarray, rows: list[Row], step: int | None = None
) -> None:
    """Write rows of pictures onto a page, below `place` (x, y), each behind its name.

    left: pixels for the names. step: pixels from one picture to the next; by default they lie side by side.
    """
    cell = _cell(images)
    height, width = cell[1] - GAP, cell[0] - GAP
    pen, font = ImageDraw.Draw(page), _font()
    for r, (name, row) in enumerate(rows):
        top = place[1] + GAP + r * cell[1]
        pen.text((place[0] + left - 6, top + cell[1] // 2), name, fill="black", font=font, anchor="rm")
        for c, i in enumerate(row):
            pixels = images[i]
            tile = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            page.paste(tile, (place[0] + left + c * (step or cell[0]), top))


def _cell(images: np.ndarray) -> tuple[int, int]:
    """Return the width and height that a picture of images (n, H, W, C) takes on a page, with the gap."""
    height, width = images.shape[1:3]
    scale = max(1, _SHORTEST // max(height, width))
    return width * scale + GAP, height * scale + GAP


def _room(names: Sequence[str]) -> int:
    """Return the pixels that the longest of these names takes."""
    return 8 + 8 * max(map(len, names))


def _elongation(extents: tuple[int, int]) -> float:
    """Return the ratio of the longer side to the shorter one."""
    return max(extents) / min(extents)


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return the font of names."""
    return ImageFont.load_default(size=13)
