"""Settings: presets and flags, what they mean together, and what a user reads when they are wrong."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdit.config import CONFIG_FILE, Config, DataConfig, ModelConfig, SampleConfig
from fastdit.errors import UserError
from fastdit.kernels.attention import BACKENDS
from fastdit.noise import DDPM, EDM
from fastdit.parser import dump, load, parse, presets
from fastdit.settings_help import COMMON

TRAIN = Path(__file__).parents[1] / "fastdit/train.py"


def complaint(*argv: str) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(UserError) as caught:
        parse(list(argv))
    text = str(caught.value)
    assert text
    assert "\n" not in text
    assert "functools" not in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    "argv",
    [
        ("--preset", "quickstart", "--lr", "3e-4"),
        ("--lr", "3e-4", "--preset", "quickstart"),
        ("--preset=quickstart", "--lr=3e-4"),
        ("--max_nonfinite", "3", "--lr=3e-4", "--preset=quickstart", "--seed", "0"),
    ],
)
def test_flags_override_a_preset_wherever_it_stands(argv):
    config = parse(list(argv))
    assert config == replace(parse(["--preset", "quickstart"]), lr=3e-4)
    assert (config.data.source, config.data.channels) == ("fashion_mnist", 1)


def test_a_flag_replaces_one_field_of_a_section_and_later_flags_win():
    config = parse(["--preset", "quickstart", "--model.depth", "3", "--lr", "1", "--lr", "2"])
    assert config.model == replace(parse(["--preset", "quickstart"]).model, depth=3)
    assert config.lr == 2


def test_a_second_preset_lies_over_the_first(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {depth: 3}\nlr: 1e-3\nout: '1e3'\n")
    config = parse(["--preset", "quickstart", "--preset", str(tmp_path / "mine.yaml")])
    assert config.model == replace(parse(["--preset", "quickstart"]).model, depth=3)
    assert (config.lr, config.out, config.data.channels) == (1e-3, "1e3", 1)


def test_pairs_and_none():
    config = parse(["--sample.interval", "[0.1,2]", "--data.size=[28,30]", "--batch=null", "--betas", "[0.8,0.9]"])
    assert config.sample.interval == (0.1, 2.0)
    assert config.data.size == (28, 30)
    assert config.betas == (0.8, 0.9)
    assert config.batch is None
    assert parse(["--preset", "quickstart", "--grad_clip", "null"]).grad_clip is None
    assert parse(["--data.size", "28"]).data.size == 28


@pytest.mark.parametrize("name", presets())
def test_shipped_presets_survive_dump_and_load(name, tmp_path):
    config = parse(["--preset", name])
    (tmp_path / CONFIG_FILE).write_text(dump(config))
    assert load(tmp_path / CONFIG_FILE) == config
    assert parse(["--preset", str(tmp_path / CONFIG_FILE)]) == config
    assert config.batch, "a preset should train without more flags"


NUMBERS = st.floats(0, 1e9, allow_nan=False)
CONFIGS = st.builds(
    Config,
    out=st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), max_size=12)
    | st.sampled_from(
        ["1e3", "null", "~", "on", "0x10", "12:30", " a", "#", "[1]", "{x}", "2020-01-01", "- a", "'", "!t"]
    ),
    resume=st.booleans(),
    init_from=st.none() | st.sampled_from(["1e3", "a b", "x.pt"]),
    precision=st.sampled_from(["auto", "bf16", "fp32"]),
    steps=st.integers(1, 10**9),
    batch=st.none() | st.integers(1, 10**6),
    lr=NUMBERS,
    eps=st.floats(0, 1, allow_subnormal=True),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    grad_clip=st.none() | NUMBERS,
    seed=st.integers(0, 2**63 - 1),
    data=st.builds(
        DataConfig,
        size=st.integers(1, 512).map(lambda n: 2 * n) | st.tuples(st.just(28), st.just(30)),
        classes=st.none() | st.integers(1, 10**4),
        latent_shift=st.floats(-1e3, 1e3),
    ),
    model=st.builds(ModelConfig, size=st.sampled_from("SBL"), depth=st.none() | st.integers(1, 50)),
    sample=st.builds(
        SampleConfig,
        sampler=st.sampled_from([None, "heun", "euler"]),
        interval=st.none() | st.tuples(st.floats(0, 1), st.floats(2, 1e6)),
        guided_channels=st.none() | st.integers(1, 3),
    ),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(CONFIGS)
def test_random_settings_survive_dump_and_load(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("dump") / CONFIG_FILE
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def test_a_resumed_run_reads_its_own_settings(tmp_path):
    saved = parse(["--preset", "quickstart", "--out", "elsewhere", "--model.depth", "3"])
    (tmp_path / CONFIG_FILE).write_text(dump(saved))
    expected = replace(saved, out=str(tmp_path), resume=True, steps=7)
    for argv in (
        ["--resume", "--out", str(tmp_path), "--steps", "7"],
        ["--steps", "7", f"--out={tmp_path}", "--resume=true"],
        ["--resume", "true", "--out", str(tmp_path), "--steps=7"],
    ):
        assert parse(argv) == expected
    assert parse(["--out", str(tmp_path)]).model.depth is None, "not without --resume"
    assert parse(["--resume", "false", "--out", str(tmp_path)]).model.depth is None
    over = parse(["--resume", "--out", str(tmp_path), "--preset", "quickstart"])
    assert over.model.depth != 3, "a preset that is named rules"


def test_resume_before_the_first_start_is_an_ordinary_start(tmp_path):
    config = parse(["--preset", "quickstart", "--resume", "--out", str(tmp_path)])
    assert config == replace(parse(["--preset", "quickstart"]), resume=True, out=str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--preset nope", ["--preset nope", "quickstart", "YAML"]),
        ("--preset", ["--preset", "quickstart"]),
        ("--lrr 3", ["--lrr", "no such setting", "--lr?"]),
        ("--weight-decay=0.1", ["--weight-decay:", "--weight_decay?"]),
        ("--model.pach 3", ["--model.pach", "--model.patch?"]),
        ("--qqqqqqqq 3", ["--qqqqqqqq", "--help"]),
        ("--pre quickstart", ["--pre:", "--preset?"]),
        ("--step 5", ["--step:", "--steps?"]),
        ("stray", ["stray", "--name value"]),
        ("--lr abc", ["lr:", "expected a number", "abc"]),
        ("--lr", ["--lr:", "expected a value"]),
        ("--steps 1.5", ["steps:", "expected a whole number", "1.5"]),
        ("--data.flip maybe", ["data.flip:", "expected true or false", "maybe"]),
        ("--model.size M", ["model.size:", "'S', 'B', 'L', 'XL'", "got M"]),
        ("--model.attention flsh", ["model.attention:", "'flash_attn'", "got flsh"]),
        ("--noise.name x", ["noise.name:", "'edm', 'ddpm', 'flow'", "got x"]),
        ("--method x", ["method:", "dit, sd_dit, sadm, psi_align", "joined by +", "x is not a method"]),
        ("--method sadm+gan", ["method:", "gan is not a method", "psi_align"]),
        ("--method sadm+sadm", ["method:", "names sadm twice"]),
        ("--method dit+sadm", ["method:", "dit and sadm cannot be joined", "each other method contains dit"]),
        ("--method psi_align+sd_dit", ["method:", "cannot be joined", "psi_align aligns the tokens of a plain DiT"]),
        ("--model.mlp_ratio -1", ["model.mlp_ratio:", "from 0.01 to 100", "-1"]),
        ("--model.mlp_ratio 0.01 --model.width 16 --model.heads 2", ["model.mlp_ratio:", "model.width (16)"]),
        ("--data.size 28,30", ["data.size:", "a whole number or [int, int]", "got 28,30"]),
        ("--betas [0.9]", ["betas:", "a pair [a, b]", "got [0.9]"]),
        ("--betas [0.9,1.1]", ["betas:", "from 0 to 0.999999", "1.1"]),
        ("--model nonsense", ["model:", "{name: value}", "nonsense"]),
        ("--steps 0", ["steps:", "at least 1", "0"]),
        ("--batch 0", ["batch:", "at least 1"]),
        ("--warmup -1", ["warmup:", "at least 0", "-1"]),
        ("--lr nan", ["lr:", "expected a number", "nan"]),
        ("--grad_clip=-1", ["grad_clip:", "at least 0"]),
        ("--label_drop 1.5", ["label_drop:", "from 0 to 1", "1.5"]),
        ("--max_nonfinite 0", ["max_nonfinite:", "at least 1"]),
        ("--ema.decay 1.5", ["ema.decay:", "from 0 to 1"]),
        ("--ema.std 0.5", ["ema.std:", "0.28"]),
        ("--data.threads 0", ["data.threads:", "at least 1"]),
        ("--data.size 30 --model.patch 4", ["data.size:", "30", "model.patch (4)", "change one"]),
        ("--data.size [28,30] --model.patch 4", ["data.size:", "30", "model.patch (4)"]),
        ("--data.size [0,28]", ["data.size:", "at least 1"]),
        ("--model.depth 0", ["model.depth:", "at least 1"]),
        ("--model.width 100 --model.heads 3", ["model.width:", "100", "model.heads (3)", "change one"]),
        ("--model.width 6 --model.heads 3", ["model.width:", "of 4"]),
        ("--sample.steps 0", ["sample.steps:", "at least 1"]),
        ("--sample.sampler ddim", ["sample.sampler:", "edm", "'ddim'", "heun, euler"]),
        ("--noise.name ddpm --sample.sampler heun", ["sample.sampler:", "ddpm, ddim"]),
        ("--noise.name ddpm --sample.steps 1001", ["sample.steps:", "1001", "noise.ddpm.steps", "1000"]),
        ("--sample.interval [2,0.1]", ["sample.interval:", "[2.0, 0.1]", "below"]),
        ("--sample.interval [0.1]", ["sample.interval:", "expected a pair [a, b] or null, got [0.1]"]),
        ("--sample.interval 1", ["sample.interval: expected a pair [a, b] or null, got 1"]),
        ("--steps=", ["steps: expected a whole number, got nothing"]),
        ("--sample.diffusion_form constant", ["sample.diffusion_form: constant", "--sampler euler_maruyama"]),
        (
            "--noise.name flow --sample.sampler full_heun --sample.last_step_size 0.1",
            ["sample.last_step_size: 0.1", "--sampler euler_maruyama"],
        ),
        ("--sample.guided_channels 4", ["sample.guided_channels:", "4", "3"]),
        ("--noise.edm.sigma_data -1", ["sigma_data", "positive"]),
        ("--noise.flow.law x", ["law", "logit_normal"]),
    ],
)
def test_each_mistake_is_one_line_that_names_the_field_and_the_remedy(argv, words):
    text = complaint(*argv.split())
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"steps: 3\nlrr: 2\n", ["lrr: no such setting", "lr?"]),
        (b"model: {pach: 3}", ["model.pach: no such setting", "model.patch?"]),
        (b"noise: {edm: {roh: 3}}", ["noise.edm.roh: no such setting", "noise.edm.rho?"]),
        (b"lr: abc", ["lr: expected a number"]),
        (b"lr: 1\nsteps: [", ["cannot be read", "line 2"]),
        (b"lr: 1\nsteps: 3\nlr: 2", ["cannot be read", "lr is given twice, on line 1 and on line 3"]),
        (b"model:\n  depth: 3\n  depth: 4", ["depth is given twice, on line 2 and on line 3"]),
        (b"<<: {lr: 1}\n<<: {lr: 2}\nstepss: 1", ["stepss: no such setting"]),
        (b"model: {depth: 3, depth: 4}", ["depth is given twice"]),
        (b"? [lr, steps]\n: 3\n", []),
        (b"\xff\xfe\x00", ["cannot be read", "utf-8"]),
        (b"hello", ["name: value"]),
        (b"- 1\n- 2\n", ["name: value"]),
        (b"", ["name: value"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file(content, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as loading:
        load(path)
    text = complaint("--preset", str(path))
    assert str(loading.value) == text
    assert [word for word in [f"{path}: ", *words] if word not in text] == [], text


def test_a_missing_config_file(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path / CONFIG_FILE}: cannot be read .*; give a run"):
        load(tmp_path / CONFIG_FILE)


def test_an_empty_section_of_a_file_is_no_change(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 9\nmodel:\n")
    assert parse(["--preset", str(tmp_path / "mine.yaml")]) == Config(steps=9)


def test_every_attention_backend_can_be_asked_for():
    names = get_args(get_type_hints(ModelConfig)["attention"])
    assert set(names) == {"auto", *BACKENDS}


def test_dims_follow_the_size_unless_overridden():
    assert ModelConfig(size="XL").dims() == {"depth": 28, "width": 1152, "heads": 16}
    assert ModelConfig(size="S", heads=3).dims() == {"depth": 12, "width": 384, "heads": 3}


def test_the_chosen_process_has_its_settings():
    config = parse(["--noise.name=ddpm", "--noise.ddpm.steps=500", "--noise.edm.rho=5", "--sample.steps=500"])
    assert config.noise.ddpm == DDPM(steps=500)
    assert config.noise.edm == EDM(rho=5)


@pytest.mark.parametrize(
    ("name", "written"),
    [("sadm+sd_dit", "sd_dit+sadm"), ("sadm+psi_align", "psi_align+sadm"), ("psi_align+sadm", "psi_align+sadm")],
)
def test_methods_are_joined_in_any_order(name, written):
    """A run's config.yaml and its checkpoints have one spelling of a combination."""
    assert parse(["--method", name]) == parse(["--method", written])
    assert parse(["--method", name]).method == written


def test_a_method_that_is_not_used_names_its_choices_too():
    assert Config().sd_dit.decoder == "split"
    assert parse(["--sd_dit.decoder_width", "64"]).sd_dit.decoder == "extra"


def all_fields(kind, prefix="") -> list[str]:
    names = []
    for field in fields(kind):
        names += all_fields(type(field.default), f"{prefix}{field.name}.") if is_dataclass(field.default) else []
        names += [] if is_dataclass(field.default) else [prefix + field.name]
    return names


def test_dump_holds_every_field():
    flat = yaml.safe_load(dump(Config()))
    assert flat.keys().isdisjoint({"trust", "dry_run"}), "they are for one command line"
    for name in set(all_fields(Config)) - {"trust", "dry_run"}:
        value = flat
        for part in name.split("."):
            value = value[part]


def shown_help(capsys, *words):
    with pytest.raises(SystemExit) as left:
        parse(list(words))
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help", "all"], ["--help=all"], ["--lr", "1", "-h", "all"]])
def test_help_lists_every_field(capsys, words):
    text = shown_help(capsys, *words)
    assert [name for name in all_fields(Config) if f"--{name}" not in text.split()] == []
    assert "probability of training a sample without its label" in " ".join(text.split())


def test_help_fits_two_screens_and_leads_to_the_rest(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown_help(capsys, "--help")
    lines = text.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 80
    assert text == shown_help(capsys, "--preset", "nonsense", "--help", "--lr", "1")
    assert [name for name in COMMON if not any(line.startswith(f"  --{name} ") for line in lines)] == []
    groups = re.findall(r"(\w+) \(\d+\)", text.partition("--help GROUP")[2])
    shown = [shown_help(capsys, "--help", group) for group in groups]
    assert "".join(shown) == shown_help(capsys, "--help", "all")


def test_help_of_a_group(capsys):
    assert "--noise.flow.mean (default: 0.0)" in shown_help(capsys, "--help", "noise.flow")
    assert "--noise.edm" not in shown_help(capsys, "--help", "noise.flow")
    assert "--precision {auto,bf16,fp8,fp32} (default: auto)" in shown_help(capsys, "--help", "run")
    with pytest.raises(UserError, match=r"^--help nois: no such group; choose one of all, run, data"):
        parse(["--help", "nois"])


def test_the_command_says_one_line_and_exits_with_2():
    answer = subprocess.run([sys.executable, TRAIN, "--lrr", "3"], capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.strip() == "error: --lrr: no such setting; did you mean --lr?"


@pytest.mark.parametrize(
    ("name", "preset", "size"),
    [("imagenet256_b2", "imagenet256", "B"), ("imagenet256_sd_dit_xl2", "imagenet256_sd_dit", "XL"),
     ("cifar10_s2", "cifar10", "S")],
)  # fmt: skip
def test_presets_of_one_size_are_known_under_their_old_names(capsys, name, preset, size):
    """Say what the name is now; flags beside it still rule."""
    assert parse(["--preset", name, "--lr", "3"]) == parse(["--preset", preset, "--model.size", size, "--lr", "3"])
    assert f"note: --preset {name} is now --preset {preset}" in capsys.readouterr().err
    assert parse(["--model.size", "L", "--preset", name]).model.size == "L"


@pytest.mark.parametrize(
    ("older", "current", "value"),
    [("data.standardise", "data.standardize", "channels"), ("sadm.normalise", "sadm.normalize", "mean")],
)
def test_settings_are_known_under_their_older_names(capsys, tmp_path, older, current, value):
    """Accept an older flag with a note, and older names in a run's config.yaml without one."""
    expected = parse([f"--{current}", value])
    for words in ([f"--{older}", value], [f"--{older}={value}"]):
        assert parse(words) == expected
        assert capsys.readouterr().err == f"note: --{older} is now --{current}\n"
    name = older.partition(".")[2]
    text = dump(expected).replace(f"{current.split('.')[1]}:", f"{name}:")
    assert f"{name}: {value}" in text
    (tmp_path / "config.yaml").write_text(text)
    assert load(tmp_path / "config.yaml") == expected
    assert capsys.readouterr().err == ""


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    out = ["--out", str(tmp_path)]
    for words in (["--resume", *out], [*out, "--resume"], ["--resume", *out, "--steps", "4", "--method=sadm"]):
        with pytest.raises(UserError, match="holds no run to resume"):
            parse(words)
    for data in (["--preset", "quickstart"], ["--preset=quickstart"], ["--data.source", "x"], ["--data.source=x"]):
        assert parse(["--resume", *out, *data]).resume, "a command that is to go on if it can"


def test_whole_numbers_may_have_a_power_of_ten():
    config = parse(["--steps", "1e5", "--batch=2.56e2", "--warmup", "5E3", "--lr", "1e-4", "--out", "1e5"])
    assert (config.steps, config.batch, config.warmup, config.lr, config.out) == (100_000, 256, 5000, 1e-4, "1e5")
    for wrong in ("1.5e0", "1e-3"):
        assert complaint("--steps", wrong).startswith("steps: expected a whole number, got")


def test_whole_numbers_of_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("steps: 1e5\nbatch: 2.56e+2\nwarmup: 5.0\ndata: {threads: 3.0}\n")
    config = load(path)
    assert (config.steps, config.batch, config.warmup, config.data.threads) == (100_000, 256, 5, 3)
    path.write_text("steps: 1.5\n")
    with pytest.raises(UserError, match=r"steps: expected a whole number, got 1\.5"):
        load(path)


def test_print_config_shows_what_would_run(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--preset", "quickstart", "--print_config", "--lr", "0.5"])
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["lr"], shown["model"]["patch"]) == (0.5, parse(["--preset", "quickstart"]).model.patch)


def test_a_file_of_settings_builds_on_others(tmp_path):
    (tmp_path / "base.yaml").write_text("preset: quickstart\nlr: 0.5\nseed: 3\n")
    (tmp_path / "mine.yaml").write_text("preset: base.yaml\nseed: 4\n")
    config = parse(["--preset", str(tmp_path / "mine.yaml"), "--warmup", "7"])
    assert config == replace(parse(["--preset", "quickstart"]), lr=0.5, seed=4, warmup=7)
    (tmp_path / "base.yaml").write_text("preset: mine.yaml\n")
    assert "builds on itself" in complaint("--preset", str(tmp_path / "mine.yaml"))
    (tmp_path / "base.yaml").write_text("preset: [1]\n")
    assert "preset: expected text" in complaint("--preset", str(tmp_path / "mine.yaml"))
    (tmp_path / "base.yaml").write_text("preset: nosuch\n")
    assert "--preset nosuch: no such preset" in complaint("--preset", str(tmp_path / "mine.yaml"))


def test_relative_paths_are_kept_for_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "shards"):
        Path(name).mkdir()
    Path("ds.json").write_text("{}")
    kept = yaml.safe_load(
        dump(parse(["--data.source", "photos", "--ds_config", "./ds.json", "--init_from", "gone.pt"]))
    )
    assert kept["data"]["source"] == str(tmp_path / "photos")
    assert kept["ds_config"] == str(tmp_path / "ds.json")
    assert kept["init_from"] == "gone.pt", "an error will name it as it was given"
    pattern = yaml.safe_load(dump(parse(["--data.source", "shards/a-{000..009}.tar"])))
    assert pattern["data"]["source"] == str(tmp_path / "shards/a-{000..009}.tar")
    Path("fashion_mnist").mkdir()
    shipped = yaml.safe_load(dump(parse([])))
    assert (shipped["data"]["source"], shipped["ds_config"]) == ("fashion_mnist", "zero1")


def test_guidance_without_a_null_label_is_said():
    assert parse(["--label_drop", "0", "--sample.guidance", "3"]).notes[0].startswith("note: --label_drop 0 trains no")
    assert parse(["--label_drop", "0", "--sample.guidance", "1"]).notes == []
    assert parse(["--sample.guidance", "3"]).notes == []
