"""GPT-3 13B (arXiv:2005.14165, table 2.1 and appendix B), on a text of your own and 64 or more
accelerators: gptjax train gpt3_13b --data.source my_texts/
"""

from gptjax.config import PRESETS, DataConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

config = TrainConfig(
    model=PRESETS["gpt3-13b"].replace(vocab_multiple=128),
    data=DataConfig(source=None, tokenizer="gpt2", val_fraction=0.001),
    optimizer=OptimizerConfig(
        learning_rate=1e-4,
        min_lr=1e-5,
        warmup_steps=179,  # 375M tokens
        lr_decay_steps=124_000,  # 260B tokens
        beta2=0.95,
    ),
    batch_size=1024,  # 2M tokens
    max_steps=143_000,  # 300B tokens
)
runtime = RuntimeConfig(
    strategy="fsdp",
    compute=ComputeConfig(remat=True),
    gradient_accumulation_steps=16,
    eval_interval=1000,
    eval_batches=12,
)
