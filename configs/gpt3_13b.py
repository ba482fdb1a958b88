"""GPT-3 13B (arXiv:2005.14165, table 2.1 and appendix B), on a text of your own: --data.source
my_texts/, on 64 or more accelerators."""

import dataclasses

from gptjax.config import PRESETS, DataConfig, ParallelConfig, TrainConfig

config = TrainConfig(
    model=dataclasses.replace(PRESETS["gpt3-13b"], vocab_multiple=128, remat=True),
    data=DataConfig(source="text", tokenizer="gpt2", val_fraction=0.001),
    parallel=ParallelConfig(strategy="fsdp"),
    batch_size=1024,  # 2M tokens
    gradient_accumulation_steps=16,
    max_steps=143_000,  # 300B tokens
    learning_rate=1e-4,
    min_lr=1e-5,
    warmup_steps=179,  # 375M tokens
    lr_decay_steps=124_000,  # 260B tokens
    beta2=0.95,
    eval_interval=1000,
    eval_batches=200,
)
