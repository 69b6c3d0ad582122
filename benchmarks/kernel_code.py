"""Show the H100 code that Triton makes of fastdit's kernels, without a GPU: `python benchmarks/kernel_code.py`.

    python benchmarks/kernel_code.py --ops adaln,rotary --sizes XL --json code.json

Each kernel is compiled at the shapes of DiT-S, B and XL with 256 tokens, and of SD-DiT's decoder. The table has a line
for each variant of a kernel: registers a thread, bytes of spilled registers a thread, bytes of shared memory a block,
how wide its loads and stores of global memory are (bits x instructions), asynchronous copies, barriers, shuffles,
accesses to shared memory, calls of special functions (exp, rsqrt, ...), and instructions. 128-bit accesses and no
spills are what to look for.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
from compile_only import compile_only, machine_code, resources
from record import aligned, writable
from torch import Tensor
from triton.compiler import CompiledKernel

from fastdit import kernels
from fastdit.command_line import OneLineParser
from fastdit.errors import UserError, run_command
from fastdit.models import SIZES

BATCH, TOKENS, VISIBLE = 2, 256, 205  # VISIBLE: the tokens that SD-DiT's encoder sees
DECODER = {"depth": 8, "width": 512, "heads": 16}  # of SD-DiT
SHAPES = {size: SIZES[size] for size in ("S", "B", "XL")} | {"decoder": DECODER}
Shape = dict[str, int]
Case = tuple[str, Callable[[], object]]  # its label, and a function that launches kernels


class Code(NamedTuple):
    """One variant of a kernel: what it needs and which instructions it is made of."""

    kernel: str
    case: str
    warps: int
    registers: int
    spilled: int
    shared: int
    loads: str
    stores: str
    async_copies: int
    barriers: int
    shuffles: int
    shared_accesses: int
    special_functions: int
    instructions: int


def main(argv: list[str] | None = None) -> None:
    """Run the command and leave the process: 0, or 2 after a UserError."""
    run_command(_show, argv)


def _show(argv: list[str]) -> None:
    parser = OneLineParser(prog="kernel_code.py", description="Show the H100 code of fastdit's Triton kernels.")
    parser.add_argument("--ops", type=str, default=",".join(OPERATIONS), help="operations, with commas between")
    parser.add_argument("--sizes", type=str, default=",".join(SHAPES), help="networks whose shapes to take")
    parser.add_argument("--json", type=str | None, default=None, help="write the rows")
    args = parser.parse(argv)
    ops, sizes = args.ops.split(","), args.sizes.split(",")
    for flag, names, known in (("ops", ops, OPERATIONS), ("sizes", sizes, SHAPES)):
        for name in names:
            if name not in known:
                raise UserError(f"--{flag} {','.join(names)}: {name!r} is unknown; choose of {','.join(known)}")
    path = writable("json", args.json) if args.json else None

    rows = compiled_kernels(ops, [SHAPES[size] for size in sizes])
    print(f"Triton {triton.__version__}, compute capability 9.0")
    print("\n".join(aligned([Code._fields, *(tuple(map(str, row)) for row in rows)])))
    if path:
        path.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")


def compiled_kernels(ops: list[str], shapes: list[Shape]) -> list[Code]:
    """Return the code of every kernel variant that the cases of `ops` launch at these shapes, each variant once."""
    rows: dict[str, Code] = {}
    label = ""

    def on_launch(name: str, kernel: CompiledKernel) -> None:
        if kernel.hash not in rows:
            rows[kernel.hash] = _code(name, label, kernel)

    with compile_only(on_launch):
        for op in ops:
            for label, launch in OPERATIONS[op](shapes):  # noqa: B007 - `on_launch` reads the label
                launch()
    return list(rows.values())


def _code(name: str, case: str, kernel: CompiledKernel) -> Code:
    needs, assembly = resources(kernel), machine_code(kernel)
    # An instruction is its name and modifiers: LDG.E.128 is a load of 128 bits from global memory.
    found = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", assembly, re.MULTILINE))

    def count(*prefixes: str) -> int:
        return sum(number for instruction, number in found.items() if instruction.split(".")[0] in prefixes)

    return Code(
        kernel=name,
        case=case,
        warps=kernel.metadata.num_warps,
        registers=needs.registers,
        spilled=needs.spilled,
        shared=needs.shared,
        loads=_widths(found, "LDG"),
        stores=_widths(found, "STG"),
        async_copies=count("LDGSTS"),
        barriers=count("BAR"),
        shuffles=count("SHFL"),
        shared_accesses=count("LDS", "LDSM", "STS", "STSM"),
        special_functions=count("MUFU"),
        instructions=found.total(),
    )


def _widths(found: Counter, access: str) -> str:
    """Return the bits of each access to global memory and how many instructions have them: "128x11 32x4"."""
    widths: Counter = Counter()
    for instruction, number in found.items():
        name, *modifiers = instruction.split(".")
        if name == access:
            bits = next((word.lstrip("US") for word in modifiers if re.fullmatch(r"[US]?(128|64|16|8)", word)), "32")
            widths[int(bits)] += number
    return " ".join(f"{bits}x{number}" for bits, number in sorted(widths.items(), reverse=True)) or "none"


# The cases. Only shapes, dtypes and strides matter, for nothing is computed.


def _leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def adaln(shapes: list[Shape]) -> Iterator[Case]:
    """Yield the sites of a block, the first and the last layer, and SD-DiT's encoder of visible tokens."""
    for shape in shapes:
        width = shape["width"]
        vectors = _leaf(BATCH, (6 * shape["depth"] + 2) * width).unflatten(1, (-1, width)).unbind(1)
        x, y = _leaf(BATCH, TOKENS, width, dtype=torch.float32), _leaf(BATCH, TOKENS, width)
        weight = _leaf(8, width)
        rows = torch.arange(VISIBLE).expand(BATCH, VISIBLE)
        site = partial(_adaln_site, x, y, vectors, weight)
        yield f"D={width}, keeps r", site
        yield f"D={width}, keeps x", partial(site, keep_x=True)
        yield f"D={width}, keeps r, y's bias", partial(site, y_bias=_leaf(width))
        yield f"D={width}, keeps x, y's bias", partial(site, y_bias=_leaf(width), keep_x=True)
        yield f"D={width}, first block", partial(site, first=True)
        yield f"D={width}, head", partial(site, uses_r=False)
        yield f"D={width}, {VISIBLE} visible tokens", partial(site, rows=rows)
        yield f"D={width}, {VISIBLE} visible tokens, y's bias", partial(site, y_bias=_leaf(width), rows=rows)


def _adaln_site(x, y, vectors, weight, first: bool = False, uses_r: bool = True, **choices) -> None:
    """Run both passes of a site. The first block has no branch to add, and the head's r is not used."""
    branch = (None, None) if first else (y, vectors[2])
    inputs = (x, *branch, vectors[4], vectors[3], weight)
    r, out = kernels.modulated_linear(*inputs, implementation="triton", **choices)
    (r.sum() + out.sum() if uses_r else out.sum()).backward(retain_graph=True)


def gelu(shapes: list[Shape]) -> Iterator[Case]:
    """Yield the second half of an MLP, with and without the gradient of the first half's bias."""
    for shape in shapes:
        width = shape["width"]
        yield f"D={4 * width}", partial(_mlp, width, None)
        yield f"D={4 * width}, input's bias", partial(_mlp, width, _leaf(4 * width))


def _mlp(width: int, input_bias: Tensor | None) -> None:
    hidden, weight = _leaf(BATCH, TOKENS, 4 * width), _leaf(width, 4 * width)
    kernels.gelu_linear(hidden, weight, input_bias=input_bias, implementation="triton").sum().backward()


def qkv(shapes: list[Shape]) -> Iterator[Case]:
    """Yield the packing of gradients in the layouts of torch's attention kernels, and of a copy by head."""
    for shape in shapes:
        heads, dim = shape["heads"], shape["width"] // shape["heads"]
        yield f"{heads} heads of {dim}, by token", partial(_pack, heads, dim, False)
        yield f"{heads} heads of {dim}, by head", partial(_pack, heads, dim, True)


def _pack(heads: int, dim: int, by_head: bool) -> None:
    packed, bias = _leaf(BATCH, TOKENS, 3 * heads * dim), _leaf(3 * heads * dim)
    parts = kernels.split_qkv(packed, heads, bias, implementation="triton")
    gradient = torch.randn(BATCH, TOKENS, heads, dim).bfloat16()
    gradient = gradient.transpose(1, 2).contiguous().transpose(1, 2) if by_head else gradient
    torch.autograd.backward(parts, [gradient] * 3)


def structure(shapes: list[Shape]) -> Iterator[Case]:
    """Yield SADM's loss of features that Psi makes, at no model's shape."""
    for distance, penalty in (("euclidean", "l2"), ("cosine", "huber")):
        yield f"d=512, {distance}, {penalty}", partial(_structure_loss, distance, penalty)


def _structure_loss(distance: str, penalty: str) -> None:
    real, fake = (_leaf(256, 512, dtype=torch.float32) for _ in range(2))
    options = {"distance": distance, "penalty": penalty, "implementation": "triton"}
    kernels.structure_loss(real, fake, torch.ones(256), **options).loss.backward()


def prototypes(shapes: list[Shape]) -> Iterator[Case]:
    """Yield SD-DiT's loss over prototypes, at no model's shape."""
    yield "K=8192, k=256", _prototype_loss


def _prototype_loss() -> None:
    student, teacher, table = _leaf(16, 256), _leaf(16, 256), _leaf(8192, 256)
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04, "center": torch.zeros(8192)}
    inputs = (student, teacher, table, table.detach())
    kernels.prototype_loss(*inputs, implementation="triton", **options).loss.backward()


def tokens(shapes: list[Shape]) -> Iterator[Case]:
    """Yield the way of visible tokens back among mask tokens."""
    for shape in shapes:
        yield f"D={shape['width']}", partial(_scatter, shape["width"])


def _scatter(width: int) -> None:
    x, base = _leaf(BATCH, VISIBLE, width), _leaf(BATCH, TOKENS, width)
    ids = torch.arange(VISIBLE).expand(BATCH, VISIBLE)
    kernels.scatter_tokens(x, ids, base, implementation="triton").sum().backward()


def denoise(shapes: list[Shape]) -> Iterator[Case]:
    """Yield the denoising loss of latents, the same for all models."""
    yield "4x32x32", _denoise_loss


def _denoise_loss() -> None:
    out, x0, noise = _leaf(BATCH, 4, 32, 32), torch.ones(BATCH, 4, 32, 32), torch.ones(BATCH, 4, 32, 32)
    coefficients = kernels.DenoiseCoefficients(*torch.ones(6, BATCH))
    loss, x0_hat = kernels.affine_denoise_loss(out, x0, noise, coefficients, implementation="triton")
    (loss.sum() + x0_hat.sum()).backward()


def rotary(shapes: list[Shape]) -> Iterator[Case]:
    """Yield what is done to q and k before attention, with and without norm and rotation."""
    for shape in shapes:
        heads, dim = shape["heads"], shape["width"] // shape["heads"]
        norm = {"norm": (_leaf(dim, dtype=torch.float32), _leaf(dim, dtype=torch.float32))}
        rope = {"rope": kernels.rope_table((16, 16), dim)}
        for name, choices in (("norm and rotation", norm | rope), ("rotation", rope), ("norm", norm)):
            yield f"{heads} heads of {dim}, {name}", partial(_norm_rotate, heads, dim, choices)


def _norm_rotate(heads: int, dim: int, choices: dict) -> None:
    q, k, _ = _leaf(BATCH, TOKENS, 3, heads, dim).unbind(2)
    sum(x.sum() for x in kernels.norm_rotate(q, k, implementation="triton", **choices)).backward()


OPERATIONS: dict[str, Callable[[list[Shape]], Iterator[Case]]] = {
    function.__name__: function for function in (adaln, gelu, qkv, structure, prototypes, tokens, denoise, rotary)
}


if __name__ == "__main__":
    main()
