"""Merge a DeepSpeed file with a run's settings. The file rules; a contradiction is an error."""

import json
from dataclasses import dataclass
from pathlib import Path

from fastdit.config import Config
from fastdit.errors import UserError

SHIPPED = Path(__file__).parents[1] / "ds_configs"
OURS = {
    "optimizer": "AdamW with weight averages is fastdit's own: remove it and use --lr, --betas, --eps, --weight_decay",
    "scheduler": "the schedule is fastdit's own: remove it and use --warmup, --schedule",
    "fp16": "fp16 is not supported: use bf16",
}
FP32 = ("fp32", "float32", "float", "torch.float32")  # as DeepSpeed spells it


@dataclass(frozen=True)
class DeepSpeedConfig:
    """Hold what the file and the settings agree on.

    Args:
        merged: the configuration that DeepSpeed gets.
        batch, micro_batch: samples of an optimizer step over all ranks, and of one rank's forward pass.
        accumulation: micro-batches of a rank in a step.
        precision: bf16 or fp32.
        stage: ZeRO stage.
        clip: largest gradient norm, by which the optimizer clips; 0 is off. None: DeepSpeed computes norm and clips.
    """

    merged: dict
    batch: int
    micro_batch: int
    accumulation: int
    precision: str
    stage: int
    clip: float | None


def make_deepspeed_config(config: Config, world: int, on_gpu: bool) -> DeepSpeedConfig:
    """Merge `config.ds_config` with the settings for `world` ranks.

    Raises UserError when the file is missing, is not JSON, holds a section that fastdit owns, or contradicts a setting.
    """
    path, values = _read(config.ds_config)
    for section, advice in OURS.items():
        held = values.get(section)
        if held and not (section == "fp16" and held.get("enabled") is False):
            raise UserError(f"{path}: section {section!r}: {advice}")

    def agree(key: str, setting: str, mine, kind=int):
        theirs = values.get(key)
        theirs = None if theirs == "auto" else theirs
        if theirs is not None and (isinstance(theirs, bool) or not isinstance(theirs, kind) or theirs < (kind is int)):
            wanted = "a whole number from 1" if kind is int else "a number from 0"
            raise UserError(f'{path}: {key} is {theirs!r}; it must be {wanted}, or "auto"')
        if theirs is not None and mine is not None and theirs != mine:
            raise UserError(f"{path}: {key} is {theirs}, but {setting} is {mine}; change one, or drop it there")
        return mine if theirs is None else theirs

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

    ours, normless = _norms(path, values, precision, stage)
    merged = {
        "steps_per_print": 2**31,  # fastdit prints its own lines
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice in a micro-batch
        "zero_allow_untested_optimizer": True,  # AdamWEMA; every stage is tested
        "zero_force_ds_cpu_optimizer": False,  # offload keeps AdamWEMA, which also runs on CPUs
        **values,
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if ours else clip,
        "bf16": {**values.get("bf16", {}), "enabled": precision == "bf16"},
    }
    if normless:
        merged["zero_optimization"] = {**zero, "compute_grad_norm": False}
        merged["bf16"].setdefault("check_grad_overflow", False)  # a pass over each gradient, and a wait
    return DeepSpeedConfig(merged, batch, micro, accumulation, precision, stage, clip if ours else None)


def _accumulator(values: dict, stage: int, accumulation: int) -> str:
    """The type in which bf16 gradients are added up: fp32.

    Under ZeRO-1 without accumulation only ranks are, by communication, which is in bf16 whatever stands here. There it
    is bf16: for fp32, DeepSpeed has an optimizer of its own, which keeps all gradients in fp32, takes their norms and
    waits for the device.
    """
    only_ranks = stage == 1 and accumulation == 1 and values.get("communication_data_type") is None
    return "bf16" if only_ranks and not _offloads(values) else "fp32"


def _norms(path: str, values: dict, precision: str, stage: int) -> tuple[bool, bool]:
    """Whether AdamWEMA takes the gradients' norm and clips; whether DeepSpeed then takes none.

    `compute_grad_norm` in the file: true leaves both to DeepSpeed; false is refused where DeepSpeed must take it.
    """
    wish = values.get("zero_optimization", {}).get("compute_grad_norm")
    if wish not in (None, True, False):
        raise UserError(f"{path}: zero_optimization.compute_grad_norm is {wish!r}; it must be true or false")
    at_once = stage < 3 and not _offloads(values)  # else a step is several updates, or DeepSpeed wants to clip
    needs_norm = stage == 0 or (
        precision == "bf16" and stage == 1 and values["data_types"].get("grad_accum_dtype") in FP32
    )
    if wish is False and (needs_norm or not at_once):
        raise UserError(
            f"{path}: zero_optimization.compute_grad_norm is false, which DeepSpeed has for ZeRO-1 and 2 only, without "
            "offload, and in bf16 with accumulation for ZeRO-2 only; drop it"
        )
    ours = at_once and wish is not True
    return ours, ours and not needs_norm


def _offloads(values: dict) -> bool:
    zero = values.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    return offload.get("device", "none") != "none" or bool(zero.get("cpu_offload")) or bool(zero.get("zenflow"))


def _read(name: str) -> tuple[str, dict]:
    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    path = SHIPPED / f"{name}.json" if name in shipped else Path(name)
    if not path.is_file():
        raise UserError(f"--ds_config {name}: no such file; give a path or one of {', '.join(shipped)}")
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold one JSON object; see {SHIPPED / 'zero1.json'}")
    for section in ("fp16", "bf16", "data_types", "zero_optimization"):
        if not isinstance(values.get(section, {}), dict):
            raise UserError(f"{path}: section {section!r} must be an object; see {SHIPPED / 'zero1.json'}")
    return str(path), values


def _solve(batch, micro, accumulation, world) -> tuple[int, int, int]:
    """batch = micro * accumulation * world, from any two, or from the batch alone."""
    if batch is None and micro is None:
        raise UserError("batch: not set; give --batch, or train_batch_size in the DeepSpeed file")
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


def _precision(path: str, bf16: bool | str, wanted: str, on_gpu: bool) -> str:
    if bf16 == "auto":
        return wanted if wanted != "auto" else ("bf16" if on_gpu else "fp32")
    precision = "bf16" if bf16 else "fp32"
    if wanted not in ("auto", precision):
        raise UserError(f"{path}: bf16.enabled is {str(bf16).lower()}, but --precision is {wanted}; change one")
    return precision
