"""Damage tar shards in seeded ways, and read them with an independent reader.

The reader uses tarfile's parser of headers, but not `tarfile.open`, which ends silently at the first bad header that is
not the file's first.
"""

import faulthandler
import io
import json
import re
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

BLOCK = 512
PAYLOADS, LABELS = ("png", "jpg", "npy"), ("cls", "json")
Rng = np.random.Generator


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail a block that takes longer; end the process with a traceback if the block hangs outside Python's bytecode."""

    def late(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


# The independent reader


def walk(data: bytes) -> tuple[list[tuple[str, int, int]], int | None]:
    """Return (name, offset of the content, size) of the members, and the byte where the structure breaks, or None."""
    at, members = 0, []
    while True:
        block = data[at : at + BLOCK]
        if len(block) < BLOCK:
            return members, len(data)
        if not any(block):
            return members, at if any(data[at:]) else None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError:
            return members, at
        if info.size < 0 or at + BLOCK + info.size > len(data):
            return members, at
        if info.isreg():
            members.append((info.name, at + BLOCK, info.size))
        at += BLOCK + -(-info.size // BLOCK) * BLOCK


def samples_held(path: Path) -> list[tuple[str, int, bytes]] | None:
    """Return (key, label, payload) of a shard's samples in their order, or None if it does not hold whole samples."""
    data = path.read_bytes()
    members, broken = walk(data)
    if broken is not None:
        return None
    samples: dict[str, dict[str, bytes]] = {}
    for name, offset, size in members:
        key, _, extension = name.partition(".")
        if key and not re.search(r"/\.", name):
            files = samples.setdefault(key, {})
            if extension.lower() in files:
                return None
            files[extension.lower()] = data[offset : offset + size]
    found = []
    for key, files in samples.items():
        payloads, labels = (([f for f in files if f in kinds]) for kinds in (PAYLOADS, LABELS))
        label = _label(files[labels[0]]) if len(labels) == 1 else None
        if len(payloads) != 1 or label is None:
            return None
        found.append((key, label, files[payloads[0]]))
    return found


def _label(text: bytes) -> int | None:
    """Return the number in ASCII, or in JSON's `label` or `cls`, or None."""
    if text[:1] == b"{":
        try:
            fields = json.loads(text)
        except ValueError:
            return None
        number = fields.get("label", fields.get("cls"))
        return number if type(number) is int else None
    return int(text) if re.fullmatch(rb"\s*-?[0-9]{1,18}\s*", text) else None


# Damages: each gives other bytes than it got


def flip_bits(rng: Rng, data: bytes) -> bytes:
    return _flipped(rng, data, np.arange(len(data)))


def flip_header_bits(rng: Rng, data: bytes) -> bytes:
    offset = rng.choice([offset for _, offset, _ in walk(data)[0]])
    return _flipped(rng, data, np.arange(offset - BLOCK, offset))


def flip_label_bits(rng: Rng, data: bytes) -> bytes:
    return _flipped(rng, data, _content(rng, data, LABELS))


def flip_payload_bits(rng: Rng, data: bytes) -> bytes:
    return _flipped(rng, data, _content(rng, data, PAYLOADS))


def flip_payload_head_bits(rng: Rng, data: bytes) -> bytes:
    return _flipped(rng, data, _content(rng, data, PAYLOADS)[:80])


def overwrite(rng: Rng, data: bytes) -> bytes:
    start, count = rng.integers(len(data)), rng.integers(1, 700)
    return data[:start] + rng.bytes(min(count, len(data) - start)) + data[start + count :]


def overwrite_header(rng: Rng, data: bytes) -> bytes:
    offset = rng.choice([offset for _, offset, _ in walk(data)[0]])
    start, count = offset - BLOCK + rng.integers(160), rng.integers(1, 30)
    return data[:start] + rng.bytes(count) + data[start + count :]


def overwrite_payload(rng: Rng, data: bytes) -> bytes:
    places = _content(rng, data, PAYLOADS)
    return data[: places[0]] + rng.bytes(len(places)) + data[places[-1] + 1 :]


def truncate(rng: Rng, data: bytes) -> bytes:
    return data[: rng.integers(len(data))]


def cut_out(rng: Rng, data: bytes) -> bytes:
    start, count = rng.integers(len(data)), rng.integers(1, 2000)
    return data[:start] + data[start + count :]


def cut_out_blocks(rng: Rng, data: bytes) -> bytes:
    start, count = rng.integers(len(data) // BLOCK) * BLOCK, rng.integers(1, 5) * BLOCK
    return data[:start] + data[start + count :]


def insert(rng: Rng, data: bytes) -> bytes:
    start = rng.integers(len(data))
    return data[:start] + rng.bytes(rng.integers(1, 2000)) + data[start:]


def insert_zero_blocks(rng: Rng, data: bytes) -> bytes:
    start = rng.integers(len(data) // BLOCK) * BLOCK
    return data[:start] + bytes(BLOCK * int(rng.integers(1, 4))) + data[start:]


def zero_blocks(rng: Rng, data: bytes) -> bytes:
    start, count = rng.integers(len(data) // BLOCK) * BLOCK, int(rng.integers(1, 5)) * BLOCK
    return (data[:start] + bytes(count) + data[start + count :])[: len(data)]


def zero_the_end(rng: Rng, data: bytes) -> bytes:
    start = rng.integers(len(data) // BLOCK) * BLOCK
    return data[:start] + bytes(len(data) - start)


def other_bytes(rng: Rng, data: bytes) -> bytes:
    return rng.bytes(rng.integers(3000))


def other_size(rng: Rng, data: bytes) -> bytes:
    """Change a member's size and correct the header's checksum."""
    offset = rng.choice([offset for _, offset, _ in walk(data)[0]])
    header = bytearray(data[offset - BLOCK : offset])
    octal = (b"77777777777\0", b"00000000000\0", b"-0000000100\0", b"%11o\0" % 512)
    header[124:136] = _some([*octal, b"\x80\0\0\1" + bytes(8), b"\xff" * 12], rng)
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    return data[: offset - BLOCK] + bytes(header) + data[offset:]


def swap_members(rng: Rng, data: bytes) -> bytes:
    members = _members(data)
    i, j = rng.choice(len(members), 2, replace=False)
    members[i], members[j] = members[j], members[i]
    return _tar(members)


def exchange_labels(rng: Rng, data: bytes) -> bytes:
    return _exchanged(rng, data, LABELS)


def exchange_payloads(rng: Rng, data: bytes) -> bytes:
    return _exchanged(rng, data, PAYLOADS)


def duplicate_member(rng: Rng, data: bytes) -> bytes:
    members = _members(data)
    return _tar([*members, members[rng.integers(len(members))]])


def remove_member(rng: Rng, data: bytes) -> bytes:
    members = _members(data)
    del members[rng.integers(len(members))]
    return _tar(members)


def remove_sample(rng: Rng, data: bytes) -> bytes:
    members = _members(data)
    key = members[rng.integers(len(members))][0].partition(".")[0]
    return _tar([member for member in members if member[0].partition(".")[0] != key])


def rename_member(rng: Rng, data: bytes) -> bytes:
    members = _members(data)
    i = rng.integers(len(members))
    name, content = members[i]
    key, _, extension = name.partition(".")
    names = (f"{key}x.{extension}", f"{key}.{extension}x", f".{name}", key, f"a\nb.{extension}", f"{key}.\x1b[2J")
    members[i] = _some([*names, "'.png"], rng), content
    return _tar(members)


def other_label(rng: Rng, data: bytes) -> bytes:
    members = _members(data)
    i = rng.choice([i for i, (name, _) in enumerate(members) if name.endswith(LABELS)])
    name, texts = members[i][0], (b"", b"-1", b"1_0", b"0x1", b"1.0", b"nan", b"\xd9\xa3", b"cat\ndog")
    text = _some([*texts, *(b"9" * digits for digits in (11, 19, 30, 9999))], rng)
    members[i] = name, text if name.endswith("cls") else b'{"label": %s}' % text
    return _tar(members)


def huge_label(rng: Rng, data: bytes) -> bytes:
    members = _members(data)
    i = rng.choice([i for i, (name, _) in enumerate(members) if name.endswith(LABELS)])
    name, text = members[i][0], b"9" * int(rng.integers(8, 13))
    members[i] = name, text if name.endswith("cls") else b'{"label": %s}' % text
    return _tar(members)


def deep_label(rng: Rng, data: bytes) -> bytes:
    members = _members(data)
    i = rng.choice([i for i, (name, _) in enumerate(members) if name.endswith(LABELS)])
    members[i] = members[i][0], b"[" * 99_999
    return _tar(members)


DAMAGES: tuple[Callable[[Rng, bytes], bytes], ...] = (
    flip_bits,
    flip_header_bits,
    flip_label_bits,
    flip_payload_bits,
    flip_payload_head_bits,
    overwrite,
    overwrite_header,
    overwrite_payload,
    truncate,
    cut_out,
    cut_out_blocks,
    insert,
    insert_zero_blocks,
    zero_blocks,
    zero_the_end,
    other_bytes,
    other_size,
    swap_members,
    exchange_labels,
    exchange_payloads,
    duplicate_member,
    remove_member,
    remove_sample,
    rename_member,
    other_label,
    huge_label,
    deep_label,
)


def damaged(damage: Callable[[Rng, bytes], bytes], rng: Rng, data: bytes) -> bytes:
    """Return damaged bytes; damage again while the bytes stay as they were."""
    while (found := damage(rng, data)) == data:
        pass
    return found


def _flipped(rng: Rng, data: bytes, places: np.ndarray) -> bytes:
    out = np.frombuffer(data, np.uint8).copy()
    for place in rng.choice(places, rng.integers(1, 9)):
        out[place] ^= np.uint8(1 << rng.integers(8))
    return out.tobytes()


def _content(rng: Rng, data: bytes, kinds: tuple[str, ...]) -> np.ndarray:
    offset, size = _some([(at, n) for name, at, n in walk(data)[0] if name.endswith(kinds)], rng)
    return np.arange(offset, offset + size)


def _exchanged(rng: Rng, data: bytes, kinds: tuple[str, ...]) -> bytes:
    members = _members(data)
    i, j = rng.choice([k for k, (name, _) in enumerate(members) if name.endswith(kinds)], 2, replace=False)
    (first, a), (second, b) = members[i], members[j]
    members[i], members[j] = (first, b), (second, a)
    return _tar(members)


def _some(items: Sequence, rng: Rng):
    return items[rng.integers(len(items))]


def _members(data: bytes) -> list[tuple[str, bytes]]:
    return [(name, data[at : at + n]) for name, at, n in walk(data)[0]]


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()
