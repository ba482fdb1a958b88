"""The step: accumulation, dropout keys, and a trajectory against PyTorch."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
import torch

from gptjax import data, optim, state_dict, torch_gpt, train
from gptjax.config import ModelConfig, TrainConfig

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50)
CONFIG = TrainConfig(
    model=MODEL, batch_size=16, max_steps=30, learning_rate=1e-2, min_lr=1e-3, warmup_steps=5
)
TOKENS = (np.arange(5000) * 7 + np.random.default_rng(0).integers(0, 3, 5000)) % 50


init_state = jax.jit(train.init_state, static_argnums=0)


def rows_at(step: int, config: TrainConfig = CONFIG) -> np.ndarray:
    size = {"batch_size": config.batch_size, "block_size": config.model.block_size}
    return data.batch_at(TOKENS, config.seed, step, **size)


def step_alone(config: TrainConfig = CONFIG):
    """A step that takes windows [A, b, T + 1]."""

    def step(state, windows):
        return train.train_step(state, train.whole_batch(windows), config)

    return jax.jit(step)


def in_torch(params) -> torch_gpt.TorchGPT:
    return torch_gpt.from_state_dict(MODEL, state_dict.to_torch(params, MODEL, "out_in"))


def assert_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_accumulated_micro_batches_equal_the_big_batch():
    state = init_state(CONFIG)
    rows = rows_at(0)
    big, big_metrics = step_alone()(state, rows[None])
    small, metrics = step_alone()(state, rows.reshape(4, 4, -1))
    assert_close(metrics, big_metrics, rtol=1e-5)
    # Adam's first step divides each gradient by its own size, which magnifies rounding.
    assert_close(small.params, big.params, rtol=1e-4, atol=1e-5)


def test_dropout_keys_differ_across_steps_and_seeds_and_repeat():
    def key(seed, step):
        return tuple(np.asarray(jax.random.key_data(train.dropout_key(seed, step))))

    asked = [(seed, step) for seed in (0, 1) for step in (0, 1, 1000)]
    drawn = [key(*at) for at in asked]
    assert len(set(drawn)) == len(asked)
    assert key(1, 1000) == drawn[-1]


def test_dropout_masks_differ_between_steps_and_repeat_for_the_same_step():
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(MODEL, dropout=0.5), learning_rate=0.0, min_lr=0.0
    )
    state, step, rows = init_state(config), step_alone(config), rows_at(0)[None]
    later, first = step(state, rows)  # the parameters do not move: only the step's number does
    _, second = step(later, rows)
    _, again = step(state, rows)
    assert first["train_loss"] == again["train_loss"] != second["train_loss"]


def test_thirty_steps_follow_pytorchs_loss_from_the_same_weights():
    state, step = init_state(CONFIG), step_alone()
    theirs = in_torch(state.params)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
    )
    losses, expected = [], []
    for i in range(30):
        rows = rows_at(i)
        state, metrics = step(state, rows[None])
        losses.append(float(metrics["train_loss"]))
        for group in adamw.param_groups:
            group["lr"] = float(optim.learning_rate(CONFIG, i))
        tokens = torch.from_numpy(rows).long()
        loss = torch_gpt.cross_entropy(theirs(tokens[:, :-1]), tokens[:, 1:])
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()
        expected.append(loss.item())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-2)
    assert losses[-1] < 0.7 * losses[0]  # and it learns


def test_evaluation_sums_pytorchs_losses_of_each_window_where_they_count():
    params = init_state(CONFIG).params
    theirs = in_torch(params)
    windows, weights = data.windows_at(
        TOKENS[:1000], [data.Span(0, 17, 1), data.Span(990, 1000, 991)], 16, 3
    )
    sums = jax.jit(partial(train.eval_step, config=MODEL))(params, windows, weights)
    whole = torch.from_numpy(windows[:1]).long()
    short = torch.from_numpy(windows[1:2, :10]).long()  # 990 ... 999: nine targets
    with torch.no_grad():
        expected = [
            n * torch_gpt.cross_entropy(theirs(part[:, :-1]), part[:, 1:]).item()
            for n, part in ((16, whole), (9, short))
        ]
    assert sums.tolist() == pytest.approx([*expected, 0.0], rel=1e-5)


def test_init_follows_the_seed():
    a, b, c = (init_state(dataclasses.replace(CONFIG, seed=s)).params for s in (1, 1, 2))
    assert np.array_equal(a["wte"], b["wte"]) and not np.array_equal(a["wte"], c["wte"])
