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
from convergence_plan import count_steps, first_value
from convergence_tables import CONVERGENCE, convergence_lines, convergence_record
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
    ended = run(python("tests/programs/train_contender.py", *TINY, *same, *flags), tmp_path / "log").succeeded()
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
        (["--rates", "nan"], ["--rates nan", "finite"]),
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


def test_a_record_is_not_taken_for_a_journal(tmp_path):
    """Leave a file alone that was written by --json."""
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"benchmark": "convergence", "rows": [1, 2, 3]}, indent=1))
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds no measurements"):
        convergence.Journal(path)
    assert path.read_bytes() == before


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
