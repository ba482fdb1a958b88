"""nanoGPT's loss on Tiny Shakespeare (`shakespeare_char_cpu`) in a sixth of its time: 13 seconds on
2 cores.

The same text, kind of block, block size and evaluations. It trains with Muon, a straight line down
to zero, twice the batch, and a smaller network, which this little time trains further:
docs/leaderboard.md says how each was chosen.
"""

from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import RuntimeConfig

config = TrainConfig(
    model=ModelConfig(
        n_layer=2,
        n_head=2,
        n_embd=64,
        block_size=64,
        bias=False,
        activation="gelu_erf",
        dropout=0.0,
        tied_head=False,
    ),
    data=DataConfig(source="shakespeare", tokenizer="char"),
    optimizer=OptimizerConfig(
        kind="muon",
        learning_rate=8e-3,
        min_lr=0.0,
        warmup_steps=5,
        lr_schedule="linear",
        muon_learning_rate=0.04,
        muon_beta=0.9,
        beta1=0.8,
        beta2=0.95,
        grad_clip=0.0,
    ),
    batch_size=24,
    max_steps=380,
)
runtime = RuntimeConfig(eval_interval=250, eval_full_split=True, log_interval=10)
