"""The loss of a text, window by window, over all devices."""

from collections.abc import Callable, Sequence

import numpy as np

from gptjax.config import ModelConfig
from gptjax.data.batches import Tokens, Window, check_ids, window_batch
from gptjax.devices.hosts import host_rows

Losses = Callable[..., tuple[np.ndarray, int]]
"""`train_step.eval_step` as a strategy maps it, with the parameters given: (this host's windows and
weights, its stop signal or 0) -> (nats of every host's windows, the largest stop signal)."""


def window_loss(
    losses: Losses,
    tokens: Tokens,
    windows: Sequence[Window],
    config: ModelConfig,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], int] = lambda: 0,
) -> tuple[float, int] | None:
    """(nats in all, tokens predicted); None where any host's `stop` is no longer 0.

    Args:
        windows: from `windows_over`.
        batch_size: windows at a time, over all devices. The result does not depend on it, beyond
            rounding.
    """
    own = host_rows(batch_size)
    loss, count = 0.0, 0
    for at in range(0, len(windows), batch_size):
        batch, weights = window_batch(
            tokens, windows[at : at + batch_size], config.block_size, batch_size
        )
        check_ids(batch, config.vocab_size)
        sums, stopped = losses(batch[own], weights[own], stop())
        if stopped:
            return None
        loss, count = loss + float(sums.sum(dtype=np.float64)), count + int(weights.sum())
        progress(min(at + batch_size, len(windows)), len(windows))
    return loss, count
