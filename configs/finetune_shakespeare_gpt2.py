"""GPT-2 fine-tuned on Tiny Shakespeare for a few steps, after nanoGPT's example: its 32 sequences
a step and its learning rate, but a block of 256, which is four times faster, and some dropout.

First, once: gptjax convert import gpt2 runs/gpt2

For another size import gpt2-xl, say, and add --init-from runs/gpt2-xl.
"""

from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import RuntimeConfig

config = TrainConfig(
    init_from="runs/gpt2",
    # The rest of the architecture comes with the weights.
    model=ModelConfig(block_size=256, dropout=0.1),
    data=DataConfig(source="shakespeare", tokenizer="gpt2"),
    optimizer=OptimizerConfig(learning_rate=3e-5, min_lr=3e-5, warmup_steps=0, beta2=0.95),
    batch_size=32,
    max_steps=20,
)
runtime = RuntimeConfig(gradient_accumulation_steps=4, eval_interval=5, log_interval=1)
