"""GPT-2 XL, 1.56B, on a text of your own: --data.source my_texts/. One accelerator of 16 GiB does
not hold its state; eight share it."""

import dataclasses

from gptjax.config import PRESETS, DataConfig, ParallelConfig, TrainConfig

config = TrainConfig(
    # Recomputed activations; an embedding that matrix units like.
    model=dataclasses.replace(PRESETS["gpt2-xl"], vocab_multiple=128, remat=True),
    data=DataConfig(source="text", tokenizer="gpt2", val_fraction=0.001),
    parallel=ParallelConfig(strategy="fsdp"),
    batch_size=512,  # GPT-2's; its rates were not published, these are GPT-3 XL's
    gradient_accumulation_steps=8,
    max_steps=100_000,
    learning_rate=2e-4,
    min_lr=2e-5,
    warmup_steps=2000,
    beta2=0.95,
    eval_interval=1000,
    eval_batches=200,
)
