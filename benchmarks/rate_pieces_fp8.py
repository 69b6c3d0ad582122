"""Define the pieces of a step with fp8 products that `rates.py` measures beside those of `rate_pieces.py`."""

from collections.abc import Iterator
from functools import partial

from operations import Setting
from rate_pieces import Piece, Run, _adaln_inputs, _randn, layers

from fastdit.kernels.adaln import EPS, adaln_fp8
from fastdit.kernels.fp8 import fp8_input_gradient, fp8_product, quantize, transpose_quantize
from fastdit.kernels.linear import gelu_fp8

SCALE = 4  # bytes of a row's scale


def fp8_kernels(s: Setting) -> Iterator[Piece]:
    """Yield the kernels that quantize, and each linear layer's fp8 products with their operands' quantization."""
    rows, like = s.batch * s.tokens, {"size": s.size, "batch": s.batch}
    unit = rows * s.width * s.dtype.itemsize
    # Read x and the branch y, write r, h in fp8 and two statistics and a scale for each row. x and r are fp32.
    moved = rows * s.width * 9 + unit + 3 * SCALE * rows
    yield Piece("adaLN forward, fp8", partial(_adaln, s), moved, **like)
    yield Piece("GELU forward, fp8", partial(_gelu, s), 6 * unit + SCALE * rows, **like)
    for layer, (inputs, outputs) in layers(s.width).items():
        # Read bf16 and write fp8 and the scales. A transposed weight is read twice.
        if layer != "fc2":  # whose gradient has the shape of proj's, as has proj's input
            moved = 3 * rows * outputs + SCALE * rows
            yield Piece(f"quantize rows of the {layer} gradient", partial(_rows, s, rows, outputs), moved, **like)
        weight = inputs * outputs
        moved = 3 * weight + SCALE * outputs
        yield Piece(f"quantize rows of the {layer} weight", partial(_rows, s, outputs, inputs), moved, **like)
        moved = 5 * weight + SCALE * inputs
        yield Piece(f"quantize transposed {layer} weight", partial(_transposed, s, outputs, inputs), moved, **like)
        # The bytes of a bf16 product, though fp8 copies are written and read in between.
        moved, flops = 2 * (rows * (inputs + outputs) + weight), 2.0 * rows * weight
        yield Piece(
            f"fp8 {layer} forward with quantization", partial(_forward, s, inputs, outputs), moved, flops, **like
        )
        yield Piece(f"fp8 {layer} dgrad with quantization", partial(_dgrad, s, inputs, outputs), moved, flops, **like)


def _adaln(s: Setting) -> Run:
    inputs = _adaln_inputs(s)
    return lambda: adaln_fp8(*inputs, None, EPS, False, True)


def _gelu(s: Setting) -> Run:
    hidden = _randn(s, s.batch, s.tokens, 4 * s.width)
    return lambda: gelu_fp8(hidden)


def _rows(s: Setting, rows: int, width: int) -> Run:
    x = _randn(s, rows, width)
    return lambda: quantize(x)


def _transposed(s: Setting, outputs: int, inputs: int) -> Run:
    weight = _randn(s, outputs, inputs)
    return lambda: transpose_quantize(weight)


def _forward(s: Setting, inputs: int, outputs: int) -> Run:
    x, weight, bias = _randn(s, s.batch * s.tokens, inputs), _randn(s, outputs, inputs), _randn(s, outputs)
    return lambda: fp8_product(x, weight, bias)


def _dgrad(s: Setting, inputs: int, outputs: int) -> Run:
    gradient, weight = _randn(s, s.batch * s.tokens, outputs), _randn(s, outputs, inputs)
    return lambda: fp8_input_gradient(gradient, weight)
