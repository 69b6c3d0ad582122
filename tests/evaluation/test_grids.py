"""Test the layout of pages: about square, every picture once, names in front and above."""

import numpy as np
import pytest

from fastdit.errors import UserError
from fastdit.evaluation.grids import check_page, grid, sweep_grid


def shades(n: int, size: tuple[int, int]) -> np.ndarray:
    """Return n plain pictures of different colors, uint8 (n, *size, 3)."""
    colors = np.stack([np.arange(n) % 250 + 1, np.arange(n) // 250 + 1, np.full(n, 7)], axis=1).astype(np.uint8)
    return np.broadcast_to(colors[:, None, None], (n, *size, 3))


def places(page, images) -> list[tuple[int, int]]:
    """Return the top left corner (y, x) of each picture on the page; each must be there once, whole."""
    pixels, found = np.asarray(page), []
    for image in images:
        ys, xs = np.where((pixels == image[0, 0]).all(-1))
        height, width = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
        assert len(ys) == height * width, "one rectangle"
        assert (height, width) == image.shape[:2]
        found.append((int(ys.min()), int(xs.min())))
    return found


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.zeros(64, np.int64), ["faces"]),  # one class: no row of 64
        (np.arange(64), [f"class {i}" for i in range(64)]),  # one picture of each: no column of 64
        (np.arange(64) % 2, ["a", "b"]),
        (np.repeat(np.arange(5), [60, 1, 1, 1, 1]), list("abcde")),
    ],
)
def test_a_page_is_about_square(labels, names):
    images = shades(64, (64, 64))
    page = grid(images, labels, names)
    assert max(page.size) <= 1.6 * min(page.size), page.size
    where = places(page, images)
    assert len(set(where)) == 64
    for label in np.unique(labels):  # row by row in the order of the samples, unless stacks stand side by side
        of_class = [where[i] for i in np.flatnonzero(labels == label)]
        assert of_class == sorted(of_class)


def test_64_pictures_of_256_pixels_of_one_class():
    page = grid(shades(64, (256, 256)), np.zeros(64, np.int64), ["x"])
    assert page.size == (16 + 8 * 258, 2 + 8 * 258)


def test_usual_pages_keep_a_row_for_each_class():
    images, labels = shades(80, (64, 64)), np.arange(80) % 10
    where = places(grid(images, labels, list("abcdefghij")), images)
    assert len({y for y, _ in where}) == 10
    assert all(where[i][0] == where[i % 10][0] for i in range(80))


def test_a_sweep_is_a_table():
    images = shades(6, (64, 64)).reshape(2, 3, 64, 64, 3)
    page = sweep_grid(images, ["guidance 1", "guidance 4"], ["seed 0", "a longer name of a column", "seed 2"])
    where = places(page, images.reshape(6, 64, 64, 3))
    assert len({y for y, _ in where}) == 2
    assert len({x for _, x in where}) == 3
    assert where == sorted(where)
    above = np.asarray(page)[: where[0][0]]
    assert (above < 128).any(), "names of columns"
    assert (np.asarray(page)[where[0][0] :, : where[0][1]] < 128).any(), "names of rows"
    right = max(x for _, x in where) + 64
    assert right <= page.width


def test_a_page_that_is_too_large():
    check_page(64, (256, 256), "--out x.png")
    with pytest.raises(UserError, match=r"^--out x\.png: 50,000 pictures of 256x256 are too many for one picture"):
        check_page(50_000, (256, 256), "--out x.png")
