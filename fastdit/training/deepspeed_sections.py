"""Refuse what a DeepSpeed file holds and fastdit cannot honor: unknown names, and sections without effect here.

DeepSpeed ignores unknown names at the top of its file, so that a misspelled section would train another way than asked.
"""

import difflib

from fastdit.errors import UserError
from fastdit.training.deepspeed_internals import zero_settings

# Names at the top of the file that have the effect that DeepSpeed's documentation says.
HONORED = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping steps_per_print
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer bf16 fp16 data_types
    communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op sparse_gradients
    disable_allgather disable_python_gc wall_clock_breakdown memory_breakdown dump_state log_level timers comms_logger
    flops_profiler use_node_local_storage dataloader_drop_last
""".split()  # noqa: SIM905

# Sections that must be missing, empty or not enabled, and what to do instead.
_MONITOR = "fastdit writes metrics.jsonl and TensorBoard itself: remove it"
_NOT_HERE = "fastdit does not support it: remove it"
REFUSED = {
    "optimizer": "AdamW with EMAs is fastdit's own: remove it and use --lr, --betas, --eps, --weight_decay",
    "scheduler": "the schedule is fastdit's own: remove it and use --warmup, --schedule",
    "fp16": "fp16 is not supported: use bf16",
    "amp": "apex's amp is not supported: use bf16",
    "torch_autocast": "fastdit casts nothing on the way: use bf16",
    "activation_checkpointing": "checkpointing is fastdit's own: remove it and use --model.grad_checkpoint blocks",
    "compile": "the kernels are fastdit's own: remove it",
    "checkpoint": "checkpoints are fastdit's own: remove it",
    "nebula": "checkpoints are fastdit's own: remove it",
    "elasticity": "a run can be resumed on any number of ranks without it: remove it",
    "aio": "states on NVMe are not supported: remove it and offload to the CPU",
    **dict.fromkeys(("wandb", "tensorboard", "csv_monitor", "comet"), _MONITOR),
    **dict.fromkeys(
        (
            "autotuning",
            "compression_training",
            "curriculum_learning",
            "data_efficiency",
            "eigenvalue",
            "expert_parallel",
            "hybrid_engine",
            "pipeline",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "tensor_parallel",
            "weight_quantization",
        ),
        _NOT_HERE,
    ),
}


def check_sections(path: str, values: dict) -> None:
    """Raise UserError for a name that DeepSpeed does not know, or a section that has no effect in fastdit.

    path: the file, for the message. values: its content.
    """
    # Check the names at the top, and refuse sections that would change something.
    for name, content in values.items():
        if name not in REFUSED:
            _check_name(path, name, [*HONORED, *REFUSED])
        elif content and not (isinstance(content, dict) and content.get("enabled") is False):
            raise UserError(f"{path}: section {name!r}: {REFUSED[name]}")

    # Check the names in the section of ZeRO, and that states stay in memory.
    zero = values.get("zero_optimization", {})
    for name in zero:
        _check_name(path, name, zero_settings(), "zero_optimization.")
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name)
        if isinstance(section, dict) and section.get("device") == "nvme":
            raise UserError(f"{path}: zero_optimization.{name}: {REFUSED['aio']}")


def _check_name(path: str, name: str, known: list[str], prefix: str = "") -> None:
    """Raise UserError, with the most similar name, if `name` is not known."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "remove it"
        raise UserError(f"{path}: {prefix}{name} is no setting of DeepSpeed; {remedy}")
