"""nanoGPT's CPU setting for Tiny Shakespeare: 0.8M parameters, a minute or two on 2 cores.

One thing differs from nanoGPT: the output head is not tied to the embedding, which costs 8,320
parameters here and takes 0.02 off the validation loss (--model.tied-head True is nanoGPT's).
"""

from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import RuntimeConfig

config = TrainConfig(
    model=ModelConfig(
        n_layer=4,
        n_head=4,
        n_embd=128,
        block_size=64,
        bias=False,
        activation="gelu_erf",
        dropout=0.0,
        tied_head=False,
    ),
    data=DataConfig(source="shakespeare", tokenizer="char"),
    optimizer=OptimizerConfig(learning_rate=1e-3, min_lr=1e-4, warmup_steps=100, beta2=0.99),
    batch_size=12,
    max_steps=2000,
)
runtime = RuntimeConfig(eval_interval=250, eval_full_split=True, log_interval=10)
