"""GPT-2 124M on a text of your own: gptjax train gpt2 --data.source my_texts/

For another size change "gpt2" to a name in gptjax.config.PRESETS (gpt2-xl, gpt3-13b, ...).
"""

from gptjax.config import PRESETS, DataConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import RuntimeConfig

config = TrainConfig(
    model=PRESETS["gpt2"].replace(bias=False, vocab_multiple=64),
    data=DataConfig(source=None, tokenizer="gpt2", val_fraction=0.001),
    optimizer=OptimizerConfig(learning_rate=6e-4, min_lr=6e-5, warmup_steps=2000, beta2=0.95),
    batch_size=480,  # x 1024 tokens: the half million of GPT-3's smallest model
    max_steps=600_000,
)
runtime = RuntimeConfig(
    gradient_accumulation_steps=5,  # for 8 devices with 12 sequences each; 40 on one device
    eval_interval=1000,
    eval_batches=40,
)
