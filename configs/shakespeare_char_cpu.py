"""nanoGPT's CPU setting for Tiny Shakespeare: 0.8M parameters, a minute or two on 2 cores.

Validation loss over the whole split: 1.90 or less (nanoGPT itself: 1.898).
"""

from gptjax.config import DataConfig, ModelConfig, TrainConfig

config = TrainConfig(
    model=ModelConfig(
        n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False, gelu="erf", dropout=0.0
    ),
    data=DataConfig(source="shakespeare", tokenizer="char"),
    batch_size=12,
    max_steps=2000,
    learning_rate=1e-3,
    min_lr=1e-4,
    warmup_steps=100,
    beta2=0.99,
    eval_interval=250,
    eval_full_split=True,
    log_interval=10,
)
