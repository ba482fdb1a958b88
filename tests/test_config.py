"""Settings check their values when they are made, and know what was given."""

import dataclasses
import re

import pytest

from gptjax.config import PRESETS, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.errors import ConfigError, UserError
from gptjax.runtime_config import DistributedConfig, RuntimeConfig


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(n_embd=130, n_head=4, dropout=1.0),
         ["n_embd 130 is not divisible by model.n_head 4", "may be 1 or 2 or 5", "dropout 1.0"]),
        (lambda: ModelConfig(n_layer=-1, vocab_size=2**31), ["n_layer -1", "vocab_size 214"]),
        (lambda: ModelConfig(n_layer=100_001), ["n_layer 100001 must be at most 100000"]),
        (lambda: ModelConfig(attention_pattern=()), ["attention_pattern is empty"]),
        (lambda: ModelConfig(1, 1, 4, lora_rank=5, lora_alpha=0.0, lora_targets=()),
         ["lora_rank 5 must be at most n_embd 4", "lora_alpha 0.0", "lora_targets is empty"]),
        (lambda: ModelConfig(lora_targets=("mlp",)), ["lora_targets takes a model.lora_rank"]),
        (lambda: ModelConfig(1, 1, 3, position="sinusoidal"), ["n_embd 3 must be even"]),
        (lambda: DataConfig(source="", val_fraction=2.0), ["source is empty", "val_fraction 2.0"]),
        (lambda: OptimizerConfig(learning_rate=float("nan"), beta2=1.0),
         ["learning_rate nan", "beta2 1.0"]),
        (lambda: OptimizerConfig(learning_rate=1e-5), ["min_lr 0.0001 is above learning_rate"]),
        (lambda: TrainConfig(batch_size=0, init_from=""), ["batch_size 0", "init_from is empty"]),
        (lambda: RuntimeConfig(num_devices=2000, run_dir=""), ["at most 1024", "run_dir is empty"]),
        (lambda: DistributedConfig(num_processes=2), ["go together"]),
        (lambda: DistributedConfig("host", 2, 2), ["is not host:port", "process_id 2"]),
    ],
)  # fmt: skip
def test_all_that_is_out_of_range_is_named(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_a_batch_that_does_not_divide_names_those_that_do():
    runtime, config = RuntimeConfig(gradient_accumulation_steps=3), TrainConfig(batch_size=50)
    with pytest.raises(UserError, match="use 48 or 72 or another multiple of 24"):
        runtime.divide_batch(config, 8)
    assert runtime.divide_batch(dataclasses.replace(config, batch_size=48), 8) == 2


def test_evaluation_windows_do_not_depend_on_accumulation():
    config = TrainConfig(batch_size=12)
    for steps in (1, 3, 12):
        runtime = RuntimeConfig(eval_batches=5, gradient_accumulation_steps=steps)
        assert runtime.eval_windows(config) == 60
    assert RuntimeConfig(eval_full_split=True).eval_windows(config) is None


def test_flops_per_token_follow_palms_appendix_b():
    # 6 (N + V C) + 12 L C T with N = 12 C^2 per layer, by hand for a bias-free, norm-light shape.
    config = ModelConfig(2, 2, 64, 32, vocab_size=100, bias=False)
    layer = 12 * 64 * 64 + 2 * 64
    assert config.flops_per_token() == 6 * (2 * layer + 64 + 100 * 64) + 12 * 2 * 64 * 32


@pytest.mark.parametrize(
    ("name", "millions"),
    # GPT-2's are those of Hugging Face's models; GPT-3's of table 2.1, which rounds.
    [("gpt2", 124.44), ("gpt2-medium", 354.82), ("gpt2-large", 774.03), ("gpt2-xl", 1557.61)],
)
def test_presets_have_the_published_sizes(name, millions):
    assert round(PRESETS[name].num_parameters() / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: OptimizerConfig(warmup_steps=1e1),
            "warmup_steps is 10.0; expected a whole number",
        ),
        (
            lambda: ModelConfig(activation="erf"),
            "model.activation is 'erf'; expected 'gelu_tanh' or",
        ),
        (lambda: ModelConfig(n_layer="3"), "model.n_layer is '3'; expected a whole number"),
        (lambda: ModelConfig(bias=1), "model.bias is 1; expected True or False"),
        (lambda: TrainConfig(model={"n_layer": 2}), "model is {'n_layer': 2}"),
        (
            lambda: RuntimeConfig(strategy="ddp"),
            "strategy is 'ddp'; expected 'pmap' or 'shard_map' or 'fsdp'",
        ),
    ],
)
def test_values_of_another_type_are_refused_when_made(make, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make()


def test_a_list_becomes_a_tuple():
    config = ModelConfig(attention_pattern=["dense", "banded"])
    assert config.attention_pattern == ("dense", "banded") and hash(config)
