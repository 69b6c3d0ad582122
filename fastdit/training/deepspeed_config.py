"""Merge a DeepSpeed file with a run's settings. The file takes precedence, and a contradiction is an error."""

import json
from dataclasses import dataclass
from pathlib import Path

from fastdit.config import Config
from fastdit.errors import UserError
from fastdit.training.deepspeed_sections import check_sections

SHIPPED = Path(__file__).parents[1] / "ds_configs"
FP32 = ("fp32", "float32", "float", "torch.float32")  # DeepSpeed accepts these spellings


@dataclass(frozen=True)
class DeepSpeedConfig:
    """Hold the values that the DeepSpeed file and the settings agree on.

    Args:
        merged: the configuration that DeepSpeed gets.
        batch: global batch, in samples.
        micro_batch: samples of one rank's forward pass.
        accumulation: micro-batches that a rank accumulates in a step.
        precision: dtype of weights and activations, bf16 or fp32. It is bf16 where the setting is fp8.
        stage: ZeRO stage.
        clip: gradient norm to which the optimizer clips; 0 is off. None leaves norm and clipping to DeepSpeed.
    """

    merged: dict
    batch: int
    micro_batch: int
    accumulation: int
    precision: str
    stage: int
    clip: float | None


def make_deepspeed_config(config: Config, world: int, on_gpu: bool) -> DeepSpeedConfig:
    """Return `config.ds_config` merged with the settings for `world` ranks.

    Raises UserError when the file is missing, is not JSON, contradicts a setting, or holds what `check_sections`
    refuses.
    """
    # Read the file, and refuse what would have no effect.
    path, values = _read(config.ds_config)
    check_sections(path, values)

    def agree(key: str, setting: str, value, kind=int):
        """Return the file's number for `key`, or the setting's `value` if the file has none or "auto"."""
        in_file = values.get(key)
        if in_file is None or in_file == "auto":
            return value
        if isinstance(in_file, bool) or not isinstance(in_file, kind) or in_file < (kind is int):
            allowed = "a whole number from 1" if kind is int else "a number from 0"
            raise UserError(f'{path}: {key} is {in_file!r}; it must be {allowed}, or "auto"')
        if value is not None and in_file != value:
            raise UserError(f"{path}: {key} is {in_file}, but {setting} is {value}; change one, or drop it there")
        return in_file

    # Agree on batch sizes, clipping, precision and ZeRO stage.
    batch = agree("train_batch_size", "--batch", config.batch)
    micro = agree("train_micro_batch_size_per_gpu", "--micro_batch", config.micro_batch)
    accumulation = agree("gradient_accumulation_steps", "accumulation", None)
    batch, micro, accumulation = _solve(batch, micro, accumulation, world)
    clip = float(agree("gradient_clipping", "--grad_clip", config.grad_clip, int | float) or 0.0)
    bf16 = values.get("bf16", {}).get("enabled", "auto")
    if bf16 not in (True, False, "auto"):
        raise UserError(f'{path}: bf16.enabled is {bf16!r}; it must be true, false or "auto"')
    precision = _precision(path, bf16, config.precision, on_gpu)
    zero = values.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    if precision == "bf16" and stage == 0:
        raise UserError(f"{path}: ZeRO-0 cannot keep fp32 master weights for bf16; use zero1, or --precision fp32")

    if precision == "bf16":
        values = {"data_types": {"grad_accum_dtype": _accumulator(values, stage, accumulation)}, **values}

    # Decide who computes the gradient norm, and fill in the configuration.
    clips, skips_norm = _norms(path, values, precision, stage)
    merged = {
        "steps_per_print": 2**31,  # fastdit prints its own lines
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice in each micro-batch
        "zero_allow_untested_optimizer": True,  # AdamWEMA, which fastdit's tests run at every stage
        "zero_force_ds_cpu_optimizer": False,  # AdamWEMA runs on CPUs too, so offload need not replace it
        **values,
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if clips else clip,
        "bf16": {**values.get("bf16", {}), "enabled": precision == "bf16"},
    }
    if skips_norm:
        merged["zero_optimization"] = {**zero, "compute_grad_norm": False}
        merged["bf16"].setdefault("check_grad_overflow", False)  # it reads each gradient once more and waits
    return DeepSpeedConfig(merged, batch, micro, accumulation, precision, stage, clip if clips else None)


def _accumulator(values: dict, stage: int, accumulation: int) -> str:
    """Return the type in which bf16 gradients are accumulated: fp32, or bf16 under ZeRO-1 with one micro-batch.

    With one micro-batch, gradients are summed over ranks only, and DeepSpeed communicates in bf16 whatever this type
    is. Under ZeRO-1, fp32 would select another optimizer of DeepSpeed, which keeps all gradients in fp32, computes
    their norms and waits for the device. With offload, or
    a communication type in the file, the type is fp32 nevertheless.
    """
    only_ranks = stage == 1 and accumulation == 1 and values.get("communication_data_type") is None
    return "bf16" if only_ranks and not _offloads(values) else "fp32"


def _norms(path: str, values: dict, precision: str, stage: int) -> tuple[bool, bool]:
    """Return whether AdamWEMA computes the gradient norm and clips, and whether DeepSpeed then skips the norm.

    If `compute_grad_norm` is true in the file, both are left to DeepSpeed. Raises UserError if it is false and
    DeepSpeed cannot skip the norm, or if it is not a boolean.
    """
    in_file = values.get("zero_optimization", {}).get("compute_grad_norm")
    if in_file not in (None, True, False):
        raise UserError(f"{path}: zero_optimization.compute_grad_norm is {in_file!r}; it must be true or false")
    # Under ZeRO-3 a step is several updates, so that no update sees the whole norm. With offload DeepSpeed clips.
    one_update = stage < 3 and not _offloads(values)
    needs_norm = stage == 0 or (
        precision == "bf16" and stage == 1 and values["data_types"].get("grad_accum_dtype") in FP32
    )
    if in_file is False and (needs_norm or not one_update):
        raise UserError(
            f"{path}: zero_optimization.compute_grad_norm is false, which DeepSpeed has for ZeRO-1 and 2 only, without "
            "offload, and in bf16 with accumulation for ZeRO-2 only; drop it"
        )
    clips = one_update and in_file is not True
    return clips, clips and not needs_norm


def _offloads(values: dict) -> bool:
    """Return whether the file moves the optimizer's state off the device."""
    zero = values.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    return offload.get("device", "none") != "none" or bool(zero.get("cpu_offload")) or bool(zero.get("zenflow"))


def _read(name: str) -> tuple[str, dict]:
    """Return path and content of the shipped file `name`, or of the file at the path `name`. Raises UserError."""
    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    path = SHIPPED / f"{name}.json" if name in shipped else Path(name)
    if not path.is_file():
        raise UserError(f"--ds_config {name}: no such file; give a path or one of {', '.join(shipped)}")
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold one JSON object; see {SHIPPED / 'zero1.json'}")
    for section in ("fp16", "bf16", "data_types", "zero_optimization"):
        if not isinstance(values.get(section, {}), dict):
            raise UserError(f"{path}: section {section!r} must be an object; see {SHIPPED / 'zero1.json'}")
    return str(path), values


def _solve(batch, micro, accumulation, world) -> tuple[int, int, int]:
    """Return (batch, micro, accumulation) such that batch = micro * accumulation * world.

    What is None follows from the others; accumulation is 1 if it remains open. Raises UserError if there is no solution
    or both batches are None.
    """
    if batch is None and micro is None:
        raise UserError(
            "batch: not set; take a preset (--preset quickstart trains on images that ship with fastdit), or give "
            "--batch, or train_batch_size in the DeepSpeed file"
        )
    if batch is None:
        return micro * (accumulation or 1) * world, micro, accumulation or 1
    if micro is None:
        share = world * (accumulation or 1)
        if batch % share:
            raise UserError(
                f"batch: {batch} does not divide among {world} ranks x {accumulation or 1} accumulation steps; "
                "change one"
            )
        return batch, batch // share, accumulation or 1
    if batch % (micro * world) or (accumulation or batch // (micro * world)) * micro * world != batch:
        raise UserError(
            f"batch: {batch} is not micro_batch {micro} x {accumulation or 'n'} accumulation steps x {world} ranks; "
            "change one"
        )
    return batch, micro, batch // (micro * world)


def _precision(path: str, bf16: bool | str, setting: str, on_gpu: bool) -> str:
    """Return bf16 or fp32, from `bf16.enabled` of the file and the setting. Raises UserError if they contradict."""
    asked = "bf16" if setting == "fp8" else setting
    if bf16 == "auto":
        return asked if asked != "auto" else ("bf16" if on_gpu else "fp32")
    precision = "bf16" if bf16 else "fp32"
    if asked not in ("auto", precision):
        raise UserError(f"{path}: bf16.enabled is {str(bf16).lower()}, but --precision is {setting}; change one")
    return precision
