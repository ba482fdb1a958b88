"""What the flags of nanoGPT and of Hugging Face's Trainer are called here, for those who know them.

A value with a space is no name of ours: it says what there is instead.
"""

from collections.abc import Iterable, Mapping
from typing import Any

NANOGPT = {
    "out_dir": "run_dir",
    "dataset": "data.dir",
    "max_iters": "max_steps",
    "warmup_iters": "optimizer.warmup_steps",
    "lr_decay_iters": "optimizer.lr_decay_steps",
    "eval_iters": "eval_batches",
    "start": "prompt",
    "decay_lr": "a constant rate is --min-lr equal to --learning-rate, and --warmup-steps 0",
    "eval_only": "there is `gptjax evaluate`",
    "always_save_checkpoint": "each evaluation saves; --save-interval sets another pace",
    "compile": "everything is compiled",
    "backend": "JAX needs none; see --strategy and --device",
    "wandb_log": "metrics.jsonl has the numbers, a gptjax.Callback can send them",
}

NANOGPT_TRAINS: dict[str, Any] = {
    "batch_size": 12, "gradient_accumulation_steps": 40, "block_size": 1024, "n_layer": 12,
    "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4,
    "max_iters": 600_000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "warmup_iters": 2000, "lr_decay_iters": 600_000, "min_lr": 6e-5, "eval_interval": 2000,
    "log_interval": 1, "eval_iters": 200,
}  # fmt: skip
"""The globals of nanoGPT's train.py that make a run what it is, with their defaults."""


def nanogpt_names(known: Iterable[str]) -> dict[str, str]:
    """{nanoGPT's name: ours} of NANOGPT_TRAINS. `known`: our settings, "model.n_layer" and all."""
    ours = {name.rpartition(".")[2]: name for name in known}
    return {name: NANOGPT.get(name) or ours[name] for name in NANOGPT_TRAINS}


def from_nanogpt(found: Mapping[Any, Any], known: Iterable[str]) -> dict[str, Any]:
    """{our setting: value} of the globals of nanoGPT's train.py, unchecked; `known` as above."""
    out = {ours: found[name] for name, ours in nanogpt_names(known).items() if name in found}
    rate = found.get("learning_rate", NANOGPT_TRAINS["learning_rate"])
    if found.get("decay_lr") is False:
        out |= {"optimizer.min_lr": rate}
        out |= {"optimizer.warmup_steps": 0}
    # nanoGPT counts micro-batches, in training and in evaluation.
    steps, size, batches = (
        out.get(name) for name in ("gradient_accumulation_steps", "batch_size", "eval_batches")
    )
    if type(steps) is int and steps > 0:
        out |= {"batch_size": size * steps} if type(size) is int else {}
        out |= {"eval_batches": -(-batches // steps)} if type(batches) is int else {}
    return out


HUGGING_FACE = {
    "output_dir": "run_dir",
    "model_name_or_path": "init_from",
    "train_file": "data.source",
    "dataset_name": "data.source",
    "validation_split_percentage": "data.val_fraction",
    "per_device_train_batch_size": "--batch-size counts the sequences of all devices together",
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
    "max_length": "--max-new-tokens counts what comes after the prompt",
    "lora_r": "lora_rank",
    "early_stopping_patience": "patience",
    "num_return_sequences": "num_samples",
    "do_sample": "--temperature 0 always takes the likeliest token",
}

SHORT = {
    "lr": "learning_rate",
    "muon_lr": "muon_learning_rate",
    "optim": "there are --optimizer adamw and --optimizer muon",
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
