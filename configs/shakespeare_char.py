"""nanoGPT's Tiny Shakespeare setting: 10.65M parameters, minutes on a GPU, hours on a CPU.

nanoGPT reports a best validation loss of 1.4697 (a noisy estimate; this one is exact).
"""

from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import RuntimeConfig

config = TrainConfig(
    model=ModelConfig(
        n_layer=6,
        n_head=6,
        n_embd=384,
        block_size=256,
        bias=False,
        activation="gelu_erf",
        dropout=0.2,
    ),
    data=DataConfig(source="shakespeare", tokenizer="char"),
    optimizer=OptimizerConfig(learning_rate=1e-3, min_lr=1e-4, warmup_steps=100, beta2=0.99),
    batch_size=64,
    max_steps=5000,
)
runtime = RuntimeConfig(eval_interval=250, eval_full_split=True, log_interval=10)
