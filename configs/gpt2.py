"""GPT-2 124M on a text of your own: python train_jax.py configs/gpt2.py --data.source FOLDER

For another size change "gpt2" to a name in gptjax.config.PRESETS (gpt2-xl, gpt3-13b, ...).
"""

import dataclasses

from gptjax.config import PRESETS, DataConfig, TrainConfig

config = TrainConfig(
    model=dataclasses.replace(PRESETS["gpt2"], bias=False, vocab_multiple=64),
    data=DataConfig(source="text", tokenizer="gpt2", val_fraction=0.001),
    batch_size=480,  # x 1024 tokens: the half million of GPT-3's smallest model
    gradient_accumulation_steps=5,  # for 8 devices of 12 sequences each; on one device 40
    max_steps=600_000,
    learning_rate=6e-4,
    min_lr=6e-5,
    warmup_steps=2000,
    beta2=0.95,
    eval_interval=1000,
    eval_batches=200,
)
