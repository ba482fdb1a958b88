"""GPT-2 XL, 1.56B, on a text of your own: gptjax train gpt2_xl --data.source my_texts/

One accelerator of 16 GiB cannot hold its state; eight share it.
"""

from gptjax.config import PRESETS, DataConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

config = TrainConfig(
    # An embedding whose size suits matrix units.
    model=PRESETS["gpt2-xl"].replace(vocab_multiple=128),
    data=DataConfig(source=None, tokenizer="gpt2", val_fraction=0.001),
    # GPT-2's learning rate was not published; this is GPT-3 XL's.
    optimizer=OptimizerConfig(learning_rate=2e-4, min_lr=2e-5, warmup_steps=2000, beta2=0.95),
    batch_size=512,  # GPT-2's
    max_steps=100_000,
)
runtime = RuntimeConfig(
    strategy="fsdp",
    compute=ComputeConfig(remat=True),
    gradient_accumulation_steps=8,
    eval_interval=1000,
    eval_batches=25,
)
