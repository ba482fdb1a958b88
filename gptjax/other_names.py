"""What the flags of nanoGPT and of Hugging Face's Trainer are called here, for those who know them.

A value with a space is no name of ours: it says what there is instead.
"""

from typing import Any

NANOGPT = {
    "out_dir": "run_dir",
    "dataset": "data.dir",
    "max_iters": "max_steps",
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "lr_decay_steps",
    "eval_iters": "eval_batches",
    "start": "prompt",
    "decay_lr": "a constant rate is --min-lr equal to --learning-rate",
    "eval_only": "there is `gptjax evaluate`",
    "always_save_checkpoint": "each evaluation saves; --save-interval sets another pace",
    "compile": "everything is compiled",
    "backend": "JAX needs none; see --strategy and --device",
    "wandb_log": "metrics.jsonl has the numbers, a gptjax.Callback can send them",
}

NANOGPT_DEFAULTS: dict[str, Any] = {
    "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "batch_size": 12,
    "gradient_accumulation_steps": 40, "block_size": 1024, "n_layer": 12, "n_head": 12,
    "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "max_iters": 600_000,
    "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "warmup_iters": 2000,
    "lr_decay_iters": 600_000, "min_lr": 6e-5,
}  # fmt: skip
"""Of its train.py."""

HUGGING_FACE = {
    "output_dir": "run_dir",
    "model_name_or_path": "init_from",
    "train_file": "data.source",
    "dataset_name": "data.source",
    "validation_split_percentage": "data.val_fraction",
    "per_device_train_batch_size": "batch_size",
    "logging_steps": "log_interval",
    "eval_steps": "eval_interval",
    "save_steps": "save_interval",
    "save_total_limit": "keep_checkpoints",
    "max_grad_norm": "grad_clip",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "resume_from_checkpoint": "run_dir",
    "gradient_checkpointing": "compute.remat",
    "num_train_epochs": "a run is counted in steps, --max-steps",
    "bf16": "there is --model.dtype bfloat16",
    "max_length": "max_new_tokens",
    "num_return_sequences": "num_samples",
    "do_sample": "--temperature 0 always takes the likeliest token",
}

SHORT = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "layers": "n_layer",
    "heads": "n_head",
    "context_length": "block_size",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "epochs": "a run is counted in steps, --max-steps",
    "num_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "length": "max_new_tokens",
    "model": "a run is named by its folder, RUN or --run-dir",
}


def hint(name: str, known: set[str]) -> str:
    """Of another program's flag: ": nanoGPT's is --max-steps here", or nothing. `known`: the names
    of this command's flags, whole and last parts."""
    for program, names in ("nanoGPT's ", NANOGPT), ("Hugging Face's ", HUGGING_FACE), ("", SHORT):
        ours = names.get(name, "")
        if " " in ours:
            return f": {ours}"
        if ours in known:
            return f": {program or 'it '}is --{ours.replace('_', '-')} here"
    return ""
