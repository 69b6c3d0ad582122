"""Answer flags of other trainers with fastdit's own: the original DiT, SiT, MaskDiT, EDM, diffusers and Lightning."""

import re

from fastdit.errors import UserError

# Flags of others, with underscores, by what to write instead.
_NAMES = {
    "--lr": "learning_rate base_lr blr lrate",
    "--steps, the number of optimizer steps (epochs x samples / batch)": "epochs num_epochs max_epochs train_epochs",
    "--steps": "max_steps num_steps max_train_steps total_steps total_iters iterations training_steps",
    "--data.size": "image_size img_size resolution input_size",
    "--batch": "global_batch_size train_batch_size batch_size total_batch_size",
    "--micro_batch": "batch_size_per_gpu batch_gpu per_device_train_batch_size micro_batch_size",
    "--micro_batch, which leaves the rest of --batch to be accumulated": "gradient_accumulation_steps accum_iter",
    "--data.threads": "num_workers workers dataloader_num_workers",
    "--sample.guidance": "cfg_scale guidance_scale cfg",
    "--sample.sampler": "sampling_method",
    "--sample.diffusion_form": "diffusion_form",
    "--sample.diffusion_norm": "diffusion_norm",
    "--sample.last_step_size": "last_step_size",
    "--sample.steps": "num_sampling_steps num_inference_steps sampling_steps",
    "--out": "results_dir output_dir out_dir outdir exp_dir log_dir logdir logging_dir save_dir workdir experiment",
    "--data.source": "data_path data_dir dataset dataset_name train_data_dir data_root feature_path data",
    "--data.classes": "num_classes n_classes class_num",
    "--data.autoencoder": "vae vae_path pretrained_vae_model_name_or_path",
    "--data.flip": "random_flip mirror hflip",
    "--init_from": "ckpt ckpt_path pretrained pretrained_model_name_or_path load_from finetune_from",
    "--resume, with the run's --out": "resume_from resume_from_checkpoint resume_ckpt resume_step",
    "--precision": "mixed_precision fp16 bf16 amp allow_tf32 tf32 dtype",
    "--seed": "global_seed random_seed",
    "--save_every": "ckpt_every checkpointing_steps save_steps save_interval snap",
    "--log_every": "print_freq log_interval logging_steps tick",
    "--sample_every": "sample_interval validation_steps sampling_every",
    "--eval.every": "eval_every eval_steps eval_interval",
    "--label_drop": "class_dropout_prob cfg_prob label_dropout uncond_prob dropout_prob",
    "--ema.decay": "ema_decay ema_rate ema",
    "--warmup": "warmup_steps lr_warmup_steps num_warmup_steps warmup_iters",
    "--schedule": "lr_scheduler lr_scheduler_type lr_schedule",
    "--grad_clip": "max_grad_norm clip_grad gradient_clip_val grad_norm",
    "--betas": "adam_beta1 adam_beta2 beta1 beta2",
    "--eps": "adam_epsilon adam_eps",
    "--weight_decay": "adam_weight_decay wd",
    "--ds_config": "deepspeed deepspeed_config zero_stage",
    "--model.grad_checkpoint blocks": "gradient_checkpointing use_checkpoint activation_checkpointing",
    "--model.qk_norm": "qk_norm use_qk_norm",
    "--model.depth": "num_layers n_layers",
    "--model.width": "hidden_size hidden_dim embed_dim",
    "--model.heads": "num_heads n_heads num_attention_heads",
    "--model.patch": "patch_size",
    "--sd_dit.mask_ratio": "mask_ratio",
    "--noise.name": "path_type prediction precond diffusion noise_schedule",
    "the launcher's --num_gpus: deepspeed --num_gpus N fastdit/train.py ...": "gpus num_gpus devices nproc_per_node",
    "--max_nonfinite": "skip_nan",
}
_OURS = {name: ours for ours, names in _NAMES.items() for name in names.split()}
_MODEL = re.compile(r"(?:DiT|SiT)-(S|B|L|XL)/(\d+)")


def ours(name: str) -> str | None:
    """Return what stands for another trainer's flag `name`, given without dashes in front, or None."""
    return _OURS.get(name.replace("-", "_").lower())


def check_model(argv: list[str]) -> None:
    """Raise UserError, with the flags to type, for `--model DiT-XL/2`."""
    for word, value in zip(argv, [*argv[1:], ""]):
        name, _, own = word.partition("=")
        if name == "--model" and (named := _MODEL.fullmatch(own or value)):
            raise UserError(f"--model {named[0]}: write --model.size {named[1]} --model.patch {named[2]}")
