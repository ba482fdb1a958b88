"""What gptjax 0.1 wrote is still read: runs' settings, config files."""

import pytest

from gptjax import config_io, first_edition
from gptjax.config import FINETUNE, PRESETS, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

# A config.json of gptjax 0.1, with another value than the default for one setting of each place.
SAVED = {
    "model": {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 44,
        "vocab_multiple": 1, "dropout": 0.1, "bias": False, "qkv_bias": None, "gelu": "erf",
        "position": "learned", "tied_head": True, "attention_pattern": ["dense"],
        "attention_window": 256, "attention": "xla", "dtype": "auto", "remat": True,
        "scan_unroll": 3,
    },
    "data": {
        "source": "text.txt", "tokenizer": "char", "sentencepiece_vocab_size": 4096,
        "val_fraction": 0.1, "dir": "/data/text-char-ccd7bd92",
    },
    "parallel": {"strategy": "fsdp"},
    "distributed": {
        "coordinator_address": None, "num_processes": None, "process_id": None,
        "initialization_timeout": 1800, "heartbeat_timeout": 60,
    },
    "run_dir": "runs/tiny", "init_from": "/runs/gpt2", "seed": 1, "batch_size": 8,
    "gradient_accumulation_steps": 4, "max_steps": 40, "learning_rate": 0.002, "min_lr": 0.0002,
    "warmup_steps": 100, "lr_decay_steps": None, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
    "grad_clip": 1.0, "log_interval": 5, "eval_interval": 10, "eval_batches": 20,
    "eval_full_split": True, "save_interval": None, "keep_checkpoints": 2, "sample_tokens": 20,
    "device": "auto", "num_devices": 2, "dry_run": False, "device_memory": None,
}  # fmt: skip


def test_saved_settings_find_their_new_places():
    assert config_io.run_settings(SAVED, "config.json") == (
        TrainConfig(
            ModelConfig(
                2, 2, 16, 16, vocab_size=44, dropout=0.1, bias=False, activation="gelu_erf"
            ),
            DataConfig("text.txt", dir="/data/text-char-ccd7bd92"),
            OptimizerConfig(learning_rate=0.002, min_lr=0.0002, beta2=0.95),
            init_from="/runs/gpt2", seed=1, batch_size=8, max_steps=40,
        ),
        RuntimeConfig(
            "runs/tiny", log_interval=5, eval_interval=10, eval_full_split=True, sample_tokens=20,
            num_devices=2, strategy="fsdp", gradient_accumulation_steps=4,
            compute=ComputeConfig("xla", remat=True, scan_unroll=3),
            eval_batches=5,  # of 8 windows, as 20 micro-batches of 2 were
        ),
    )  # fmt: skip


def test_what_is_wrong_in_them_is_named():
    with pytest.raises(UserError, match=r"unknown setting paralel; .*learning_rate is '1'"):
        config_io.run_settings({"paralel": {}, "learning_rate": "1"}, "config.json")


def load(tmp_path, lines):
    (tmp_path / "old.py").write_text("import dataclasses\nfrom gptjax.config import *\n" + lines)
    return config_io.load_config(str(tmp_path / "old.py"))


def test_config_files_are_read_with_a_notice(tmp_path, capsys):
    config, runtime = load(
        tmp_path,
        "from gptjax.config import ParallelConfig\n"
        "config = TrainConfig(\n"
        "    model=dataclasses.replace(\n"
        "        PRESETS['gpt2-xl'], vocab_multiple=128, remat=True, gelu='erf'),\n"
        "    data=DataConfig('text'), parallel=ParallelConfig(strategy='fsdp'), batch_size=512,\n"
        "    gradient_accumulation_steps=8, learning_rate=2e-4, min_lr=2e-5, eval_batches=200)\n",
    )
    model = PRESETS["gpt2-xl"].replace({"vocab_multiple": 128, "activation": "gelu_erf"})
    rates = OptimizerConfig(learning_rate=2e-4, min_lr=2e-5)
    assert config == TrainConfig(model, DataConfig("text"), rates, batch_size=512)
    assert runtime == RuntimeConfig(
        strategy="fsdp", compute=ComputeConfig(remat=True), gradient_accumulation_steps=8,
        eval_batches=25,
    )  # fmt: skip
    assert config.optimizer.given == {"learning_rate", "min_lr"}
    said = capsys.readouterr().err
    assert said.startswith("note: ") and "gptjax 0.1" in said and said.count("\n") == 1


def test_their_presets_for_fine_tuning_too(tmp_path):
    config, _ = load(tmp_path, "config = dataclasses.replace(FINETUNE, beta2=0.9)")
    changed = FINETUNE.replace({"optimizer.beta2": 0.9})
    assert config == changed


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "config = TrainConfig(learning_rate=1e-4, eval_intervall=3)",
            "did you mean eval_interval",
        ),
        (
            "config = TrainConfig(learning_rate='fast')",
            "learning_rate is 'fast'; expected a number",
        ),
        ("config = TrainConfig(eval_interval=0)", "eval_interval 0 must be at least 1"),
    ],
)
def test_mistakes_in_config_files_are_named(tmp_path, capsys, line, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, line)
    assert not capsys.readouterr().err


def test_renamed_flags_are_settings_that_exist():
    names = config_io.setting_types(RuntimeConfig) | config_io.setting_types(TrainConfig)
    assert set(first_edition.RENAMED.values()) <= names.keys()
    assert first_edition.RENAMED["model.remat"] == "compute.remat"
