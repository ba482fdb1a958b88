"""The choice of a strategy; `base` says what one does."""

from collections.abc import Sequence

import jax

from gptjax.devices.base import Strategy
from gptjax.devices.fsdp import Fsdp
from gptjax.devices.pmap import Pmap
from gptjax.devices.shard_map import ShardMap
from gptjax.runtime_config import StrategyKind


def get_strategy(kind: StrategyKind, devices: Sequence[jax.Device] | None = None) -> Strategy:
    """Over all devices of all hosts, or over the given ones. To compile only, these may belong to
    a topology that is not here."""
    strategies: dict[str, type[Strategy]] = {"pmap": Pmap, "shard_map": ShardMap, "fsdp": Fsdp}
    return strategies[kind](jax.devices() if devices is None else devices)
