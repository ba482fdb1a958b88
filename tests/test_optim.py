"""The schedule by hand, the decay mask by name, and AdamW against torch's."""

import math

import jax
import numpy as np
import pytest
import torch

from gptjax import optim
from gptjax.config import ModelConfig, TrainConfig
from gptjax.model import init_params

CONFIG = TrainConfig(
    max_steps=2000, learning_rate=1e-3, min_lr=1e-4, warmup_steps=100, lr_decay_steps=1500
)


def nanogpt_rate(it: int) -> float:
    """nanoGPT's documented rule, in Python floats."""
    if it < 100:
        return 1e-3 * (it + 1) / 101
    if it > 1500:
        return 1e-4
    ratio = (it - 100) / (1500 - 100)
    return 1e-4 + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (1e-3 - 1e-4)


@pytest.mark.parametrize("step", [0, 1, 50, 99, 100, 101, 800, 1499, 1500, 1501, 1999, 5000])
def test_learning_rate_is_nanogpts_formula(step):
    assert float(optim.learning_rate(CONFIG, step)) == pytest.approx(nanogpt_rate(step), rel=1e-5)


def test_learning_rate_by_hand():
    assert float(optim.learning_rate(CONFIG, 0)) == pytest.approx(1e-3 / 101)
    assert float(optim.learning_rate(CONFIG, 100)) == pytest.approx(1e-3)
    assert float(optim.learning_rate(CONFIG, 800)) == pytest.approx((1e-3 + 1e-4) / 2)


def test_weight_decay_falls_on_exactly_these_parameters():
    config = ModelConfig(2, 2, 8, 4, vocab_size=5, tied_head=False)
    mask = optim.decay_mask(jax.eval_shape(lambda: init_params(config, 0)))
    names = {
        "/".join(key.key for key in path): value for path, value in jax.tree.leaves_with_path(mask)
    }
    assert {name for name, decays in names.items() if decays} == {
        "wte", "wpe", "lm_head", "h/attn/c_attn/kernel", "h/attn/c_proj/kernel",
        "h/mlp/c_fc/kernel", "h/mlp/c_proj/kernel",
    }  # fmt: skip
    assert {name for name, decays in names.items() if not decays} == {
        "h/attn/c_attn/bias", "h/attn/c_proj/bias", "h/mlp/c_fc/bias", "h/mlp/c_proj/bias",
        "h/ln_1/scale", "h/ln_1/bias", "h/ln_2/scale", "h/ln_2/bias", "ln_f/scale", "ln_f/bias",
    }  # fmt: skip


def test_the_update_is_torchs_clipped_adamw():
    rng = np.random.default_rng(0)
    start = {"wte": rng.standard_normal((7, 5), "f4"), "ln_f": {"scale": np.ones(5, "f4")}}
    config = TrainConfig(learning_rate=3e-2, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1)
    matrix = torch.nn.Parameter(torch.from_numpy(start["wte"].copy()))
    scale = torch.nn.Parameter(torch.from_numpy(start["ln_f"]["scale"].copy()))
    groups = [
        {"params": [matrix], "weight_decay": 0.1},
        {"params": [scale], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=3e-2, betas=(0.9, 0.95), eps=1e-8)
    ours, transform = start, optim.optimizer(config)
    state = transform.init(ours)
    for size in (10.0, 0.01, 1.0, 100.0):  # some gradients are clipped, some are not
        grads = jax.tree.map(lambda x, s=size: s * rng.standard_normal(x.shape, "f4"), ours)
        matrix.grad = torch.from_numpy(grads["wte"].copy())
        scale.grad = torch.from_numpy(grads["ln_f"]["scale"].copy())
        torch.nn.utils.clip_grad_norm_([matrix, scale], 1.0)
        theirs.step()
        updates, state = transform.update(grads, state, ours)
        ours = jax.tree.map(lambda p, u: p - 3e-2 * u, ours, updates)
    np.testing.assert_allclose(ours["wte"], matrix.detach(), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(ours["ln_f"]["scale"], scale.detach(), rtol=2e-5, atol=1e-6)
