"""The default: a small character-level GPT on the Python standard library's own source.

Needs no network and one or two minutes on 2 CPU cores; ends with samples that look like code. The
optimizer's rates are the best of a dozen short runs.
"""

from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import RuntimeConfig

config = TrainConfig(
    model=ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, bias=False),
    data=DataConfig(source="builtin", tokenizer="char"),
    optimizer=OptimizerConfig(
        kind="muon",
        learning_rate=8e-3,
        min_lr=1e-4,
        warmup_steps=20,
        lr_schedule="linear",
        muon_learning_rate=0.03,
        muon_iterations=4,
        beta1=0.8,
        beta2=0.95,
    ),
    batch_size=16,
    max_steps=700,
)
runtime = RuntimeConfig(eval_interval=175, log_interval=20)
