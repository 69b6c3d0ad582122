"""Sort the kernels of a profiled step into groups by name: GEMM, attention, adaLN, GELU, sums, copies, optimizer."""

# The first group with a matching word wins. Words are compared in lower case. Order matters where a library's name
# holds several words: cuDNN's attention kernels also say "sm90" and "fprop", a GEMM's split-K sum also says "reduce".
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("collectives", ("nccl", "gloo", "c10d")),
    ("adaLN", ("_adaln_", "fastdit::adaln", "layer_norm", "layernorm")),
    ("GELU", ("gelu",)),
    ("q and k norm, rotation", ("_norm_rotate_",)),
    ("fp8 quantization", ("_quantize_", "_column_maxima_", "fastdit::quantize_")),
    ("loss", ("_denoise_", "_prototype_", "_structure_")),
    ("tokens", ("_scatter_tokens_",)),
    ("random numbers", ("philox",)),
    ("optimizer", ("adamw_ema", "squared_norm", "multi_tensor_apply", "fused_adam", "foreach", "lpnorm")),
    # cuDNN's backward pass of attention runs two small kernels besides.
    ("attention", ("sdpa", "flash", "fmha", "attention", "compute_dot_do_o", "convert_dq")),
    # cuBLAS names its Hopper kernels nvjet_...; the other words are cuBLAS's and CUTLASS's older ones.
    ("GEMM", ("nvjet", "gemm", "xmma", "cutlass", "cublas", "splitk", "gemv", "aten::mm", "aten::addmm", "aten::bmm")),
    ("convolution", ("conv", "implicit", "dgrad", "wgrad", "cudnn")),
    ("copies", ("_pack_gradients_",)),
    ("copies", ("memcpy", "memset", "copy", "catarray", "fillfunctor", "aten::cat", "aten::fill_", "aten::zero_")),
    ("sums", ("_column_sums_", "reduce", "aten::sum")),
    ("torch.compile", ("triton_",)),
    ("elementwise", ("elementwise", "aten::mul", "aten::add", "aten::div", "aten::sub")),
)
OTHER = "other"


def group_of(name: str) -> str:
    """Return the group of a kernel (or, on a CPU, of a torch operator) by its name."""
    lowered = name.lower()
    return next((group for group, words in GROUPS if any(word in lowered for word in words)), OTHER)


def by_group(kernels: list[tuple[str, float, float]]) -> dict[str, list[float]]:
    """Return {group: [launches, milliseconds]}, the longest first, of kernels (name, launches, milliseconds)."""
    found: dict[str, list[float]] = {}
    for name, launches, milliseconds in kernels:
        total = found.setdefault(group_of(name), [0.0, 0.0])
        total[0] += launches
        total[1] += milliseconds
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return {group: [launches, round(milliseconds, 4)] for group, (launches, milliseconds) in ordered}
