"""One rank reduces nothing: `shorten_step_on_one_rank` against DeepSpeed's own step, bit for bit.

Every bit of weights, masters, moments, EMA and gradient norm is compared after each step, one of them skipped, and
after resuming either step's checkpoint by the other.
"""

import json
import shlex
from dataclasses import dataclass, field

import pytest
from launching import TINY, forked

pytestmark = pytest.mark.launch

COLLECT = ("overlapping_partition_gradients_reduce_epilogue", "process_gradients", "reduce_gradients")
DIRECT = (*COLLECT, "step")
REDUCE = ("_reduce_non_expert_gradients",)


@dataclass(frozen=True)
class Case:
    """A run, and the methods that are replaced in it."""

    stage: int
    precision: str
    replaced: tuple[str, ...]
    clip: float = 0.5
    accumulation: int = 1
    zero: dict = field(default_factory=dict)
    file: dict = field(default_factory=dict)


NOT_CONTIGUOUS, CONTIGUOUS = {"contiguous_gradients": False}, {"contiguous_gradients": True}
BF16_SUMS = {"data_types": {"grad_accum_dtype": "bf16"}}
CASES = {
    **{f"fp32, ZeRO-0, accumulation {n}": Case(0, "fp32", REDUCE, accumulation=n) for n in (1, 2)},
    "fp32, ZeRO-0, no clipping": Case(0, "fp32", REDUCE, clip=0),
    **{
        f"{precision}, ZeRO-{stage}, {zero}": Case(stage, precision, DIRECT, zero=zero)
        for stage in (1, 2)
        for precision in ("fp32", "bf16")
        for zero in (NOT_CONTIGUOUS, CONTIGUOUS)
    },
    "bf16, ZeRO-1, no clipping": Case(1, "bf16", DIRECT, clip=0),
    "bf16, ZeRO-2, no clipping": Case(2, "bf16", DIRECT, clip=0),
    "bf16, ZeRO-2, overlap": Case(2, "bf16", DIRECT, zero={"overlap_comm": True}),
    "fp32, ZeRO-1, accumulation": Case(1, "fp32", DIRECT, accumulation=2),
    "bf16, ZeRO-1, accumulation in bf16": Case(1, "bf16", DIRECT, accumulation=2, zero=NOT_CONTIGUOUS, file=BF16_SUMS),
    "bf16, ZeRO-2, accumulation": Case(2, "bf16", DIRECT, accumulation=2),
    # Micro-batches would be added in place to gradients that autograd may own.
    "fp32, ZeRO-2, accumulation": Case(2, "fp32", (), accumulation=2),
    # DeepSpeed's optimizer for this rounds its fp32 gradients to bf16 when it reduces them.
    "bf16, ZeRO-1, accumulation in fp32": Case(1, "bf16", (), accumulation=2),
    # DeepSpeed computes the norm and clips.
    "fp32, ZeRO-1, its norm": Case(1, "fp32", COLLECT, clip=0.05, zero={"compute_grad_norm": True}),
    "bf16, ZeRO-2, its norm": Case(2, "bf16", COLLECT, clip=0.05, zero={"compute_grad_norm": True}),
    # The reduction changes gradients.
    "fp32, ZeRO-0, bf16 on the way": Case(0, "fp32", (), file={"communication_data_type": "bf16"}),
    "fp32, ZeRO-1, bf16 on the way": Case(1, "fp32", (), zero=NOT_CONTIGUOUS, file={"communication_data_type": "bf16"}),
    "fp32, ZeRO-0, divided on the way": Case(0, "fp32", (), file={"gradient_predivide_factor": 3.0}),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict]:
    """Return what tests/programs/train_on_one_rank.py finds in each case, all in one process."""
    out = tmp_path_factory.mktemp("one_rank")
    runs = []
    for i, case in enumerate(CASES.values()):
        path = out / f"{i}.json"
        values = {
            "zero_optimization": {"stage": case.stage, **case.zero},
            "gradient_accumulation_steps": case.accumulation,
            **case.file,
        }
        path.write_text(json.dumps(values))
        flags = ["--steps", 5, "--grad_clip", case.clip, "--weight_decay", 0.1, "--precision", case.precision]
        runs.append(shlex.join(map(str, [*TINY, *flags, "--ds_config", path])))
    forked(out, *runs, program="train_on_one_rank").succeeded()
    return dict(zip(CASES, json.loads((out / "records.json").read_text()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_deepspeeds_own_step(records, name):
    found = records[name]
    assert found["different"] == found["different after resuming"] == []
    assert found["steps"] == 2
    assert found["odd"] == []
    assert found["skipped"] == [0, 1, 0]
    nothing, everything = found["changed"]  # by the skipped step and by the next
    assert nothing <= 2 < 10 < everything


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_has_the_methods_that_are_replaced(records, name):
    """If DeepSpeed renames one of them, its own step stays in use, and this test tells."""
    case, found = CASES[name], records[name]
    assert found["replaced"] == sorted(case.replaced)
    assert not case.replaced or found["missing"] == [] or case.stage == 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.replaced])
def test_nothing_is_reduced(records, name):
    mine, plain = records[name]["operators"]
    assert mine.get("div_", 0) == 0
    assert plain["allreduce_"] - mine.get("allreduce_", 0) >= 1
    assert plain["copy_"] - mine.get("copy_", 0) >= records[name]["parameters"] - 1
    if "step" in CASES[name].replaced:
        assert "allreduce_" not in mine
        flattened = 1 if CASES[name].accumulation == 1 else CASES[name].accumulation
        assert mine["cat"] <= plain["cat"] + flattened
