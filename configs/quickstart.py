"""The default: a small character-level GPT on the Python standard library's own source.

Needs no network and a minute or two on 2 CPU cores; ends with samples that look like code.
"""

from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import RuntimeConfig

config = TrainConfig(
    model=ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, bias=False),
    data=DataConfig(source="builtin", tokenizer="char"),
    optimizer=OptimizerConfig(learning_rate=2e-3, min_lr=2e-4),
    batch_size=16,
    max_steps=1000,
)
runtime = RuntimeConfig(eval_interval=250, log_interval=20)
