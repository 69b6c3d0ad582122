"""Programs that compile for a GPU on a CPU: benchmarks/count_launches.py and benchmarks/kernel_code.py."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdit.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments, **environment) -> subprocess.CompletedProcess:
    """Run a benchmark in an environment without Triton's interpreter."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTDIT_KERNELS")}
    command = [sys.executable, BENCHMARKS / script, *arguments]
    return subprocess.run(
        list(map(str, command)),
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Launches of steps of 1, 2, 3 and again 2 blocks."""
    path = tmp_path_factory.mktemp("launches") / "launches.json"
    done = run("count_launches.py", "--depths", "1,2,3,2", "--width", "32", "--heads", "2", "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_counts_repeat_and_grow_linearly_with_depth(counts):
    one, two, three, again = counts[0]
    assert again == two
    for kind in ("triton", "torch", "parts"):
        names = set(one[kind]) | set(two[kind]) | set(three[kind])
        for name in names:
            first, second, third = (row[kind].get(name, 0) for row in (one, two, three))
            assert third - second == second - first >= 0, name
    assert three["total"] - two["total"] == two["total"] - one["total"] > 0


def test_counts_of_a_block_are_those_of_the_model(counts):
    """A block has two adaLN sites, one GELU, one qkv and four linear layers, each with three products and one bias."""
    one, two = counts[0][:2]
    block = {name: two["triton"][name] - one["triton"].get(name, 0) for name in two["triton"]}
    assert block["adaln_triton._adaln_forward_kernel"] == block["adaln_triton._adaln_backward_kernel"] == 2
    assert block["linear._gelu_kernel"] == block["linear._gelu_backward_kernel"] == 1
    assert block["packed._pack_gradients_kernel"] == 1
    assert block["column_sums._column_sums_kernel"] == 4
    products = {name: two["torch"].get(name, 0) - one["torch"].get(name, 0) for name in ("mm", "addmm")}
    assert sum(products.values()) == 12


def test_parts_add_up(counts):
    for row in counts[0]:
        assert row["total"] == sum(row["parts"].values()) == sum(row["triton"].values()) + sum(row["torch"].values())
        assert set(row["parts"]) == {"data", "forward", "backward", "optimizer", "rest"}
        assert all(count > 0 for count in row["parts"].values())
        assert f"dit, depth {row['depth']}: {row['total']} launches" in counts[1]


def test_step_model_expects_these_launches(counts, monkeypatch):
    """The model's counts are rounded guesses of a GPU's kernels, and must not fall far behind the code."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from step_counts import TODAY

    one, two = counts[0][:2]
    block = two["total"] - one["total"]
    assert sum(TODAY.launches.values()) == pytest.approx(block, rel=0.25)
    assert sum(TODAY.launches_outside.values()) == pytest.approx(one["total"] - block, rel=0.25)


def test_methods_and_dotted_settings_are_counted_too(tmp_path):
    path = tmp_path / "launches.json"
    done = run(
        "count_launches.py", "--depths", "4", "--width", "32", "--heads", "2", "--method", "sd_dit",
        "--sd_dit.mask_ratio", "0.5", "--json", path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())
    assert row["triton"]["prototypes._prototype_rows_kernel"] > 0
    assert row["triton"]["tokens._scatter_tokens_kernel"] > 0


def test_code_of_adaln_has_no_spills_and_wide_accesses(tmp_path):
    path = tmp_path / "code.json"
    done = run("kernel_code.py", "--ops", "adaln", "--sizes", "S", "--json", path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert {row["kernel"].rpartition("_adaln_")[2] for row in rows} == {
        "forward_kernel",
        "backward_kernel",
        "sum_kernel",
        "column_sums._column_sums_kernel",
    }
    for row in rows:
        assert row["spilled"] == 0
        assert 0 < row["registers"] <= 255
        assert row["instructions"] > 100
        assert row["loads"].startswith("128x"), row
        assert f"| {row['kernel']} " in done.stdout
    forward = next(row for row in rows if "forward" in row["kernel"])
    assert forward["special_functions"] > 0  # 1 / sqrt
    backward = next(row for row in rows if "backward" in row["kernel"])
    assert backward["barriers"] > 0  # its rows are shared by two warps


@pytest.mark.parametrize(
    ("module", "command", "arguments", "words"),
    [
        ("kernel_code", "_show", ["--ops", "adalm"], "--ops adalm: 'adalm' is unknown; choose of adaln"),
        ("kernel_code", "_show", ["--sizes", "M"], "--sizes M: 'M' is unknown; choose of S,B,XL,decoder"),
        ("count_launches", "_count", ["--depths", "two"], "--depths two: must be whole numbers from 1 on"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, module, command, arguments, words):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(UserError) as caught:
        getattr(importlib.import_module(module), command)(arguments)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from kernel_code import _show

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET=1: Triton compiles nothing; unset the variable"):
        _show(["--ops", "gelu"])
