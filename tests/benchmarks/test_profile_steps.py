"""benchmarks/profile_steps.py and the journal's other readers: groups of kernels, cases, and records of killed runs."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdit.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = "--model.depth 1 --model.width 32 --model.heads 2"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


# -- the journal --


def test_lines_are_whole_after_a_kill(tmp_path):
    """The process is killed while it writes; another appends to the same file; a half line is left out."""
    from journal import Journal, read_journal

    path = tmp_path / "lines.jsonl"
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); from journal import Journal; j = Journal(sys.argv[1]);"
        "i = 0\nwhile True: j.write('row', i=i, text='x' * 3000); i += 1; i == 5 and print(flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.communicate()
    found = [line["i"] for line in read_journal(path)]
    assert found == list(range(len(found)))
    assert len(found) >= 5
    with path.open("a") as file:
        file.write('{"what": "row", "i"')
    assert len(read_journal(path)) == len(found)
    journal = Journal(path)
    assert journal.done("row", "i") == set(found)
    with pytest.raises(TypeError):
        journal.write("row", value=torch.ones(1))
    assert read_journal(tmp_path / "nothing") == []


# -- groups --


def triton_kernels() -> set[str]:
    """Return the names of all Triton kernels that the project launches."""
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return set(re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", source))


def test_each_kernel_has_a_name_of_its_own_and_a_group():
    from kernel_groups import OTHER, group_of

    names = triton_kernels()
    assert len(names) >= 16
    defined = re.findall(r"def (\w+_kernel)\(", "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py")))
    assert len(defined) == len(names), "two kernels of one name cannot be told apart in a profile"
    cuda = re.findall(r"__global__ [^(]*?(?:\(\w+\)\s*)?(\w+)\(const", (ROOT / "csrc/adamw_ema_cuda.cu").read_text())
    assert set(cuda) == {"adamw_ema_advance", "adamw_ema_update", "squared_norm_chunks", "squared_norm_total"}
    groups = {name: group_of(name) for name in (*names, *cuda)}
    assert OTHER not in groups.values(), groups
    assert {groups[name] for name in cuda} == {"optimizer"}
    assert groups["_adaln_backward_kernel"] == "adaLN"
    assert groups["_gelu_backward_kernel"] == "GELU"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        # cuBLAS on Hopper, its older kernels, and the second half of a split product
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize2x1x1", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8>", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>(...)", "GEMM"),
        # attention by cuDNN, flash and the memory-efficient kernels
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        (
            "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel>",
            "attention",
        ),
        ("fmha_cutlassB_bf16_aligned_64x64_k96_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "attention"),
        # PyTorch's own
        (
            "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, at::native::sum_functor>>",
            "sums",
        ),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<...>", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, ...>", "copies"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl(...)>", "GELU"),
        (
            "void at::native::elementwise_kernel<128, 2, at::native::BinaryFunctor<float, float, MulFunctor>>",
            "elementwise",
        ),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<..., FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "adaLN"),
        ("sm90_xmma_wgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc", "GEMM"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("triton_poi_fused_add_mul_native_layer_norm_3", "adaLN"),
        ("void at::native::index_elementwise_kernel<128, 4, ...>", "elementwise"),
        ("something_new", "other"),
    ],
)
def test_groups_of_library_kernels(name, group):
    """Names as CUDA's profiler shows them."""
    from kernel_groups import group_of

    assert group_of(name) == group


def test_groups_add_up():
    from kernel_groups import by_group

    kernels = [("nvjet_a", 2.0, 1.0), ("Memcpy DtoD", 1.0, 5.0), ("nvjet_b", 3.0, 2.5)]
    assert by_group(kernels) == {"copies": [1.0, 5.0], "GEMM": [5.0, 3.5]}


# -- cases --


def test_cases_are_read_and_named():
    from profile_steps import Case

    case = Case.parse("XL/2 sd_dit 256 graphs --sd_dit.mask_ratio 0.5")
    assert case == Case("XL/2", "sd_dit", 256, True, ("--sd_dit.mask_ratio", "0.5"))
    assert Case.parse(case.name) == case
    assert case.halved().batch == 128
    config = case.config("cpu", "fp32", 32)
    assert (config.model.size, config.method, config.batch) == ("XL", "sd_dit", 256)
    assert (config.cuda_graphs, config.sd_dit.mask_ratio, config.data.size) == (True, 0.5, 32)


@pytest.mark.parametrize(
    "text", ["XL/2", "XL dit 4", "M/2 dit 4", "S/2 dit four", "S/2 gan 4", "S/2 dit 4 --model.dept 3"]
)
def test_a_bad_case_is_one_line(text):
    from profile_steps import Case

    with pytest.raises(UserError) as caught:
        Case.parse(text).config("cpu", "fp32", 32)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Run two cases of which the second cannot be built; return (what was printed, lines, record)."""
    folder = tmp_path_factory.mktemp("profile")
    cases = [f"S/4 dit 2 {TINY}", f"S/4 sd_dit 2 {TINY} --sd_dit.decoder_depth 1 --model.attention cudnn"]
    files = ["--journal", str(folder / "lines.jsonl"), "--json", str(folder / "r.json")]
    command = [sys.executable, "benchmarks/profile_steps.py", *cases, "--size", "8", "--device", "cpu", *files]
    said = []
    for _ in range(2):  # the second time, the first case is there already
        ended = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert ended.returncode == 0, ended.stderr
        said.append(ended.stdout)
    from journal import read_journal

    return said, read_journal(folder / "lines.jsonl"), json.loads((folder / "r.json").read_text())


def test_a_case_leaves_its_step_and_its_profile(profiled):
    from profile_steps import PHASES, profile_lines, profile_record

    said, lines, record = profiled
    assert [line["what"] for line in lines] == [
        "record",
        "step",
        "profile",
        "profile failed",
        "record",
        "profile failed",
    ]
    step, profile = lines[1:3]
    assert 0 < step["ms_p20"] <= step["ms"] <= step["ms_p80"]
    assert step["images_per_s"] == pytest.approx(2 / step["ms"] * 1e3)
    assert list(step["phases"]) == list(PHASES)
    assert sum(step["phases"].values()) == pytest.approx(step["ms"], rel=0.5)
    assert profile["groups"]["GEMM"][0] > 0
    assert sum(ms for _, ms in profile["groups"].values()) == pytest.approx(profile["busy_ms"], abs=1e-2)
    assert all(len(kernel) == 3 for kernel in profile["kernels"])
    assert f"{step['case']}: is in the journal already" in said[1]

    rows = profile_record(lines)["rows"]
    assert [row["case"] for row in rows] == [step["case"], lines[3]["case"]]
    assert "cudnn" in rows[1]["failed"]
    table = "\n".join(profile_lines(profile_record(lines)))
    assert table in said[1] or "\n".join(profile_lines(record)) in said[1]
    assert f"| {step['case']} " in table
    assert "| GEMM " in table


def test_a_case_without_memory_halves_its_batch(monkeypatch):
    import profile_steps
    from journal import Journal
    from profile_steps import Case

    tried = []

    def measure(case, asked, config, ranks, journal):
        tried.append((case.batch, config.batch, asked))
        if case.batch > 2:
            raise torch.OutOfMemoryError("no room")
        journal.write("step", case=case.name, asked=asked)

    class Ranks:
        device = torch.device("cpu")

    monkeypatch.setattr(profile_steps, "_measure", measure)
    journal = Journal()
    with contextlib.redirect_stdout(io.StringIO()):
        profile_steps._profile(Case.parse("S/2 dit 8"), "fp32", 32, Ranks, journal)
        assert tried == [(8, 8, "S/2 dit 8"), (4, 4, "S/2 dit 8"), (2, 2, "S/2 dit 8")]
        assert journal.lines[-1]["case"] == "S/2 dit 2"
        profile_steps._profile(Case.parse("S/2 dit 100"), "fp32", 32, Ranks, journal)
    assert journal.lines[-1]["what"] == "profile failed"
    assert "OutOfMemoryError: no room" in journal.lines[-1]["failed"]


# -- records of runs that were cut off --


def laps(ms: float) -> list[dict]:
    return [{"forward": ms, "backward": 2 * ms}]


def throughput_lines() -> list[dict]:
    """Return the journal of a run with three contenders, one of which fails, and a round after each."""
    settings = {"gemm_size": 10, "batch": 4, "ranks": 1, "datasheet_flops": None, "method": "dit"}
    head = {"what": "record", "at": 0, "benchmark": "throughput", "settings": settings, "rows": []}

    def contender(name):
        return {
            "what": "contender",
            "name": name,
            "ran": name,
            "flops": {"network": 1.0},
            "held": 1,
            "peak": 2,
            "host": None,
        }

    return [
        head,
        contender("dit"),
        {"what": "round", "laps": {"gemm": laps(1), "dit": laps(10)}},
        contender("eager"),
        {"what": "round", "laps": {"gemm": laps(1), "dit": laps(20), "eager": laps(60)}},
        {"what": "contender", "name": "compile", "failed": "failed: no compiler"},
        {"what": "round", "laps": {"gemm": laps(1), "dit": laps(22), "eager": laps(66)}},
    ]


@pytest.mark.parametrize("length", range(1, 8))
def test_a_step_record_is_built_from_any_beginning_of_its_lines(length):
    from step_record import step_record

    record = step_record(throughput_lines()[:length])
    steps = {row["contender"]: row["ms_p50"] for row in record["rows"] if row["table"] == "step"}
    assert steps == {
        1: {}, 2: {}, 3: {"dit": 30}, 4: {"dit": 30}, 5: {"dit": 60, "eager": 180},
        6: {"dit": 60, "eager": 180, "compile": None}, 7: {"dit": 63, "eager": 189, "compile": None},
    }[length]  # fmt: skip
    if length >= 5:  # round by round, in rounds that both were in
        assert [row["ratio_p50"] for row in record["rows"] if row["ratio_p50"]] == [1, 3]


def test_operations_that_are_measured_are_skipped(tmp_path):
    """A second run adds only what the first was not asked for, and its record has both."""
    from kernels import _benchmark

    flags = ["--quick", "--sizes", "S", "--device", "cpu", "--journal", str(tmp_path / "lines.jsonl")]
    with contextlib.redirect_stdout(io.StringIO()):
        _benchmark([*flags, "--ops", "adaln"])
        _benchmark([*flags, "--ops", "adaln,denoise", "--json", str(tmp_path / "r.json")])
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines if line["what"] == "operation"] == ["adaln S", "denoise S"]
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(rows) == len([line for line in lines if line["what"] == "row"])
    assert {row["operation"] for row in rows} == {"adaln", "denoise"}
