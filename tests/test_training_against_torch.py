"""Gradients and a training run as PyTorch's, from the same weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_models import SMALL, random_params

from gptjax import optim, train_step
from gptjax.config import OptimizerConfig, TrainConfig
from gptjax.data.batches import batch_at
from gptjax.interop import parameter_names

torch = pytest.importorskip("torch", reason="needs PyTorch")
from gptjax.parity import torch_gpt  # noqa: E402
from gptjax.parity.reference import Reference  # noqa: E402

MIXED = dataclasses.replace(
    SMALL, attention_pattern=("dense", "banded"), attention_window=5, activation="gelu_erf",
    tied_head=False, qkv_bias=False, vocab_multiple=16,
)  # fmt: skip
CONFIG = TrainConfig(
    SMALL, optimizer=OptimizerConfig(1e-2, min_lr=1e-3, warmup_steps=3, grad_clip=0.2),
    batch_size=16, max_steps=10,
)  # fmt: skip
TOKENS = (np.arange(5000) * 7 + np.random.default_rng(0).integers(0, 3, 5000)) % 23


def in_torch(params, config):
    tensors = parameter_names.to_torch(params, config, "out_in", padding=False)
    return torch_gpt.from_state_dict(config, tensors)


def test_the_loss_and_every_gradient_are_torchs():
    config = MIXED
    params = random_params(config, scale=0.3)
    windows = np.random.default_rng(0).integers(0, 23, (2, 13))
    theirs, tokens = in_torch(params, config), torch.from_numpy(windows)
    expected = torch_gpt.cross_entropy(theirs(tokens[:, :-1]), tokens[:, 1:])
    expected.backward()
    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.value_and_grad(functools.partial(train_step.loss, config=config)))
        loss, grads = gradient(params, windows)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert not grads["wte"][config.vocab_size :].any()
    ours = parameter_names.to_torch(grads, config, "out_in", padding=False)
    for name, value in theirs.named_parameters():
        grad = value.grad.numpy()
        assert np.linalg.norm(ours[name] - grad) < 2e-5 * np.linalg.norm(grad), name


def test_ten_steps_follow_torchs_loss():
    params = random_params(SMALL, scale=0.3)
    state = train_step.TrainState(np.int32(0), params, optim.optimizer(CONFIG).init(params))
    step = jax.jit(functools.partial(train_step.train_step, config=CONFIG))
    theirs = in_torch(params, SMALL)
    adamw = torch_gpt.adamw(
        theirs.parameters(), learning_rate=0.0, betas=(0.9, 0.99), weight_decay=0.1
    )
    found, expected = [], []
    for i in range(10):
        windows = batch_at(TOKENS, CONFIG.seed, i, batch_size=16, block_size=12)
        state, metrics = step(state, train_step.whole_batch(windows[None]))
        found.append((float(metrics["train_loss"]), float(metrics["grad_norm"])))
        for group in adamw.param_groups:
            group["lr"] = float(metrics["learning_rate"])
        tokens = torch.from_numpy(windows).long()
        loss = torch_gpt.cross_entropy(theirs(tokens[:, :-1]), tokens[:, 1:])
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), CONFIG.optimizer.grad_clip)
        adamw.step()
        expected.append((loss.item(), norm.item()))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    norms = [norm for _, norm in expected]
    assert min(norms) < CONFIG.optimizer.grad_clip < max(norms)  # some are clipped, some are not
    assert found[-1][0] < found[0][0] - 0.1  # and it learns


@pytest.mark.parametrize("layout", ["out_in", pytest.param("in_out", marks=pytest.mark.slow)])
def test_thirty_steps_of_muon_are_torchs(layout):
    """Every parameter, by torch.optim.Muon; its orthogonalisation in float32, for it rounds."""
    rates = dataclasses.replace(
        CONFIG.optimizer, kind="muon", lr_schedule="linear", muon_learning_rate=0.03,
        muon_beta=0.9, muon_iterations=4,
    )  # fmt: skip
    config = dataclasses.replace(CONFIG, optimizer=rates, max_steps=30)
    start = random_params(SMALL, scale=0.3)
    state = train_step.TrainState(np.int32(0), start, optim.optimizer(config).init(start))
    step = jax.jit(functools.partial(train_step.train_step, config=config))
    theirs = Reference(start, SMALL, {"out_in": "nanogpt-style", "in_out": "hf"}[layout], "float32")
    update, found, expected = theirs.optimizer(config), [], []
    for i in range(30):
        windows = batch_at(TOKENS, config.seed, i, batch_size=16, block_size=12)
        with jax.default_matmul_precision("highest"):
            state, metrics = step(state, train_step.whole_batch(windows[None]))
        found.append(float(metrics["train_loss"]))
        expected.append(theirs.backward(windows))
        update(i)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[-1] < found[0] - 0.2
    ours = parameter_names.to_torch(state.params, SMALL, layout, padding=False)
    before = parameter_names.to_torch(start, SMALL, layout, padding=False)
    for name, value in theirs.values().items():
        if name.endswith("c_attn.bias"):
            continue  # that of keys has no gradient but rounding, which AdamW makes large
        moved = np.linalg.norm(value - before[name])
        assert np.linalg.norm(ours[name] - value) < 5e-3 * moved, name
