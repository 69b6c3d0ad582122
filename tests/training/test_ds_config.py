"""The DeepSpeed file and the settings: what they agree on, and what is refused."""

import json
from itertools import product

import pytest

from fastdit.config import Config
from fastdit.errors import UserError
from fastdit.training.deepspeed_config import SHIPPED, DeepSpeedConfig, make_deepspeed_config

NAMES = sorted(path.stem for path in SHIPPED.glob("*.json"))


@pytest.fixture
def agree(tmp_path):
    """agree(file's values, world=1, on_gpu=False, **settings): the plan."""

    def agree(values, world: int = 1, on_gpu: bool = False, **settings) -> DeepSpeedConfig:
        path = tmp_path / "mine.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return make_deepspeed_config(Config(ds_config=str(path), **settings), world, on_gpu)

    return agree


def refusal(agree, values, **settings) -> str:
    with pytest.raises(UserError) as caught:
        agree(values, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WAYS = list(product((False, True), (False, True), (False, True), ("file", "flags"), (1, 3)))


@pytest.mark.parametrize(("batch", "micro", "accumulation", "where", "world"), WAYS)
def test_any_sufficient_part_of_the_batch_gives_the_rest(agree, batch, micro, accumulation, where, world):
    """micro batch 4, accumulated 2 times; each of the three given or not. Accumulation is the file's alone."""
    values, settings = {}, {}
    for given, key, setting, value in (
        (batch, "train_batch_size", "batch", 8 * world),
        (micro, "train_micro_batch_size_per_gpu", "micro_batch", 4),
    ):
        if given and where == "file":
            values[key] = value
        elif given:
            settings[setting] = value
    if accumulation:
        values["gradient_accumulation_steps"] = 2
    if not batch and not micro:
        assert "batch: not set" in refusal(agree, values, world=world, **settings)
        return
    settings = agree(values, world=world, **settings)
    if batch and (micro or accumulation):
        expected = (8 * world, 4, 2)
    elif batch:
        expected = (8 * world, 8, 1)
    else:
        expected = (4 * world * (2 if accumulation else 1), 4, 2 if accumulation else 1)
    assert (settings.batch, settings.micro_batch, settings.accumulation) == expected
    assert settings.batch == settings.micro_batch * settings.accumulation * world
    assert settings.merged["train_batch_size"] == settings.batch
    assert settings.merged["train_micro_batch_size_per_gpu"] == settings.micro_batch
    assert settings.merged["gradient_accumulation_steps"] == settings.accumulation


@pytest.mark.parametrize(
    ("values", "settings", "words"),
    [
        ({"train_batch_size": 8}, {"batch": 16}, ["train_batch_size is 8", "--batch is 16", "change one"]),
        ({"train_micro_batch_size_per_gpu": 8}, {"micro_batch": 4, "batch": 8}, ["--micro_batch is 4"]),
        (
            {"gradient_clipping": 0.5},
            {"grad_clip": 1.0, "batch": 8},
            ["gradient_clipping is 0.5", "--grad_clip is 1.0"],
        ),
        ({}, {"batch": 9, "world": 2}, ["batch: 9", "2 ranks", "change one"]),
        ({"gradient_accumulation_steps": 3}, {"batch": 8}, ["batch: 8", "3 accumulation", "change one"]),
        ({"gradient_accumulation_steps": 3}, {"batch": 8, "micro_batch": 4}, ["batch: 8", "micro_batch 4", "3 acc"]),
        ({}, {"batch": 8, "micro_batch": 3}, ["batch: 8", "micro_batch 3", "change one"]),
        ({}, {"batch": 4, "micro_batch": 4, "world": 2}, ["batch: 4", "2 ranks"]),
        (
            {"bf16": {"enabled": True}},
            {"batch": 8, "precision": "fp32"},
            ["bf16.enabled is true", "--precision is fp32"],
        ),
        ({"bf16": {"enabled": False}}, {"batch": 8, "precision": "bf16"}, ["bf16.enabled is false", "is bf16"]),
        ({"bf16": {"enabled": False}}, {"batch": 8, "precision": "fp8"}, ["bf16.enabled is false", "is fp8"]),
    ],
)
def test_contradictions_name_both_sides(agree, values, settings, words):
    text = refusal(agree, values, **settings)
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'", "--lr", "--weight_decay"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "--warmup", "--schedule"]),
        ({"activation_checkpointing": {"profile": False}}, ["'activation_checkpointing'", "--model.grad_checkpoint"]),
        ({"fp16": {"enabled": True}}, ["'fp16'", "bf16"]),
        ({"wandb": {"enabled": True}}, ["'wandb'", "TensorBoard"]),
        ({"compile": {"backend": "inductor"}}, ["'compile'", "remove it"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["'tensor_parallel'", "does not support"]),
        ({"train_batch_sise": 64}, ["train_batch_sise is no setting", "train_batch_size?"]),
        ({"zero_optimisation": {"stage": 3}}, ["zero_optimisation is no setting", "zero_optimization?"]),
        ({"zero": {"stage": 3}}, ["zero is no setting of DeepSpeed"]),
        ({"xyzzy": 1}, ["xyzzy is no setting of DeepSpeed; remove it"]),
        ({"zero_optimization": {"stge": 3}}, ["zero_optimization.stge is no setting", "stage?"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["NVMe", "offload to the CPU"]),
        ({"fp16": {"loss_scale": 1}}, ["'fp16'", "bf16"]),
        ({"fp16": True}, ["'fp16'", "object"]),
        ({"bf16": True}, ["'bf16'", "object"]),
        ({"zero_optimization": 2}, ["'zero_optimization'", "object"]),
        ({"zero_optimization": {"stage": 4}}, ["stage is 4", "0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": "auto"}}, ["stage is 'auto'", "0, 1, 2 or 3"]),
        ({"zero_optimization": {"compute_grad_norm": "no"}}, ["compute_grad_norm is 'no'", "true or false"]),
        ({"data_types": "fp32"}, ["'data_types'", "object"]),
        ({"bf16": {"enabled": "yes"}}, ["bf16.enabled is 'yes'", "true, false"]),
        ({"train_batch_size": "64"}, ["train_batch_size is '64'", "whole number from 1"]),
        ({"train_batch_size": 0}, ["train_batch_size is 0", "whole number from 1"]),
        ({"train_batch_size": True}, ["train_batch_size is True", "whole number"]),
        ({"train_micro_batch_size_per_gpu": 1.5}, ["train_micro_batch_size_per_gpu is 1.5", "whole number"]),
        ({"gradient_accumulation_steps": -1}, ["gradient_accumulation_steps is -1", "whole number"]),
        ({"gradient_clipping": -1}, ["gradient_clipping is -1", "a number from 0"]),
        ("{", ["not valid JSON", "line 1"]),
        ("", ["not valid JSON"]),
        ("[1]", ["one JSON object", "zero1.json"]),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(agree, tmp_path, values, words):
    text = refusal(agree, values, batch=None if "batch_size" in str(values) else 8)
    assert [word for word in [f"{tmp_path / 'mine.json'}: ", *words] if word not in text] == [], text


def test_unknown_names_list_the_shipped_files():
    with pytest.raises(UserError, match="--ds_config zero9: no such file") as caught:
        make_deepspeed_config(Config(ds_config="zero9", batch=8), 1, False)
    assert ", ".join(NAMES) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_file_works_with_every_preset_like_batch(name):
    settings = make_deepspeed_config(Config(ds_config=name, batch=64, grad_clip=1.0), 2, False)
    assert (settings.batch, settings.micro_batch, settings.accumulation) == (64, 32, 1)
    assert settings.stage == int(name.removesuffix("_offload")[-1])
    assert settings.merged["zero_optimization"]["stage"] == settings.stage
    ours = settings.stage < 3
    assert (settings.clip, settings.merged["gradient_clipping"]) == ((1.0, 0.0) if ours else (None, 1.0))
    assert ("offload_optimizer" in settings.merged["zero_optimization"]) == name.endswith("_offload")


def test_auto_means_the_settings_decide(agree):
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
    settings = agree(auto, world=2, batch=8, micro_batch=2, grad_clip=0.5)
    assert settings == agree({}, world=2, batch=8, micro_batch=2, grad_clip=0.5)
    assert "auto" not in json.dumps(settings.merged)
    assert settings.clip == 0.5


def test_what_the_file_says_rules_and_the_rest_travels(agree):
    settings = agree(
        {"gradient_clipping": 1, "train_batch_size": 6, "wall_clock_breakdown": True, "fp16": {"enabled": False}}
    )
    assert settings.batch == 6
    assert settings.clip == 1.0
    assert settings.merged["wall_clock_breakdown"] is True
    assert agree({}, batch=2).clip == 0.0, "off unless asked for"
    assert agree({"gradient_clipping": 1}, batch=2, grad_clip=1.0).clip == 1.0
    assert settings.merged["timers"] == {"throughput": {"enabled": False}}
    timers = {"throughput": {"enabled": True, "synchronized": False}}
    assert agree({"timers": timers}, batch=2).merged["timers"] == timers


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
NORMS = [  # zero_optimization, precision, whether the optimizer takes the norm, what DeepSpeed is told
    ({"stage": 0}, "fp32", True, None),
    ({"stage": 1}, "fp32", True, False),
    ({"stage": 2}, "fp32", True, False),
    ({"stage": 1}, "bf16", True, False),
    ({"stage": 2}, "bf16", True, False),
    ({"stage": 3}, "fp32", False, None),
    ({"stage": 3}, "bf16", False, None),
    ({"stage": 1} | OFFLOAD, "fp32", False, None),
    ({"stage": 2} | OFFLOAD, "bf16", False, None),
    ({"stage": 3} | OFFLOAD, "fp32", False, None),
    ({"stage": 2, "cpu_offload": True}, "fp32", False, None),
    ({"stage": 2, "offload_optimizer": {"device": "none"}}, "fp32", True, False),
    ({"stage": 2, "offload_optimizer": None}, "fp32", True, False),
    ({"stage": 0, "compute_grad_norm": True}, "fp32", False, True),
    ({"stage": 1, "compute_grad_norm": True}, "fp32", False, True),
    ({"stage": 2, "compute_grad_norm": True}, "bf16", False, True),
    ({"stage": 2, "compute_grad_norm": False}, "bf16", True, False),
]


@pytest.mark.parametrize(("zero", "precision", "ours", "told"), NORMS)
def test_who_takes_the_norm_and_clips(agree, zero, precision, ours, told):
    for clip in (0.5, None):
        settings = agree({"zero_optimization": zero}, batch=8, precision=precision, grad_clip=clip)
        assert settings.clip == ((clip or 0.0) if ours else None)
        assert settings.merged["gradient_clipping"] == (0.0 if ours else clip or 0.0)
        assert settings.merged["zero_optimization"].get("compute_grad_norm") is told
        assert {**settings.merged["zero_optimization"], "compute_grad_norm": 0} == {**zero, "compute_grad_norm": 0}
        looks = None if told is not False else False
        assert settings.merged["bf16"].get("check_grad_overflow") is looks, "else DeepSpeed waits for the device"


@pytest.mark.parametrize(
    ("zero", "precision"),
    [({"stage": 0}, "fp32"), ({"stage": 1}, "bf16"), ({"stage": 3}, "fp32"), ({"stage": 2} | OFFLOAD, "fp32")],
)
def test_norms_that_deepspeed_cannot_do_without(agree, zero, precision):
    values = {"gradient_accumulation_steps": 2}
    assert agree(values | {"zero_optimization": zero}, batch=8, precision=precision).clip == (
        None if zero["stage"] > 1 else 0.0
    )
    values |= {"zero_optimization": {**zero, "compute_grad_norm": False}}
    text = refusal(agree, values, batch=8, precision=precision)
    assert "compute_grad_norm is false" in text
    assert "drop it" in text


@pytest.mark.parametrize(
    ("file", "wanted", "on_gpu", "expected"),
    [
        ({}, "auto", True, "bf16"),
        ({}, "auto", False, "fp32"),
        ({}, "fp32", True, "fp32"),
        ({}, "bf16", False, "bf16"),
        ({}, "fp8", True, "bf16"),
        ({"bf16": {"enabled": True}}, "fp8", True, "bf16"),
        ({"bf16": {"enabled": False}}, "auto", True, "fp32"),
        ({"bf16": {"enabled": True}}, "auto", False, "bf16"),
        ({"bf16": {"enabled": True}}, "bf16", True, "bf16"),
        ({"bf16": {"enabled": "auto"}}, "fp32", True, "fp32"),
        ({"bf16": {}}, "auto", True, "bf16"),
    ],
)
def test_precision(agree, file, wanted, on_gpu, expected):
    settings = agree({"zero_optimization": {"stage": 1}, **file}, on_gpu=on_gpu, batch=8, precision=wanted)
    assert settings.precision == expected
    assert settings.merged["bf16"]["enabled"] == (expected == "bf16")
    assert ("data_types" in settings.merged) == (expected == "bf16")


@pytest.mark.parametrize(
    ("zero", "more", "expected"),
    [
        ({"stage": 1}, {}, "bf16"),
        ({"stage": 1}, {"gradient_accumulation_steps": 2}, "fp32"),
        ({"stage": 1}, {"communication_data_type": "fp32"}, "fp32"),
        ({"stage": 1} | OFFLOAD, {}, "fp32"),
        ({"stage": 2}, {}, "fp32"),
        ({"stage": 3}, {}, "fp32"),
    ],
)
def test_gradients_are_added_up_in_fp32_where_anything_is(agree, zero, more, expected):
    for world in (1, 2):
        settings = agree({"zero_optimization": zero, **more}, world=world, batch=8, precision="bf16")
        assert settings.merged["data_types"] == {"grad_accum_dtype": expected}


def test_bf16_keeps_its_other_options(agree):
    types = {"grad_accum_dtype": "bf16"}
    options = {"immediate_grad_update": True, "check_grad_overflow": True}
    values = {"zero_optimization": {"stage": 1}, "bf16": options, "data_types": types}
    settings = agree(values, on_gpu=True, batch=8)
    assert settings.merged["bf16"] == options | {"enabled": True}
    assert settings.merged["data_types"] == types
    assert settings.merged["zero_optimization"]["compute_grad_norm"] is False, "nothing of DeepSpeed's needs it"


def test_bf16_needs_a_stage_with_fp32_masters(agree):
    text = refusal(agree, {}, on_gpu=True, batch=8)
    assert "ZeRO-0" in text
    assert "zero1" in text
    assert agree({}, on_gpu=True, batch=8, precision="fp32").stage == 0


def test_sections_that_are_off_are_left_alone(agree):
    """Files of other trainers have them; names of ZeRO-3 may have their prefix or not."""
    off = {name: {"enabled": False} for name in ("wandb", "fp16", "flops_profiler", "tensorboard")}
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 1000, "param_persistence_threshold": 10}
    merged = agree({**off, "zero_optimization": zero, "optimizer": {}, "wall_clock_breakdown": False}, batch=8).merged
    assert merged["zero_optimization"].items() >= zero.items()
    assert merged["wandb"] == {"enabled": False}
