"""Emoji as labelled images: the bitmaps of Google's Noto Color Emoji, named and grouped by Unicode's emoji-test.txt.

Of each fully qualified emoji that the font shows as one glyph: its 136 x 128 bitmap on a white square.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fastdit.data.sets.image_sets import Split
from fastdit.errors import UserError

FONT, LIST = "NotoColorEmoji.ttf", "emoji-test.txt"
SIDE = 136
Labels = Literal["group", "subgroup"]
_VARIATION_SELECTOR = 0xFE0F


def read(files: Mapping[str, Path], labels: Labels) -> list[Split]:
    """The set in one piece; keys are code points. Raises UserError, also where fontTools is missing."""
    font = _Font(files[FONT])
    found = [(codes, names[labels], glyph) for codes, names in _listed(files[LIST]) if (glyph := font.glyph(codes))]
    if not found:
        raise UserError(f"{files[LIST]}: lists no emoji that {files[FONT]} has a bitmap of; get both again")
    class_names = list(dict.fromkeys(name for _, name, _ in found))
    samples = (
        ("-".join(f"{code:04x}" for code in codes), font.image(glyph), class_names.index(name))
        for codes, name, glyph in found
    )
    return [Split("", class_names, len(found), samples)]


def _listed(path: Path) -> Iterator[tuple[tuple[int, ...], dict[str, str]]]:
    """Code points, and names of group and subgroup, of each fully qualified emoji."""
    names = {"group": "", "subgroup": ""}
    for line in path.read_text(encoding="utf-8").splitlines():
        for level in names:
            if line.startswith(f"# {level}: "):
                names[level] = line.partition(": ")[2].strip()
        codes, _, rest = line.partition(";")
        if rest.startswith(" fully-qualified "):
            yield tuple(int(code, 16) for code in codes.split()), dict(names)


class _Font:
    """Glyphs of code points and their bitmaps, of a font with the tables CBDT and GSUB."""

    def __init__(self, path: Path):
        try:
            from fontTools.ttLib import TTFont, TTLibError
        except ImportError:
            raise UserError("fontTools: is not installed; run pip install 'fastdit[fetch]'") from None
        try:
            font = TTFont(path, lazy=True)
            self._bitmaps = font["CBDT"].strikeData[0]
            lookups = font["GSUB"].table.LookupList.Lookup
        except (TTLibError, KeyError, OSError) as error:
            raise UserError(f"{path}: is no font of colour bitmaps ({error}); get Debian's {FONT}") from None
        self._characters = font.getBestCmap()
        self._ligatures = [_ligatures(lookup) for lookup in lookups]

    def glyph(self, codes: tuple[int, ...]) -> str | None:
        """The one glyph with a bitmap that these code points become; None where they become several, or another."""
        if not all(code in self._characters or code == _VARIATION_SELECTOR for code in codes):
            return None
        glyphs = [self._characters[code] for code in codes if code in self._characters]
        for ligatures in self._ligatures:
            glyphs = _joined(glyphs, ligatures)
        return glyphs[0] if len(glyphs) == 1 and glyphs[0] in self._bitmaps else None

    def image(self, glyph: str) -> np.ndarray:
        """Its bitmap in the middle of a white square: uint8 (SIDE, SIDE, 3)."""
        bitmap = Image.open(io.BytesIO(self._bitmaps[glyph].imageData)).convert("RGBA")
        bitmap.thumbnail((SIDE, SIDE))  # no font of today has larger ones
        square = Image.new("RGBA", (SIDE, SIDE), "white")
        square.alpha_composite(bitmap, ((SIDE - bitmap.width) // 2, (SIDE - bitmap.height) // 2))
        return np.asarray(square.convert("RGB"))


def _ligatures(lookup) -> dict[tuple[str, ...], str]:
    """{glyphs: the one that takes their place} of a GSUB lookup."""
    tables = (getattr(table, "ExtSubTable", table) for table in lookup.SubTable)
    return {
        (first, *ligature.Component): ligature.LigGlyph
        for table in tables
        for first, ligatures in getattr(table, "ligatures", {}).items()
        for ligature in ligatures
    }


def _joined(glyphs: list[str], ligatures: dict[tuple[str, ...], str]) -> list[str]:
    """From the left, the longest ligature at each place."""
    joined, at = [], 0
    while at < len(glyphs):
        for end in range(len(glyphs), at, -1):
            if end == at + 1 or tuple(glyphs[at:end]) in ligatures:
                joined.append(ligatures.get(tuple(glyphs[at:end]), glyphs[at]))
                at = end
                break
    return joined
