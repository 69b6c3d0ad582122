"""benchmarks/scaling.py: against ZeRO's formulas, DeepSpeed's own estimators, and what one and two CPU ranks hold."""

import json
import shlex
from pathlib import Path

import pytest
from launching import SCRIPTS, free_port, python, run

from fastdit.errors import UserError

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests/programs/measure_traffic.py"
NETWORK = (
    "--device cpu --threads 1 --batch 4 --data.source synthetic:3x16x16:7:100 --data.size 16 --data.channels 3 "
    "--model.patch 4 --model.depth 3 --model.width 96 --model.heads 2"
)
SD_DIT = (
    "--method sd_dit --sd_dit.decoder_width 64 --sd_dit.decoder_depth 1 --sd_dit.decoder_heads 2 "
    "--sd_dit.prototypes 500 --sd_dit.head_width 128 --sd_dit.bottleneck 64"
)
# Precision, method's flags, stage.
CASES = [("fp32", "", 0), ("fp32", "", 1), ("bf16", SD_DIT, 1), ("bf16", SD_DIT, 2), ("bf16", "", 3)]
BUCKET = 20_000


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_the_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """`told[ranks][case]`: for each rank what tests/programs/measure_traffic.py says."""
    folder = tmp_path_factory.mktemp("told")
    flags = []
    for precision, method, stage in CASES:
        settings = {"stage": stage} | ({"reduce_bucket_size": BUCKET} if stage == 3 else {})
        (folder / f"{stage}.json").write_text(json.dumps({"zero_optimization": settings}))
        flags.append(f"{NETWORK} {method} --precision {precision} --ds_config {folder / f'{stage}.json'}")
    found = {}
    for ranks in (1, 2):
        out = folder / str(ranks)
        out.mkdir()
        launcher = [str(SCRIPTS / "deepspeed"), "--num_gpus", "2", "--master_port", free_port(), str(PROGRAM)]
        run([*(launcher if ranks == 2 else python(PROGRAM)), str(out), *flags], folder / f"log{ranks}").succeeded()
        by_rank = [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]
        found[ranks] = list(zip(*by_rank, strict=True))
    return found


def trained(case: dict):
    from scaling import Trained

    return Trained(**case["sizes"])


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"zero{c[2]}-{c[0]}{'-sd_dit' * bool(c[1])}" for c in CASES])
def test_ranks_hold_what_is_predicted(told, ranks, case):
    """Weights, optimizer and averages to padding and step counts; all that is held to 0.05 %.

    What is held but for the pool of the made-up images, which no data set has.
    """
    from scaling import held

    stage = CASES[case][2]
    for rank in told[ranks][case]:
        model = trained(rank)
        parts = held(model, stage, ranks)
        held_state = rank["state"] + rank["masters"]
        if stage == 3:  # its masters are not the parameters that the optimizer was given
            held_state += 4 * model.parameters // ranks - rank["masters"]
        else:
            assert parts["weights"] == pytest.approx(rank["weights"], abs=64)
        assert parts["optimizer"] + parts["averages"] == pytest.approx(held_state, abs=1024)
        assert sum(parts.values()) == pytest.approx(rank["held"] - rank["pool"], rel=5e-4)


@pytest.mark.launch
@pytest.mark.parametrize("case", range(len(CASES)))
def test_ranks_send_what_is_predicted(told, case):
    """Every collective of a step, as a ring sends it; prediction lacks SD-DiT's centres and usage counts."""
    from scaling import traffic

    for rank in told[2][case]:
        model = trained(rank)
        centres = 2 * 3 * 4 * 500 if CASES[case][1] else 0
        assert traffic(model, CASES[case][2], 2) == pytest.approx((sum(rank["sent"].values()) - centres) / 2, rel=1e-3)


@pytest.mark.launch
def test_sizes_are_the_networks(told):
    plain, sd_dit = trained(told[1][0][0]), trained(told[1][2][0])
    assert (plain.averages, sd_dit.averages) == (1, 2)
    assert (plain.bf16, sd_dit.bf16) == (False, True)
    assert plain.gathered == plain.reduced == sd_dit.reduced == 0
    assert sd_dit.gathered == 2 * sd_dit.parameters
    assert sd_dit.replicas > plain.replicas + sd_dit.parameters  # a bf16 teacher of more than half of the student
    assert trained(told[1][4][0]).bucket == BUCKET


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_deepspeeds_estimators(gpus):
    """On their assumptions: AdamW, bf16, no averages, nothing but model states. They count a part of the bf16
    gradients in ZeRO-2, and gradients of the largest layer in ZeRO-3, which ours has among `working`."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
    from scaling import Trained, held, passing

    parameters, largest = 675_000_000, 8_000_000
    model = Trained(parameters, averages=0, bucket=0, live=largest)

    def ours(stage: int) -> float:
        return sum(held(model, stage, gpus).values()) + sum(passing(model, stage, gpus).values())

    _, theirs = estimate_zero2_model_states_mem_needs(parameters, gpus, 1, cpu_offload=False)
    assert ours(2) == pytest.approx(theirs - 2 * parameters / gpus, abs=2)
    _, theirs, _ = estimate_zero3_model_states_mem_needs(
        parameters, largest, gpus, 1, cpu_offload=False, cpu_offload_params=False
    )
    assert ours(3) == pytest.approx(theirs - 2 * largest, abs=2)


def test_the_papers_memory():
    """Figure 1 of the ZeRO paper: 7.5 billion parameters, 64 GPUs, bf16 with K = 12: 31.4, 16.6, 1.9 GB."""
    from scaling import Trained, held

    model = Trained(7_500_000_000, averages=0, bucket=0, accumulation=2)
    state = {stage: sum(held(model, stage, 64).values()) / 1e9 for stage in (1, 2, 3)}
    # P_os: ours has fp32 gradients, theirs 16-bit ones. P_os+g: theirs keeps a part of the gradients.
    assert state[1] - 2 * 7.5 == pytest.approx(31.4, abs=0.05)
    assert state[2] + 2 * 7.5 / 64 == pytest.approx(16.6, abs=0.05)
    assert state[3] - 2 * 7.5 / 64 == pytest.approx(1.9, abs=0.05)  # again 4 bytes for theirs 2


def test_traffic_by_hand():
    """In bytes for 10 parameters and 4 GPUs, three quarters of which each sends."""
    from scaling import Trained, traffic

    model = Trained(10, frozen=4, gathered=8, reduced=6, bf16=True, accumulation=3)
    assert traffic(model, 1, 4) == 0.75 * (2 * 20 + 20 + 8 + 2 * 6)
    assert traffic(model, 2, 4) == 0.75 * (3 * 2 * 20 + 20 + 8 + 2 * 6)
    assert traffic(model, 3, 4) == 0.75 * (3 * (28 + 20) + 8 + 2 * 6)
    assert traffic(Trained(10, frozen=4, live=27), 3, 4) == 0.75 * (2 * 28 + 20)
    assert traffic(Trained(10, reduced=6, gathered=8, bf16=False), 0, 4) == 0.75 * (2 * 40 + 2 * 6)
    assert all(traffic(model, stage, 1) == 0 for stage in range(4))


def test_links():
    from scaling import Links

    links = Links(nvlink=450, network=50, gpus_per_node=8)
    assert links.rate(8) == 450e9
    assert links.rate(16) == 400e9  # eight rings, one through each NIC
    assert Links(nvlink=300).rate(16) == 300e9


def test_a_prediction_by_hand():
    from scaling import Links, Measured, Target, Trained, scaling, scaling_lines

    model = Trained(1_000_000_000, averages=2, replicas=7, bf16=True, accumulation=2, bucket=1000)
    measured = Measured(seconds=0.1, batch=32, held=20_000_000_000, peak=25_000_000_000, stage=1)
    links = Links(nvlink=100, network=10, gpus_per_node=8, overlap=0.25)
    found = scaling("sd_dit", model, measured, Target([1, 8, 16], links))
    rows = {(row["gpus"], row["zero"]): row for row in found["rows"]}
    assert list(rows) == [(n, stage) for n in (1, 8, 16) for stage in (1, 2, 3)]
    row = rows[16, 1]
    assert row["sent_bytes"] == 6e9 * 15 / 16
    assert row["communication_ms"] == pytest.approx(6e9 * 15 / 16 / 80e9 * 1e3)
    assert row["step_ms"] == pytest.approx(100 + 0.75 * row["communication_ms"])
    assert row["efficiency"] == pytest.approx(100 / row["step_ms"])
    assert row["images_per_s"] == pytest.approx(16 * 32 / row["step_ms"] * 1e3)
    assert row["working_bytes"] == 5e9
    assert row["total_bytes"] == 2e9 + 4e9 + 12e9 / 16 + 8e9 / 16 + 7 + 5e9
    assert rows[8, 2]["buckets_bytes"] == 2000
    assert rows[8, 2]["gradients_bytes"] == 4e9 / 8
    assert rows[1, 1]["efficiency"] == 1
    lines = "\n".join(scaling_lines(found))
    assert "Predicted, not measured" in lines
    assert "+30.0%" in lines  # 26 GB by the model between steps, 20 measured
    assert len(lines.split("\n")) == 4 + 2 + 9
    json.dumps(found)


def test_hidden_communication_is_no_more_than_the_step():
    from scaling import Links, Measured, Target, Trained, scaling

    measured = Measured(0.001, 1, 10, 10, 1)
    links = Links(nvlink=1, network=1, overlap=1.0)
    row = scaling("dit", Trained(10**9), measured, Target([8], links))["rows"][0]
    assert row["step_ms"] == pytest.approx(row["communication_ms"])


def test_the_bucket_is_not_working_memory():
    """Measured with ZeRO-2, whose bucket the peak holds; with ZeRO-0 and 1 there is none."""
    from scaling import Measured, Trained, memory

    model = Trained(100, bf16=False, bucket=1000)
    measured = Measured(1.0, 1, 500, 6500, 2)
    assert memory(model, measured, 0, 8)["working"] == memory(model, measured, 2, 8)["working"] == 2000
    assert memory(model, measured, 0, 8)["buckets"] == 0
    assert memory(model, measured, 2, 8)["buckets"] == memory(model, measured, 3, 8)["buckets"] == 4000
    assert memory(model, measured._replace(stage=1), 2, 8)["working"] == 6000
    for accumulation, gradients in ((1, 0), (2, 400)):
        parts = memory(Trained(100, accumulation=accumulation, bucket=1000), measured, 1, 8)
        assert (parts["buckets"], parts["gradients"]) == (0, gradients)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--scale_to", "8,many"], ["--scale_to 8,many", "8,64,1024"]),
        (["--scale_to", "0"], ["--scale_to 0"]),
        (["--scale_to", "8,12"], ["--scale_to 12", "--gpus_per_node"]),
        (["--scale_to", "8", "--zero", "3"], ["--scale_to", "ZeRO-0, 1 or 2"]),
        (["--scale_to", "8", "--nvlink", "0"], ["--nvlink", "above 0"]),
        (["--scale_to", "8", "--overlap", "1.5"], ["--overlap 1.5", "0 to 1"]),
        (["--loader_only", "--data", "fashion_mnist", "--scale_to", "8"], ["--loader_only", "--scale_to"]),
    ],
)
def test_bad_input_is_one_line(argv, words):
    from throughput import _benchmark

    with pytest.raises(UserError) as caught:
        _benchmark(["--device", "cpu", *argv])
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.launch
def test_the_command(tmp_path):
    """A prediction for each of fastdit's methods stands in the record and in what is printed."""
    flags = "--model S/4 --size 16 --batch 2 --steps 1 --scale_to 8,64 --network 25 --zero 1 --precision fp32"
    small = NETWORK.partition("--batch")[0] + "--model.depth 1 --model.width 32 --model.heads 2"
    files = ("--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    command = python("benchmarks/throughput.py", *shlex.split(f"{flags} {small}"), *files)
    printed = run(command, tmp_path / "log").succeeded().text
    from scaling import PARTS, scaling_lines
    from step_tables import COLUMNS, step_lines

    record = json.loads((tmp_path / "r.json").read_text())
    (found,) = record["scaling"]
    (step,) = [row for row in record["rows"] if row["table"] == "step"]
    assert found["measured"]["held"] == step["held_bytes"]
    assert found["links"] == {"nvlink": 450, "network": 25, "gpus_per_node": 8, "overlap": 0}
    assert [(row["gpus"], row["zero"]) for row in found["rows"]] == [(n, stage) for n in (8, 64) for stage in range(4)]
    for row in found["rows"]:
        assert sum(row[f"{part}_bytes"] for part in PARTS) == pytest.approx(row["total_bytes"], abs=4)
        assert row["working_bytes"] > 0
    assert "\n".join(scaling_lines(found)) in "\n".join(step_lines(record))
    assert "\n".join(step_lines(record)) in printed
    assert (tmp_path / "r.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
