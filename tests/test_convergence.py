"""benchmarks/convergence.py: the plan and its continuation, data without DALI, judges, equal time, and the record."""

import io
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from launching import ROOT, TINY, Launched, forked, python, run
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))
import convergence
import convergence_judges
import convergence_runner
from convergence_data import at_hand, opened, pack, read_samples
from convergence_judges import Pixels, Reference, Sampled, block_features, count_sampling, probe_accuracy
from convergence_plan import Plan, count_steps, first_value, rates_around
from convergence_tables import CONVERGENCE, convergence_lines, convergence_record, write_chart
from journal import read_journal

from fastdit import run_parts
from fastdit.config import DataConfig
from fastdit.data import write_shard
from fastdit.errors import UserError
from fastdit.models import flops_per_image
from fastdit.training import schedules

CPU = torch.device("cpu")
SMALL = "--model.depth 1 --model.width 32 --model.heads 2 --sd_dit.decoder_width 16 --sd_dit.decoder_depth 1 "
SMALL += "--sd_dit.decoder_heads 2 --sd_dit.head_width 16 --sd_dit.bottleneck 8 --sd_dit.prototypes 16"
COMMAND = ["--common", SMALL]
for words in (
    "--device cpu --threads 1 --patch 7 --batch 8 --sample_steps 2 --points 4",
    "--rates 1e-3,4e-3 --rate_seconds 0.3 --contenders sd_dit --seconds 0.6",
    "--samples 24 --rate_samples 16 --guidance 1.5",
):
    COMMAND += words.split()


# -- the plan --

PLAN = Plan(
    contenders={"dit": "", "a": "--method a", "b": "--method b"}, rates=(1e-3, 2e-3, 4e-3), rate_budget=30.0,
    budget=55.0, rate_samples=10, samples=20, seeds=(0, 1), settings={"batch": 8},
)  # fmt: skip
SWEPT = replace(PLAN, contender_rates=3, extend=1, finalists=2, equal_steps=1)


def finish(plan, lines, values, what="run", **more):
    """Add lines of the next runs of a plan, one for each value of FD-PCA; None is a run that diverged."""
    for value in values:
        asked = plan.asked(next(run for run in plan.remaining(lines) if run.known))
        figures = {"loss": {"value": 0.5}, "FD-lite0": {"skipped": "no network"}, "FD-PCA": {"1": {"value": value}}}
        result = {"failed": "diverged at step 3"} if value is None else {"figures": figures}
        lines.append({"what": what, "asked": json.loads(json.dumps(asked)), **result, **more})


def told(runs):
    return [(run.phase, run.contender, run.lr, run.seed) for run in runs]


def test_the_best_rate_comes_from_the_journal():
    lines = [{"what": "record"}]
    assert [run.lr for run in PLAN.remaining(lines)[:3]] == [1e-3, 2e-3, 4e-3]
    assert not any(run.known for run in PLAN.remaining(lines)[3:])
    assert str(PLAN.remaining(lines)[3]) == "contenders: dit, the best rate, seed 0"
    finish(PLAN, lines, [3.0, 2.0])
    assert not any(run.known for run in PLAN.remaining(lines)[1:])
    finish(PLAN, lines, [None])
    left = PLAN.remaining(lines)
    assert [(run.contender, run.lr, run.budget, run.samples) for run in left[:3]] == [
        ("dit", 2e-3, 55.0, 20), ("a", 2e-3, 55.0, 20), ("b", 2e-3, 55.0, 20),
    ]  # fmt: skip
    finish(PLAN, lines, [1.0, 7.0, 5.0])
    assert [(run.contender, run.lr, run.seed) for run in PLAN.remaining(lines)] == [("dit", 2e-3, 1), ("b", 2e-3, 1)]
    finish(PLAN, lines, [1.0, 2.0])
    assert PLAN.remaining(lines) == []


def test_every_contender_has_its_own_rate():
    """Sweeps center on plain DiT's best rate, and go on beyond an edge at which the best lies, once here."""
    lines = []
    finish(SWEPT, lines, [3.0, 2.0, 1.0])
    assert told(SWEPT.remaining(lines))[0] == ("rates", "dit", 8e-3, 0)
    assert not any(run.known for run in SWEPT.remaining(lines)[1:])
    finish(SWEPT, lines, [2.0])
    around = [2e-3, 4e-3, 8e-3]
    swept = [("rates", name, lr, 0) for name in "ab" for lr in around]
    assert told(SWEPT.remaining(lines))[:6] == swept
    finish(SWEPT, lines, [9.0, 8.0, 9.0])
    finish(SWEPT, lines, [1.0, 2.0, 3.0])
    assert told(SWEPT.remaining(lines))[0] == ("rates", "b", 1e-3, 0)
    finish(SWEPT, lines, [0.5])
    assert told(SWEPT.remaining(lines))[:3] == [
        ("contenders", "dit", 4e-3, 0), ("contenders", "a", 4e-3, 0), ("contenders", "b", 1e-3, 0),
    ]  # fmt: skip
    finish(SWEPT, lines, [1.0, 3.0, 2.0])
    assert told(SWEPT.remaining(lines)) == [
        ("contenders", "dit", 4e-3, 1), ("contenders", "b", 1e-3, 1), ("contenders", "a", 4e-3, 1),
        ("equal steps", "a", 4e-3, 0), ("equal steps", "b", 1e-3, 0),
    ]  # fmt: skip


def test_a_contender_without_a_good_rate_does_not_stop_the_others():
    lines = []
    finish(SWEPT, lines, [3.0, 1.0, 2.0])
    finish(SWEPT, lines, [None, None, None])
    finish(SWEPT, lines, [2.0, 1.0, 2.0])
    assert told(SWEPT.remaining(lines))[:3] == [("contenders", name, 2e-3, 0) for name in ("dit", "a", "b")]
    finish(SWEPT, lines, [1.0, None, 1.0])
    assert [run.contender for run in SWEPT.remaining(lines) if run.seed == 1] == ["dit", "b"]


def test_a_rate_among_the_flags_is_not_swept():
    plan = replace(SWEPT, contenders={"dit": "", "a": "--method a --lr 5e-4", "b": "--lr=7e-4"})
    lines = []
    finish(plan, lines, [3.0, 1.0, 2.0])
    assert told(plan.remaining(lines))[:3] == [
        ("contenders", "dit", 2e-3, 0), ("contenders", "a", 5e-4, 0), ("contenders", "b", 7e-4, 0),
    ]  # fmt: skip


def test_rates_lie_around_the_best():
    assert rates_around(4e-3, [2e-3, 8e-3, 4e-3], 3) == (2e-3, 4e-3, 8e-3)
    assert rates_around(8e-3, [2e-3, 8e-3, 4e-3], 3) == (4e-3, 8e-3, 1.6e-2)
    assert rates_around(2e-3, [2e-3, 6e-3], 5) == (2.22e-4, 6.67e-4, 2e-3, 6e-3, 1.8e-2)
    assert rates_around(2e-3, [2e-3], 3) == (1e-3, 2e-3, 4e-3)


def test_runs_of_other_settings_do_not_count():
    lines = []
    finish(PLAN, lines, [1.0, 2.0, 3.0])
    for other in (replace(PLAN, settings={"batch": 9}), replace(PLAN, rate_budget=31.0), replace(PLAN, seeds=(1,))):
        assert other.finished(lines, other.remaining(lines)[0]) is None
        assert other.remaining(lines)[3].lr is None


def test_failed_runs_do_not_stop_a_plan():
    """A run that an exception ended decides as a failed one, and is tried again by the next call."""
    lines = []
    finish(PLAN, lines, [None, None, None])
    assert not any(run.known for run in PLAN.remaining(lines)), "no rate is left"
    lines = []
    finish(PLAN, lines, [math.nan, 2.0, 3.0])
    finish(PLAN, lines, [1.0])
    finish(PLAN, lines, [None], "run failed")
    assert PLAN.remaining(lines)[0].contender == "a"
    (a, b, *_), failed = PLAN.remaining(lines), lines.pop()
    finish(PLAN, lines, [9.0])
    lines[-1]["asked"]["contender"], lines[-1]["asked"]["flags"] = b.contender, b.flags
    lines.append(failed)
    assert [(run.phase, run.contender) for run in PLAN.remaining(lines)] == [
        ("contenders", a.contender), ("contenders", "dit"), ("contenders", "b"),
    ]  # fmt: skip


def test_steps_are_equal_for_an_equal_price():
    assert count_steps(55.0, 0.031) == count_steps(55.0, 0.031) == 1774
    assert count_steps(55.0, 0.062) == count_steps(60.0, 0.062, fixed=5.0) == 887
    assert count_steps(0.001, 5.0) == 1


def parsed(*argv):
    return convergence._parser().parse(convergence._joined([*COMMAND, *argv]))


def test_schedules_end_with_the_runs_last_step():
    with opened("fashion_mnist", None) as (_, data):
        config = convergence_runner.run_config(parsed(), data, "--method sd_dit", 2e-3, 5, 40)
    assert (config.steps, config.warmup, config.lr, config.seed) == (40, 2, 2e-3, 5)
    assert schedules.learning_rate(config, 2) == 2e-3
    assert 0 < schedules.learning_rate(config, 39) < 1e-5
    assert schedules.learning_rate(config, 40) == 0
    own = convergence_runner.run_config(parsed(), data, "--lr 1e-4", 2e-3, 5, 40)
    assert own.lr == 1e-4


def test_training_from_a_fresh_state_is_the_training_loops(tmp_path):
    """The same weights, EMA and Psi, to the bit, though another session was priced before."""
    flags = ["--method", "sadm", "--sadm.psi_width", "16", "--steps", "7", "--warmup", "2", "--schedule", "cosine"]
    same = ["--data.source", "synthetic:1x28x28:10:100", "--data.flip", "false"]
    ended = run(python("tests/train_contender.py", *TINY, *same, *flags), tmp_path / "log").succeeded()
    assert ended.text.split()[-1] == "equal"


# -- the real command --


@pytest.mark.launch
def test_a_killed_plan_goes_on(tmp_path, monkeypatch):
    """SIGKILL comes in the middle of the second run. Then the plan goes on, and ends; then time is too short."""
    journal = tmp_path / "lines.jsonl"
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed process leaves its folders

    def lines(what):
        return [line for line in read_journal(journal) if line["what"] == what]

    pixels = np.random.default_rng(0).integers(0, 256, (64, 14, 14), dtype=np.uint8)
    data = shard(tmp_path / "images.tar", pixels, np.arange(64) % 4)
    command = python(
        "benchmarks/convergence.py", *COMMAND, "--data", data, "--journal", journal, "--json", tmp_path / "r.json"
    )
    once = [*command, "--seeds", "0", "--png", tmp_path / "r.png"]
    with Launched(once, tmp_path / "first.log") as launched:
        launched.until(lambda: any(line["lr"] == 4e-3 for line in lines("run point")), "the second run")
    (first,) = lines("run")
    assert len(convergence_record(read_journal(journal))["rows"]) == 1

    ended = run(once, tmp_path / "second.log").succeeded()
    runs = lines("run")
    assert runs[0] == first, "a finished run is not repeated, nor are its figures changed"
    assert [(line["phase"], line["contender"]) for line in runs] == [
        ("rates", "dit"), ("rates", "dit"), ("contenders", "dit"), ("contenders", "sd_dit"),
    ]  # fmt: skip
    assert [line["lr"] for line in runs[:2]] == [1e-3, 4e-3]
    assert lines("plan")[-1]["remaining"] == []
    best = min(runs[:2], key=lambda line: first_value(line["figures"]["FD-lite0"]))["lr"]
    assert {line["lr"] for line in runs[2:]} == {best}
    for line in runs[1:]:
        assert line["steps"] == count_steps(line["planned_seconds"], line["price"], line["fixed_s"])
        assert line["images_per_s"] == pytest.approx(8 * line["steps"] / line["seconds"], rel=1e-2)
    assert runs[0]["price"] == runs[2]["price"] != runs[3]["price"]
    assert [line["contender"] for line in lines("price")] == ["dit", "sd_dit"], "contenders are priced once"
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert runs[3]["gradient_ratios"]["discriminative_gradient_ratio"] > 0
    assert runs[2]["gradient_ratios"] == {}
    assert len(runs[2]["figures"]["probe"]["blocks"]) == 1
    for name in ("FD-lite0", "KID-lite0", "FD-PCA", "agreement"):
        assert list(runs[3]["figures"][name]) == ["1.5"]
        assert runs[3]["figures"][name]["1.5"]["n"] == 24
        assert runs[0]["figures"][name]["1.5"]["n"] == 16

    record = json.loads((tmp_path / "r.json").read_text())
    assert record["benchmark"] == CONVERGENCE.benchmark
    assert record["settings"]["batch"] == 8
    assert record["settings"]["dtype"] == "fp32"
    assert [row["points"][-1]["step"] for row in record["rows"]] == [row["steps"] for row in record["rows"]]
    assert len(record["rows"][1]["points"]) <= 4, "the points of the killed attempt are not in it"
    assert "\n".join(convergence_lines(record)) in ended.text
    assert str(tmp_path) not in "\n".join(convergence_lines(record))

    late = run([*command, "--budget", "0.1"], tmp_path / "third.log").succeeded()
    assert lines("run") == runs
    assert "contenders: dit, lr" in late.text
    assert "not begun, for it needs" in late.text
    assert "2 runs remain, and the same command with the same --journal goes on: contenders: dit" in late.text
    assert len(lines("plan")[-1]["remaining"]) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "no_such_data"], ["no_such_data"]),
        (["--data", "synthetic:3x8x8:2:10"], ["--data synthetic", "images or latents"]),
        (["--data", "no_such.tar.gz"], ["no_such.tar.gz", "--pack"]),
        (["--rates", "fast"], ["--rates fast", "commas"]),
        (["--rates", "0"], ["--rates 0", "above 0"]),
        (["--seconds", "0"], ["--seconds", "above 0"]),
        (["--samples", "1"], ["--samples 1", "at least 2"]),
        (["--patch", "5"], ["data.size", "28", "model.patch (5)"]),
        (["--warmup", "2"], ["--warmup", "share"]),
        (["--contenders", "gan"], ["--contenders gan", "sd_dit", "all"]),
        (["--contender_rates", "2"], ["--contender_rates 2", "odd"]),
        (["--extend", "-1"], ["--extend -1", "at least 0"]),
        (["--unit", "hours"], ["--unit hours", "steps"]),
        (["--preset", "slow"], ["--preset slow", "quickstart"]),
        (["--reference", "no_such_data"], ["no_such_data"]),
        (["--contender", '["wide"]'], ["--contender wide", "NAME=FLAGS"]),
        (["--contender", '["wide=--model.widht 64"]'], ["model.widht", "model.width"]),
        (["--model", "M"], ["model.size", "XL"]),
        (["--journal", "/dev/null/x"], ["--journal", "/dev/null/x"]),
        (["--json", "/dev/null/x"], ["--json", "/dev/null/x"]),
        (["--step", "3"], ["--step"]),
    ],
)
def test_bad_input_is_one_line(argv, words):
    with pytest.raises(UserError) as caught:
        convergence._benchmark([*COMMAND, *argv])
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_bad_input_ends_with_code_2():
    ended = forked("--rates", "fast", program="convergence")
    assert ended.code == 2
    assert ended.text.strip() == "error: --rates fast: give numbers with commas between them"


def test_a_budget_of_plain_steps_buys_equal_time():
    args = parsed("--unit", "steps", "--preset", "quickstart")
    with opened("fashion_mnist", None) as (_, data):
        plan, configs = convergence._plan(args, data)
    assert (configs["dit"].model.patch, configs["dit"].batch, configs["dit"].noise.name) == (7, 8, "flow")
    runner = object.__new__(convergence_runner.Runner)
    runner.plan = plan
    run = plan.runs([])[0]
    plain, own = (convergence_runner.Price(step, fixed, 10, 0.0) for step, fixed in ((0.5, 0.0), (1.0, 40.0)))
    timed = [replace(run, budget=300.0, phase=phase) for phase in ("contenders", "equal steps")]
    assert [runner._steps(each, plain, plain) for each in timed] == [300, 300]
    assert [runner._steps(each, own, plain) for each in timed] == [110, 300]


def test_the_wide_control_has_as_many_parameters():
    args = parsed(
        "--contenders", "sd_dit,wide,psi_align", "--common", "--model.depth 2 --model.width 32 --model.heads 2"
    )
    with opened("fashion_mnist", None) as (_, data):
        _, configs = convergence._plan(args, data)
        counts = {name: convergence._count_parameters(config, data) for name, config in configs.items()}
    assert counts["wide"] == pytest.approx(max(counts["sd_dit"], counts["psi_align"]), rel=0.01)
    assert counts["dit"] < counts["sd_dit"]


def test_a_separate_reference_must_fit(tmp_path):
    pixels, labels = np.zeros((8, 14, 14), np.uint8), np.arange(8) % 2
    small, other = shard(tmp_path / "a.tar", pixels, labels), shard(tmp_path / "b.tar", pixels, np.arange(8))
    with pytest.raises(UserError, match=r"--reference .*8 classes.* of 2;"):
        convergence._benchmark([*COMMAND, "--data", small, "--reference", other])


# -- data --


def shard(path, pixels, labels):
    """Write images (n, H, W) or (n, H, W, 3) as PNGs into one shard."""

    def samples():
        for i, (image, label) in enumerate(zip(pixels, labels)):
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "PNG")
            yield f"{i:03d}", {"png": encoded.getvalue(), "cls": str(label).encode()}

    write_shard(path, samples())
    return str(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_decoded_images_are_exact(tmp_path, monkeypatch, channels):
    """Train and judge on the images' own levels, also without DALI; mirrored views are mirrored images."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (20, 6, 8, 3)[: 3 + (channels == 3)], dtype=np.uint8)
    labels = generator.permutation(20) % 4
    with opened(shard(tmp_path / "a.tar", pixels, labels), None) as (source, described):
        assert described.shape == (channels, 6, 8)
        with at_hand(source, described) as data:
            x, y, _ = read_samples(data, DataConfig(), 20, CPU)
            latents = convergence_runner.run_config(parsed("--patch", "2", "--flip", "true"), data, "", 1e-3, 0, 10)
            loader = run_parts.build_loader(
                latents, run_parts.open_data(latents), batch=20, rank=0, world=1, device=CPU, cache="device"
            )
            mirrored, _ = next(loader)
    wanted = torch.from_numpy(pixels.reshape(20, 6, 8, channels)).permute(0, 3, 1, 2)
    order = torch.tensor([int((wanted.float() / 127.5 - 1 - one).flatten(1).abs().amax(1).argmin()) for one in x])
    assert sorted(order.tolist()) == list(range(20))
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), wanted[order])
    assert (x - (wanted[order].float() - 127.5) / 127.5).abs().max() < 1e-6
    assert y.tolist() == labels[order].tolist()
    both = [
        [float((view / 127.5 - 1 - one).abs().max()) for view in (w, w.flip(-1))] for one in mirrored for w in wanted
    ]
    found = [min(pair) < 1e-5 for pair in both]
    assert sum(found) == 20
    assert any(pair[1] < 1e-5 < pair[0] for pair in both)


def test_packed_images_come_back(tmp_path):
    ramp = np.linspace(0, 200, 8 * 8 * 3).reshape(8, 8, 3)
    pixels = np.stack([np.clip(ramp + shade, 0, 255) for shade in range(0, 48, 4)]).astype(np.uint8)
    name = shard(tmp_path / "a.tar", pixels, range(12))
    packed = tmp_path / "packed.tar.gz"
    assert pack(name, packed) == (12, packed.stat().st_size)
    with opened(str(packed), None) as (source, described), at_hand(source, described) as data:
        assert (data.name, data.n, data.classes, data.pictures) == ("packed.tar.gz", 12, 12, True)
        x, y, _ = read_samples(data, DataConfig(), 12, CPU)
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2)[y]
    assert ((x + 1) * 127.5 - wanted).abs().mean() < 3


# -- judges --


def reference(n=36, pictures=True):
    """Return two sets of as many random images of three classes, each class with its own brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * n) % 3
    images = 0.1 * torch.randn(2 * n, 1, 4, 4, generator=generator) + (labels[:, None, None, None] - 1) * 0.5
    return Reference(images[:n], labels[:n], images[n:], labels[n:], pictures=pictures, classes=3, checksum=0)


def sampled(real, samples, labels):
    with opened("fashion_mnist", None) as (_, data):
        config = convergence_runner.run_config(parsed(), data, "", 1e-3, 0, 10)
    network = run_parts.build_network(config, run_parts.Shape(1, 28, 28, real.classes))
    return Sampled(network, config, {"1": samples}, labels, 0)


@pytest.mark.parametrize(
    ("judge", "names", "n"),
    [
        ("judge_pixels", ["FD-PCA"], 300),
        ("judge_agreement", ["agreement"], 300),
        ("judge_features", ["FD-lite0", "KID-lite0"], 12),
    ],
)
def test_figures_of_real_images_are_the_floors(judge, names, n):
    """Other real images in the samples' place have the floors; worse samples have worse figures."""
    real, judge = reference(n), getattr(convergence_judges, judge)
    good = judge(sampled(real, real.others, real.other_labels), real)
    bad = judge(sampled(real, (0.4 * real.others + 0.4).clamp(-1, 1), 0 * real.other_labels), real)
    assert list(good) == names
    for name in names:
        assert good[name]["1"]["value"] == pytest.approx(good[name]["1"]["floor"], rel=1e-6, abs=1e-9), name
        assert good[name]["1"]["n"] == good[name]["1"]["n_real"] == good[name]["1"]["n_floor"] == n
        fine, poor = good[name]["1"]["value"], bad[name]["1"]["value"]
        assert poor < 0.5 * fine if name == "agreement" else poor > fine


def test_pixel_distance_is_of_whitened_components():
    """Shifted by one standard deviation along each of the components, images are as many away."""
    images = torch.randn(5000, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[:, :, 0] *= 10
    pixels = Pixels.of(images)
    assert pixels.distance(images) == pytest.approx(0, abs=1e-9)
    shift = torch.linalg.pinv(pixels.basis).sum(0).view(1, 3, 3)
    assert pixels.distance(images + shift) == pytest.approx(9, rel=1e-6)
    flat = torch.cat([images, torch.ones(5000, 1, 3, 3)], dim=2)
    assert Pixels.of(flat).basis.shape == (18, 9), "constant pixels have no component"


def test_the_probe_reads_classes_from_tokens():
    """Features that are a class's own are classified; noise is not; blocks are told apart."""
    generator = torch.Generator().manual_seed(0)
    y, z_labels = torch.arange(300) % 3, torch.arange(90) % 3
    told = [10 * torch.nn.functional.one_hot(labels, 8) for labels in (y, z_labels)]
    noise = [torch.randn(len(labels), 8, generator=generator) for labels in (y, z_labels)]
    assert probe_accuracy(told[0] + noise[0], y, told[1] + noise[1], z_labels) == 1
    assert probe_accuracy(noise[0], y, noise[1], z_labels) < 0.6

    real = reference(60)
    run = sampled(real, real.others, real.other_labels)
    network = run_parts.build_network(run.config, run_parts.Shape(1, 14, 14, 3)).eval()
    torch.nn.init.normal_(network.adaln.weight, std=0.2)
    images = torch.nn.functional.interpolate(real.images, scale_factor=3.5)
    (features,) = block_features(network, run_parts.build_noise(run.config), images, null_label=3)
    noise, stream = run_parts.build_noise(run.config), []
    network.head.register_forward_hook(lambda _, args, out: stream.append(out[0]))
    level = noise.at_quantile(torch.tensor(0.2)).expand(60)
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    network(*noise.network_input(noise.add_noise(images, eps, level), level), torch.full((60,), 3))
    assert torch.allclose(features, stream[0].mean(1), atol=1e-5)
    assert features.std(0).min() > 0


def test_losses_are_compared_by_plain_dits_process():
    """A run with another law or weighting of noise levels has the loss of the same network under plain DiT's."""
    with opened("fashion_mnist", None) as (_, data):
        plain, own = (
            convergence_runner.run_config(parsed(), data, flags, 1e-3, 0, 10)
            for flags in ("", "--noise.flow.weighting x0 --noise.flow.mean 0.5")
        )
    network = run_parts.build_network(plain, run_parts.Shape(1, 28, 28, 10))
    images, labels = torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64)
    real = Reference(images, labels, images, labels, True, 10, 0, noise=run_parts.build_noise(plain))
    found = [convergence_judges.judge_loss(Sampled(network, config, {}, labels, 0), real) for config in (plain, own)]
    assert found[0] == found[1]
    real.noise = None
    assert convergence_judges.judge_loss(Sampled(network, own, {}, labels, 0), real) != found[0]


def test_judges_that_do_not_apply_say_why(monkeypatch):
    def missing(*_):
        raise UserError("needs a package")

    real = reference(8)
    monkeypatch.setattr(convergence_judges, "feature_net", missing)
    run = sampled(real, real.others, real.other_labels)
    assert convergence_judges.judge_features(run, real) == {"FD-lite0": {"skipped": "needs a package"}}
    latents = reference(8, pictures=False)
    assert "no pictures" in convergence_judges.judge_features(run, latents)["FD-lite0"]["skipped"]
    assert "small pictures" in convergence_judges.judge_agreement(run, latents)["agreement"]["skipped"]


def test_samples_are_levels_and_the_same_for_every_run():
    with opened("fashion_mnist", None) as (_, data):
        config = convergence_runner.run_config(parsed(), data, "", 1e-3, 0, 10)
    network = run_parts.build_network(config, run_parts.Shape(1, 28, 28, 10)).eval()
    images, labels = torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64)
    real = Reference(images, labels, images, labels, pictures=True, classes=10, checksum=0)
    run = convergence_judges.draw(network, config, real, 12, [1.0, 2.0])
    more = convergence_judges.draw(network, config, real, 14, [2.0])
    assert list(run.samples) == ["1", "2"]
    assert torch.equal(run.samples["2"], more.samples["2"][:12])
    assert run.labels.tolist() == [*range(10), 0, 1]
    levels = (run.samples["1"] + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    torch.nn.init.constant_(network.head.bias, math.nan)
    broken = convergence_judges.draw(network, config, real, 2, [1.0])
    assert broken.nonfinite == 2
    assert broken.samples["1"].isfinite().all()


def test_sampling_is_counted():
    with opened("fashion_mnist", None) as (_, data):
        config = convergence_runner.run_config(parsed("--common", ""), data, "", 1e-3, 0, 10)
    network = run_parts.build_network(config, run_parts.Shape(1, 28, 28, 10))
    once = count_sampling(network, config, 1, [1.0]) / 3  # two steps by Heun's method call the network three times
    assert once == pytest.approx(flops_per_image(network) / 3, rel=0.2)
    assert count_sampling(network, config, 10, [1.0, 1.5]) == pytest.approx(3 * 10 * 3 * once)


# -- the record --


def row(phase, contender, value, lr=2e-3, seed=0, machine="GPU a1", **more):
    figures = {"FD-lite0": {"1": {"value": value, "floor": 3.0, "n": 9}}, "FD-PCA": {"1": {"value": 2 * value}}}
    figures |= {"probe": {"value": 0.8, "n": 9, "blocks": [0.5, 0.8]}}
    return {
        "what": "run", "asked": [phase, contender, lr, seed], "phase": phase, "contender": contender, "lr": lr,
        "seed": seed, "steps": 7, "seconds": 54.9, "planned_seconds": 55.0, "images_per_s": 8123.0, "machine": machine,
        "began": 1.0, "build_s": 2.0, "figures": {"loss": {"value": 0.25, "n": 9}, **figures}, "sampling_s": 4.0,
        "judging_s": 1.0, "sampling_flops": 8e14, "samples": 9, **more,
    }  # fmt: skip


def table(*rows):
    return "\n".join(convergence_lines(convergence_record(rows)))


def test_the_table_shows_contenders_sweeps_and_edges():
    rates = [row("rates", "dit", value, lr) for value, lr in ((9.0, 1e-3), (8.0, 2e-3), (10.0, 4e-3))]
    text = table(*rates)
    assert "| FD-lite0 at learning rate | 0.001 | 0.002 | 0.004 |" in text
    assert "| dit                       | 9.0   | 8.0   | 10.0  |" in text
    assert "edge" not in text
    runs = [row("contenders", "dit", value, seed=seed) for seed, value in enumerate((8.5, 8.25))]
    runs += [row("contenders", "a", 7.0, 4e-3, gradient_ratios={"gradient_ratio": 0.11})]
    sweep = [row("rates", "a", value, lr) for value, lr in ((7.0, 2e-3), (6.0, 4e-3))]
    lines = table(*rates, *sweep, *runs, row("equal steps", "a", 6.5, 4e-3)).splitlines()
    assert "FD-lite0, guidance 1 (floor 3.0)" in lines[0]
    assert "FD-lite0, guidance 1, equal steps" in lines[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert cells[0][:4] == ["dit", "0.002", "7", "8.5 8.2"]
    assert cells[1][:4] == ["a", "0.004*", "7", "7.0"]
    assert {"6.5", "13.00", "structure 0.11", "80.0% (2 of 2)"} <= set(cells[1])
    assert "- * The best learning rate lies at an edge of those tried, a better one may lie beyond: a (0.004)." in lines
    text = table(*rates, row("contenders", "dit", 1, seconds=50.0))
    assert "missed the planned ones by up to 9%" in text
    failed = row("rates", "dit", 0.0, 8e-3, failed="diverged at step 9")
    del failed["figures"]
    assert "Failed: dit at 0.008, seed 0 (diverged at step 9)." in table(*rates, failed)
    assert "| 10.0  | failed |" in table(*rates, failed)
    assert table() == "No run is finished yet."


def test_the_verdict_takes_both_distances_and_all_seeds(tmp_path):
    dit = [row("contenders", "dit", 10.0), row("contenders", "dit", 10.0, seed=1)]
    better = [row("contenders", "a", 8.0), row("contenders", "a", 8.9, seed=1)]
    assert "a against dit: FD-lite0 -20% -11%, FD-PCA -20% -11%; pays" in table(*dit, *better)
    assert "for all 2 seeds" in table(*dit, *better)
    close = row("contenders", "a", 9.5, seed=1)
    assert "FD-lite0 -20% -5%, FD-PCA -20% -5%; does not pay" in table(*dit, better[0], close)
    equal_steps = row("equal steps", "a", 9.9)
    assert "pays: both" in table(*dit, *better, equal_steps), "equal steps do not decide"
    record = {"device": "a machine", **convergence_record([*dit, *better])}
    write_chart(record, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
    better[0]["figures"]["FD-lite0"] = {"skipped": "needs a package"}
    text = table(*dit, *better)
    assert "undecided" in text
    assert "FD-lite0 was not measured: needs a package." in text
