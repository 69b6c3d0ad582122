"""Count what a DiT training step does: FLOPs, bytes outside the GEMMs, kernel launches. `step_model.py` adds rates.

A `Code` is a version of the code as counts: which passes over memory it makes for each block, for each weight and once
a step, and how many kernels it launches. `TODAY` is the code as it is. `SCENARIOS` are the code before its last change,
the code as it is, and what it could be, each with one more change. Kernel groups have the names of `kernel_groups.py`.
"""

from dataclasses import dataclass, field, replace

from fastdit.kernels.adaln_triton import backward_options
from fastdit.models import SIZES

TIME_FEATURES = 256  # sinusoidal features of the noise level


@dataclass(frozen=True)
class Architecture:
    """A DiT with patch 2 on 4x32x32 latents of 1000 classes, with a null class."""

    depth: int
    width: int
    heads: int
    tokens: int = 256
    patch: int = 2
    channels: int = 4
    classes: int = 1000

    @classmethod
    def of(cls, size: str) -> "Architecture":
        model = SIZES[size]
        return cls(model["depth"], model["width"], model["heads"])

    @property
    def layers(self) -> dict[str, int]:
        """Return the multiply-adds of each linear layer of a block, forward, for one image."""
        square = self.tokens * self.width**2
        return {"qkv": 3 * square, "proj": square, "fc1": 4 * square, "fc2": 4 * square}

    @property
    def linear_products(self) -> int:
        """Return the multiply-adds of all linear layers, forward, for one image."""
        patches = 2 * self.tokens * self.patch**2 * self.channels * self.width
        conditioning = self.width * (TIME_FEATURES + self.width + (6 * self.depth + 2) * self.width)
        return self.depth * sum(self.layers.values()) + patches + conditioning

    @property
    def attention_products(self) -> int:
        """Return the multiply-adds of attention, forward, for one image."""
        return self.depth * 2 * self.tokens**2 * self.width

    @property
    def flops(self) -> int:
        """Return the FLOPs of a step for one image as MFU counts them: two a multiply-add, backward twice forward."""
        return 6 * (self.linear_products + self.attention_products)

    @property
    def parameters(self) -> int:
        """Return the number of trained weights."""
        width, pixels = self.width, self.patch**2 * self.channels
        blocks = self.depth * (12 * width**2 + 9 * width)
        modulation = (6 * self.depth + 2) * width * (width + 1)
        condition = (self.classes + 1) * width + width * (TIME_FEATURES + 1) + width * (width + 1)
        return blocks + modulation + condition + width * (pixels + 1) + pixels * (width + 1)

    def unit(self, batch: int) -> int:
        """Return the bytes of the residual stream in bf16."""
        return batch * self.tokens * self.width * 2


@dataclass(frozen=True)
class Pass:
    """A pass over memory.

    Args:
        group: the kernel group that makes it.
        amount: units for each block, or bytes for each weight, or units for each step.
        operation: what `rates.py` calls it; None where it measures no such pass.
        included: a measured rate of `operation` has the time of this pass in it already.
    """

    group: str
    amount: float
    operation: str | None = None
    included: bool = False


@dataclass(frozen=True)
class Code:
    """One version of the code.

    Args:
        name: what distinguishes it from the version before.
        block: passes for each block, in units.
        weight: passes for each weight, in bytes.
        step: passes once a step, in units.
        launches: kernels of each group for each block.
        launches_outside: kernels of each group outside the blocks.
        chunk: rows that a program of the adaLN backward kernel sums up; None: as the code chooses.
        vectors: number of vectors that such a program sums up.
        gemm: "bf16" or "fp8".
        gemm_target: FLOP/s by width that GEMMs shall reach; None: the rate as it is.
        share_target: share of the copy's rate that fastdit's kernels shall reach; None: the rate as it is.
    """

    name: str
    block: tuple[Pass, ...]
    weight: tuple[Pass, ...]
    step: tuple[Pass, ...]
    launches: dict[str, int] = field(default_factory=dict)
    launches_outside: dict[str, int] = field(default_factory=dict)
    chunk: int | None = None
    vectors: int = 4
    gemm: str = "bf16"
    gemm_target: dict[int, float] | None = None
    share_target: float | None = None

    def block_passes(self, architecture: Architecture) -> tuple[Pass, ...]:
        """Return the passes of a block, those over the adaLN backward kernel's partial sums too.

        Two sites a block write `vectors` in fp32 for each chunk of rows and read them again.
        """
        chunk = self.chunk or backward_options(architecture.width, architecture.tokens)["CHUNK"]
        return (*self.block, Pass("adaLN", 8 * self.vectors / chunk, self.block[1].operation, included=True))

    def units(self, architecture: Architecture) -> float:
        """Return the units that move for each block."""
        return sum(one.amount for one in self.block_passes(architecture))

    @property
    def bytes_a_weight(self) -> float:
        return sum(one.amount for one in self.weight)

    def launches_of(self, architecture: Architecture) -> dict[str, int]:
        """Return the kernels of each group that a step launches."""
        groups = dict.fromkeys((*self.launches, *self.launches_outside))
        return {
            group: architecture.depth * self.launches.get(group, 0) + self.launches_outside.get(group, 0)
            for group in groups
        }


# The code as it is. The stream (x, r and their gradients) is fp32: each of its tensors takes 2 units. Two adaLN sites a
# block read x and y and write r and h. Backward, they read two gradients, y, and r or x, and write two gradients and h.
# That is 32 units a block, and 22 with --model.stream bf16. GELU works on 4 units; its backward reads two tensors and
# writes two. Three tensors become the gradient of qkv. The last two sum up 7 vectors of bias gradients for each 64
# rows, in fp32. These partial sums are read again.
_ADALN = (
    Pass("adaLN", 12, "adaLN forward"),
    Pass("adaLN", 10, "adaLN backward from r, bias"),
    Pass("adaLN", 10, "adaLN backward from x, bias"),
)
_GELU = (Pass("GELU", 8, "GELU forward"), Pass("GELU", 16, "GELU backward, bias"))
_PACK = (Pass("copies", 6, "qkv gradient, bias"),)
_PARTIAL_SUMS = (Pass("sums", 28 / 64),)

# The code before: kernels without bias gradients, which linear layers computed by passes of their own.
_ADALN_ALONE = (
    Pass("adaLN", 12, "adaLN forward"),
    Pass("adaLN", 10, "adaLN backward from r"),
    Pass("adaLN", 10, "adaLN backward from x"),
)
_GELU_ALONE = (Pass("GELU", 8, "GELU forward"), Pass("GELU", 16, "GELU backward"))
_SUMS = tuple(
    Pass("sums", units, f"column sums of the {layer} gradient")
    for layer, units in (("qkv", 3), ("proj", 1), ("fc1", 4), ("fc2", 1))
)
_STACK = (Pass("copies", 6, "stack of dq, dk and dv"),)
# The product of output and its gradient (2), and dq in fp32, zeroed, added to and converted (5).
_ATTENTION = (Pass("attention", 7, "attention", included=True),)

# One rank under ZeRO-1 or 2 (training/deepspeed_internals.py): the bf16 gradients are flattened, and AdamW reads them,
# weight, two moments and EMA, and writes all but the gradients and a bf16 copy of the weights.
_LEAN = (Pass("optimizer", 2, "squared norm"), Pass("optimizer", 36, "AdamW + EMA, bf16 copy"))
_FLAT = (Pass("copies", 4, "copy of parameters, bf16 to bf16"), *_LEAN)
_ENDS = (Pass("elementwise", 6),)  # patches, positions, head, noise and loss

# As count_launches.py counts them. Attention is two operators there, on a GPU one kernel forward and three backward.
_LAUNCHES = {"GEMM": 12, "attention": 4, "adaLN": 6, "GELU": 2, "sums": 4, "copies": 1}
_OUTSIDE = {"GEMM": 13, "adaLN": 3, "sums": 7, "copies": 17, "elementwise": 79, "optimizer": 4}

TODAY = Code(
    name="the code as it is",
    block=_ADALN + _GELU + _PACK + _PARTIAL_SUMS + _ATTENTION,
    weight=_FLAT,
    step=_ENDS,
    launches=_LAUNCHES,
    launches_outside=_OUTSIDE,
)
_BEFORE = replace(
    TODAY,
    name="before: bias gradients by passes of their own",
    block=_ADALN_ALONE + _GELU_ALONE + _SUMS + _STACK + _ATTENTION,
    vectors=3,
)
_IN_PLACE = replace(
    TODAY,
    name="+ dq, dk and dv written in place, gradients not flattened",
    block=_ADALN + _GELU + _PARTIAL_SUMS + _ATTENTION,
    weight=_LEAN,
    launches=TODAY.launches | {"copies": 0},
)
# The epilogue of fc1 also writes its input to the GELU (4 units), that of fc2's dgrad reads it (4 units).
_EPILOGUES = replace(
    _IN_PLACE,
    name="+ GELU in GEMM epilogues, kernels at 92 % of the copy's rate",
    block=(*_ADALN, Pass("GEMM", 8), *_ATTENTION),
    launches=_IN_PLACE.launches | {"GELU": 0},
    chunk=64,
    share_target=0.92,
)
_FAST_GEMMS = replace(
    _EPILOGUES,
    name="+ GEMMs at 90 % of 800 TFLOP/s, less at small widths",
    gemm_target={384: 560e12, 768: 680e12, 1024: 710e12, 1152: 720e12},
)
# Reading the inputs of the GEMMs once more to quantize them costs 4 units.
_FP8 = replace(
    _FAST_GEMMS,
    name="+ fp8 GEMMs",
    block=(*_FAST_GEMMS.block, Pass("elementwise", 4)),
    gemm="fp8",
    gemm_target=None,
)
SCENARIOS = (_BEFORE, TODAY, _IN_PLACE, _EPILOGUES, _FAST_GEMMS, _FP8)
