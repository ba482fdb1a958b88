"""A model's weights as they are read from another program's files, or written to them."""

from typing import Any, Literal, NamedTuple

from gptjax.config import ModelConfig, TrainConfig
from gptjax.config_io import from_dict
from gptjax.errors import UserError
from gptjax.runtime_config import RuntimeConfig

Gelu = Literal["tanh", "erf"]


class Weights(NamedTuple):
    """Parameters with the settings that belong to them, and the optimizer's state if there is one.

    What the readers of this package return has as `config.model.vocab_size` the number of rows of
    the embedding, until a tokenizer is chosen.
    """

    config: TrainConfig
    params: Any
    runtime: RuntimeConfig = RuntimeConfig()
    step: int = 0
    opt_state: Any = None
    """As of `optim.optimizer(config)`; None: training starts with a fresh one."""
    best_val_loss: float | None = None
    val_loss: float | None = None
    """Of these weights, where it was measured."""
    data_fingerprint: str | None = None
    """Of the tokens they were trained on, where these are known."""
    notes: tuple[str, ...] = ()
    """What a user should know of the reading."""
    dataset: Any = None
    """Of nanoGPT's: what its settings name as the data, unchecked."""
    trained: TrainConfig | None = None
    """How, where that is not `config`: LoRA's adapters are no part of what is written."""


def model_config(fields: dict[Any, Any], where: str) -> ModelConfig:
    """The network's settings from a file that `where` names. UserError: a setting is unknown,
    ill-typed or out of range, or there is no vocab_size."""
    config = from_dict(ModelConfig, plain(fields), where)
    if config.vocab_size is None:
        raise UserError(f"{where}: vocab_size is None; expected a number")
    return config


def plain(fields: dict[Any, Any]) -> dict[str, Any]:
    """`fields` for `from_dict`. A file may hold anything in place of settings, even lists in one
    another so often that no message could spell them, or numbers of a million digits: for these,
    the name of their type, which `from_dict` refuses."""

    def spell(value: Any) -> Any:
        short = (
            abs(value) < 2**63 if isinstance(value, int) else isinstance(value, str | float | None)
        )
        return value if short else f"a {type(value).__name__}"

    return {str(spell(name)): spell(value) for name, value in fields.items()}
