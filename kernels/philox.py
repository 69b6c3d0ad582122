"""Compute random numbers as a function of seed, sample and draw, so that they do not depend on ranks or devices.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). It encrypts a
counter of four 32-bit words to four random words:

    key     = (low, high half of the seed)
    counter = (quad, low, high half of the sample's position, draw)      word j of quad q is number 4 q + j

    uniform = (word >> 8) 2^-24                                          in [0, 1)
    integer = (word n) >> 32                                             in [0, n)
    normal  = r cos(a), r sin(a) of words 2 i and 2 i + 1,  r = sqrt(-2 log(1 - u)),  a = 2 pi v   (Box and Muller 1958)

u and v are the uniform numbers of both words. Words, uniform numbers and integers have the same bits everywhere. The
reference computes normal numbers in fp64 and rounds them to fp32. The kernels compute them in fp32, with a relative
error below 1e-6: they reduce the angle to a quadrant in integers, which loses no digit, and take the polynomials of
Cephes (sinf, cosf).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dispatch import choose, constant_result
from ._native import load_native
from ._operator import operator

_BITS, _UNIFORM, _NORMAL, _INTEGERS = range(4)
_WORD = 2**32 - 1
_BLOCK = 512  # quads of a sample that one program owns


def philox_bits(
    count: int, numel: int, *, seed: int, position: int, draw: int, device: torch.device | str,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Return the random words of `numel` numbers for each of `count` samples, int64 (count, numel) in [0, 2^32).

    seed: the key, modulo 2^64.
    position: the position of the first sample in [0, 2^63). The others follow it.
    draw: the number of the draw in [0, 2^32).
    implementation: see `fastdit.kernels._dispatch`. There are a Triton kernel and a C++ kernel.

    `philox_uniform`, `philox_normal` and `philox_integers` take the same arguments. All raise ValueError for arguments
    out of range, and for an `implementation` that cannot run here.
    """
    return _numbers(_BITS, 0, count, numel, seed, position, draw, device, implementation)


def philox_uniform(
    count: int, numel: int, *, seed: int, position: int, draw: int, device: torch.device | str,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Return uniform numbers in [0, 1), multiples of 2^-24, float32 (count, numel). See `philox_bits`."""
    return _numbers(_UNIFORM, 0, count, numel, seed, position, draw, device, implementation)


def philox_normal(
    count: int, numel: int, *, seed: int, position: int, draw: int, device: torch.device | str,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Return standard normal numbers of magnitude up to 5.77, float32 (count, numel). See `philox_bits`."""
    return _numbers(_NORMAL, 0, count, numel, seed, position, draw, device, implementation)


def philox_integers(
    high: int, count: int, numel: int, *, seed: int, position: int, draw: int, device: torch.device | str,
    implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Return integers in [0, high), int64 (count, numel). `high` is in [1, 2^31). See `philox_bits`."""
    if not 1 <= high < 2**31:
        raise ValueError(f"high must be in [1, 2^31), got {high}")
    return _numbers(_INTEGERS, high, count, numel, seed, position, draw, device, implementation)


def _numbers(
    kind: int, high: int, count: int, numel: int, seed: int, position: int, draw: int, device: torch.device | str,
    implementation: str | None,
) -> Tensor:  # fmt: skip
    """Check the arguments and call the implementation."""
    if count < 0 or numel < 0:
        raise ValueError(f"count and numel must not be negative, got {count} and {numel}")
    if position < 0 or position + count > 2**63:
        raise ValueError(f"position must be in [0, 2^63), got {position}")
    if not 0 <= draw <= _WORD:
        raise ValueError(f"draw must be in [0, 2^32), got {draw}")
    device = torch.device(device)
    found = choose(device, implementation=implementation, cpp=_built())
    place = (kind, high, count, numel, _signed(seed, 64), position, draw)
    if found == "reference" or not count * numel:
        return philox_reference(*place, device)
    return _philox_cpp(*place) if found == "cpp" else _philox(*place, device)


@constant_result
def _built() -> bool:
    """Return whether the C++ module has this kernel, which an older build lacks."""
    return hasattr(load_native("cpu")[0], "philox")


def philox_reference(
    kind: int, high: int, count: int, numel: int, seed: int, position: int, draw: int, device: torch.device
) -> Tensor:
    """Compute all kinds of numbers in PyTorch's int64, whose products wrap around."""
    # Encrypt the counters.
    quads = torch.arange(-(-numel // 4), device=device)
    samples = torch.arange(count, device=device)[:, None] + position
    number = torch.full((1,), draw, device=device)
    counter = [x.expand(count, len(quads)) for x in (quads, samples & _WORD, samples >> 32, number)]
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        high_left, high_right = left >> 32 & _WORD, right >> 32 & _WORD
        counter = [high_right ^ counter[1] ^ key[0], right & _WORD, high_left ^ counter[3] ^ key[1], left & _WORD]
        key = [key[0] + 0x9E3779B9 & _WORD, key[1] + 0xBB67AE85 & _WORD]
    words = torch.stack(counter, dim=2).flatten(1)

    # Convert the words.
    if kind == _NORMAL:
        u, v = (words >> 8).double().mul(2**-24).unflatten(1, (-1, 2)).unbind(2)
        r, angle = (-2 * torch.log1p(-u)).sqrt(), 2 * math.pi * v
        words = torch.stack([r * angle.cos(), r * angle.sin()], dim=2).flatten(1).float()
    elif kind == _UNIFORM:
        words = (words >> 8).float() * 2**-24
    elif kind == _INTEGERS:
        words = words * high >> 32
    return words[:, :numel].contiguous()


@operator("fastdit::philox")
def _philox(
    kind: int, high: int, count: int, numel: int, seed: int, position: int, draw: int, device: torch.device
) -> Tensor:
    """Compute the numbers on a GPU. 32-bit halves are passed as signed words, so that their type never changes."""
    out = torch.empty(count, numel, dtype=_dtype(kind), device=device)
    words = [_signed(x, 32) for x in (seed, seed >> 32, position, position >> 32, draw)]
    block = min(_BLOCK, max(32, triton.next_power_of_2(triton.cdiv(numel, 4))))
    grid = (count, triton.cdiv(numel, 4 * block))
    _philox_kernel[grid](out, numel, high, *words, KIND=kind, BLOCK=block, num_warps=4)
    return out


@operator("fastdit::philox_cpp")
def _philox_cpp(kind: int, high: int, count: int, numel: int, seed: int, position: int, draw: int) -> Tensor:
    """Compute the numbers in C++ on the CPU."""
    out = torch.empty(count, numel, dtype=_dtype(kind))
    threads = torch.get_num_threads()
    load_native("cpu")[0].philox(out.data_ptr(), kind, high, count, numel, seed % 2**64, position, draw, threads)
    return out


@triton.jit(do_not_specialize=["high", "key_low", "key_high", "first_low", "first_high", "draw"])
def _philox_kernel(
    out, numel, high, key_low, key_high, first_low, first_high, draw, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """Write 4 BLOCK numbers of one sample: a program owns them, reads nothing and writes each number once.

    The words stay in registers, and are interleaved there so that neighboring threads write neighboring numbers.
    """
    # Encrypt the counters.
    sample, quad = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = (first_high.to(tl.int64) << 32) + first_low.to(tl.uint32, bitcast=True).to(tl.int64) + sample
    zero = tl.zeros((BLOCK,), tl.uint32)
    a, b, c, d = tl.philox_impl(
        quad.to(tl.uint32, bitcast=True),
        zero + (position & 0xFFFFFFFF).to(tl.uint32),
        zero + (position >> 32).to(tl.uint32),
        zero + draw.to(tl.uint32, bitcast=True),
        key_low.to(tl.uint32, bitcast=True),
        key_high.to(tl.uint32, bitcast=True),
    )

    # Convert the words.
    if KIND == 2:
        a, b = _box_muller(a, b)
        c, d = _box_muller(c, d)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    if KIND == 1:
        words = (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    elif KIND == 3:
        words = tl.umulhi(words, tl.zeros((4 * BLOCK,), tl.uint32) + high.to(tl.uint32, bitcast=True))

    # Store them.
    at = tl.program_id(1) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + sample.to(tl.int64) * numel + at, words.to(out.dtype.element_ty), mask=at < numel)


@triton.jit
def _box_muller(a, b):
    """Return two normal numbers of two random words."""
    r = tl.sqrt(-2.0 * tl.log(1.0 - (a >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08))
    # Split the angle into `turn` right angles and a rest x in [-pi / 4, pi / 4].
    whole = (b >> 8).to(tl.int32)
    turn = (whole + (1 << 21)) >> 22
    x = (whole - (turn << 22)).to(tl.float32) * 3.7450702829238413e-07  # pi / 2^23
    z = x * x
    sin = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    cos = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    odd = (turn & 1) == 1
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return r * tl.where(((turn + 1) & 2) == 2, -first, first), r * tl.where((turn & 2) == 2, -second, second)


@_philox.register_fake
def _(kind, high, count, numel, seed, position, draw, device):
    return torch.empty(count, numel, dtype=_dtype(kind), device=device)


@_philox_cpp.register_fake
def _(kind, high, count, numel, seed, position, draw):
    return torch.empty(count, numel, dtype=_dtype(kind))


def _dtype(kind: int) -> torch.dtype:
    """Return the dtype of a kind of numbers."""
    return torch.float32 if kind in (_UNIFORM, _NORMAL) else torch.int64


def _signed(word: int, bits: int) -> int:
    """Return the signed integer with the lowest `bits` bits of `word`."""
    word &= 2**bits - 1
    return word - (word >> (bits - 1) << bits)
