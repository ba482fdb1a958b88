"""The loss of a text, window by window, over all devices."""

from collections.abc import Callable, Sequence

import numpy as np

from gptjax.config import ModelConfig
from gptjax.data.batches import Tokens, Window, check_ids, window_batch
from gptjax.data.prefetch import Prefetch
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
    own, n_batches = host_rows(batch_size), -(-len(windows) // batch_size)

    def read(number: int) -> tuple[np.ndarray, np.ndarray]:
        part = windows[number * batch_size : (number + 1) * batch_size][own]
        batch, weights = window_batch(tokens, part, config.block_size, own.stop - own.start)
        check_ids(batch, config.vocab_size)
        return batch, weights

    loss = 0.0
    with Prefetch(read, n_batches) as batches:
        for number in range(n_batches):
            sums, stopped = losses(*batches(number), stop())
            if stopped:
                return None
            loss += float(sums.sum(dtype=np.float64))
            progress(min((number + 1) * batch_size, len(windows)), len(windows))
    return loss, sum(window.end - window.first for window in windows)
