"""benchmarks/step_model.py: its counts are the model's own, and rates and profiles change what they should."""

import json
from pathlib import Path

import pytest
import torch

from fastdit.errors import UserError
from fastdit.models import DiT, flops_per_image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_counts_are_those_of_the_real_model(size):
    from step_counts import Architecture

    architecture = Architecture.of(size)
    with torch.device("meta"):
        model = DiT(
            input_size=32,
            patch=2,
            channels=4,
            width=architecture.width,
            depth=architecture.depth,
            heads=architecture.heads,
            classes=1000,
        )
    assert architecture.parameters == sum(p.numel() for p in model.parameters())
    assert architecture.flops == flops_per_image(model)
    block = model.blocks[0]
    weights = {"qkv": block.qkv, "proj": block.proj, "fc1": block.fc1, "fc2": block.fc2}
    assert architecture.layers == {name: 256 * layer.weight.numel() for name, layer in weights.items()}


def test_units_and_bytes_of_the_scenarios():
    from step_counts import SCENARIOS, Architecture

    units = [code.units(Architecture.of("XL")) for code in SCENARIOS]
    chunks = 32 / 64  # the partial sums of the scenarios with chunks of 64 rows
    assert units[0] - units[1] == pytest.approx(9 - 8 / 32 - 28 / 64)  # bias gradients, less their partial sums
    assert units[1] - units[2] == pytest.approx(6)  # the stack of dq, dk and dv
    assert units[3:] == pytest.approx([47 + chunks, 47 + chunks, 51 + chunks])
    assert [code.bytes_a_weight for code in SCENARIOS] == [42, 42, 38, 38, 38, 38]


def test_each_scenario_is_faster_and_the_design_figures_hold():
    from step_counts import SCENARIOS
    from step_model import Rates, predict

    for size, first, last_bf16 in (("S", 0.22, 0.30), ("B", 0.335, 0.435), ("XL", 0.41, 0.51)):
        shares = [predict(size, 256, code, Rates()).mfu for code in SCENARIOS]
        assert shares == sorted(shares)
        assert shares[-2] == pytest.approx(last_bf16, abs=0.01)
        assert first - 0.01 < shares[0] < shares[-2]


def test_groups_are_those_of_profiles():
    from kernel_groups import GROUPS as PROFILED
    from step_counts import SCENARIOS, Architecture
    from step_model import GROUPS

    assert set(GROUPS) <= {name for name, _ in PROFILED}
    for code in SCENARIOS:
        passes = (*code.block_passes(Architecture.of("S")), *code.weight, *code.step)
        assert {one.group for one in passes} | set(code.launches_of(Architecture.of("S"))) <= set(GROUPS)


def test_passes_have_the_names_of_rates():
    """Every operation that a pass names is one that rates.py measures, else its rate would stay a guess for ever."""
    from rate_pieces import attention, fused_kernels, optimizer, setting_of, torch_operators
    from step_counts import SCENARIOS, Architecture

    device = torch.device("cpu")
    s = setting_of("S", 2, device)
    measured = {p.operation for section in (attention, fused_kernels, torch_operators) for p in section(s)}
    measured |= {p.operation for p in optimizer(device)} | {"attention"}
    for code in SCENARIOS:
        passes = (*code.block_passes(Architecture.of("S")), *code.weight, *code.step)
        assert {one.operation for one in passes if one.operation} <= measured
    assert "attention sdpa forward+backward, three gradients" in measured


def line(operation: str, size: str | None = "XL", batch: int | None = 256, **rates: float) -> dict:
    return {"what": "rates", "piece": f"{size} {batch} {operation}", "operation": operation, "size": size,
            "batch": batch, **rates}  # fmt: skip


def gemm_lines(tflops: float, batch: int = 256) -> list[dict]:
    return [
        line(f"gemm {layer} {phase} bf16", batch=batch, tflops=tflops)
        for layer in ("qkv", "proj", "fc1", "fc2")
        for phase in ("forward", "dgrad", "wgrad")
    ]


def test_measured_rates_replace_guesses():
    from step_counts import TODAY
    from step_model import GEMM_RATES, Rates, predict

    guessed = predict("XL", 256, TODAY, Rates())
    twice = 2 * GEMM_RATES["bf16"][1152] / 1e12
    rates = Rates(gemm_lines(twice))
    found = predict("XL", 256, TODAY, rates)
    assert found.milliseconds["GEMM"] == pytest.approx(guessed.milliseconds["GEMM"] / 2)
    assert found.milliseconds["adaLN"] == guessed.milliseconds["adaLN"]
    assert {rate.origin for name, rate in rates.used.items() if "GEMM" in name} == {"measured"}
    assert (
        predict("B", 256, TODAY, rates).milliseconds["GEMM"] == predict("B", 256, TODAY, Rates()).milliseconds["GEMM"]
    )

    # The batch that is nearest in ratio counts, and a failed line does not.
    rates = Rates([*gemm_lines(twice), *gemm_lines(1.0, batch=8), {**gemm_lines(9.0)[0], "failed": "no"}])
    assert predict("XL", 128, TODAY, rates).milliseconds["GEMM"] == pytest.approx(found.milliseconds["GEMM"] / 2)


def test_a_measured_kernel_includes_what_it_does_on_the_side():
    from step_counts import TODAY, Architecture
    from step_model import Rates, predict

    lines = [
        line("attention sdpa forward+backward, three gradients", tflops=200.0),
        line("adaLN forward", gb_per_s=1000.0),
        line("adaLN backward from r, bias", gb_per_s=1000.0),
        line("adaLN backward from x, bias", gb_per_s=1000.0),
    ]
    found = predict("XL", 256, TODAY, Rates(lines)).milliseconds
    architecture = Architecture.of("XL")
    unit = 256 * 256 * 1152 * 2
    assert found["adaLN"] == pytest.approx(28 * 32 * unit / 1e12 * 1e3)
    assert found["attention"] == pytest.approx(7 * architecture.attention_products * 256 / 200e12 * 1e3)


def test_a_slow_host_decides_a_small_step():
    from step_counts import TODAY
    from step_model import HOST_LAUNCH, Rates, predict

    step = predict("S", 1, TODAY, Rates())
    assert step.total == step.host == sum(step.launches.values()) * HOST_LAUNCH * 1e3
    assert predict("S", 256, TODAY, Rates()).total > step.host


def profile(case: str, step, factor: float = 1.0) -> dict:
    groups = {group: [step.launches.get(group, 0), factor * ms] for group, ms in step.milliseconds.items()}
    return {"what": "profile", "case": case, "ms": factor * step.total, "groups": groups | {"other": [3, 0.5]}}


def test_comparison_shows_which_assumption_is_wrong():
    from step_counts import TODAY
    from step_model import Rates, comparison_lines, predict

    step = predict("B", 256, TODAY, Rates())
    exact = profile("B/2 dit 256", step)
    exact["groups"]["sums"][1] *= 3
    cells = {
        row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]]
        for row in comparison_lines([exact], Rates())
        if row.startswith("|")
    }
    assert cells["sums"][2] == "3.00"
    assert cells["GEMM"][2] == cells["attention"][2] == cells["step"][2] == "1.00"
    assert cells["GEMM"][3:] == ["157", "157"]
    assert cells["other"] == ["0.00", "0.50", "", "0", "3"]
    other = comparison_lines([profile("B/2 sd_dit 256", step), profile("S/4 dit 8", step)], Rates())
    assert [text for text in other if text] == [
        f"{case}: not modelled, which is only DiT with patch 2 and default settings"
        for case in ("B/2 sd_dit 256", "S/4 dit 8")
    ]


def test_command_prints_tables_and_origins(tmp_path, capsys):
    from step_model import _model

    rates, measured = tmp_path / "rates.jsonl", tmp_path / "profile.jsonl"
    device = {"what": "device", "benchmark": "rates", "copy_gb_per_s": 2900.0}
    rates.write_text("".join(json.dumps(row) + "\n" for row in [device, *gemm_lines(650.0)]))
    measured.write_text(
        json.dumps({"what": "profile", "case": "XL/2 dit 256", "ms": 500.0, "groups": {"GEMM": [349, 280.0]}})
    )
    _model(["--sizes", "XL", "--batches", "256,32", "--rates", str(rates), "--measured", str(measured)])
    out = capsys.readouterr().out
    assert "XL/2 batch 256" in out
    assert "XL/2 batch 32" in out
    rows = [[cell.strip() for cell in text.split("|")[1:-1]] for text in out.splitlines() if text.startswith("|")]
    assert ["copy, bytes/s", "2.9 T", "measured"] in rows
    assert ["XL GEMM bf16 fc2 wgrad, FLOP/s", "650 T", "measured"] in rows
    assert ["XL attention, FLOP/s", "238 T", "guess"] in rows
    assert any(row[0] == "GEMM" and row[2] == "280.00" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "M"], "--sizes M: 'M' is unknown; choose of S,B,L,XL"),
        (["--batches", "256,many"], "--batches 256,many: must be whole numbers"),
        (["--rates", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--measured", __file__], "holds no lines of profile_steps.py"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    from step_model import _model

    with pytest.raises(UserError) as caught:
        _model(arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_suites_records_serve_as_rates_and_measurements(capsys):
    from step_model import _model

    first, last = sorted((BENCHMARKS / "records").glob("2026-11-27-nvidia-h200-*.json"), reverse=True)
    _model(["--sizes", "XL", "--rates", str(first), "--measured", str(last)])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in text.split("|")[1:-1]] for text in out.splitlines() if text.startswith("|")]
    assert ["XL GEMM bf16 fc2 wgrad, FLOP/s", "647.7 T", "measured"] in rows
    assert any(row[:3] == ["GEMM", "243.73", "260.29"] for row in rows)
