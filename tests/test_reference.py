"""The PyTorch side: its two models agree with each other, and its schedule with arithmetic."""

import numpy as np
import pytest
import torch
from test_compare import VARIANTS, lively

from gptjax import reference
from gptjax.config import TrainConfig

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 25))


def both(name: str) -> list[reference.Reference]:
    config, params = VARIANTS[name], lively(VARIANTS[name])
    return [reference.Reference(params, config, a, "float32") for a in ("hf", "nanogpt-style")]


@pytest.mark.parametrize("name", VARIANTS)
def test_hugging_faces_model_and_the_plain_one_are_the_same_function(name):
    theirs, plain = both(name)
    tokens = torch.from_numpy(TOKENS[:, :-1])
    with torch.no_grad():
        expected, found = theirs.logits(tokens), plain.logits(tokens)
    assert expected.shape == (2, 24, 61)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert plain.backward(TOKENS) == pytest.approx(theirs.backward(TOKENS), rel=1e-6)
    ours, other = plain.gradients(), theirs.gradients()
    assert ours.keys() == other.keys()
    for key, gradient in ours.items():
        same_layout = gradient if gradient.shape == other[key].shape else gradient.T
        if key.endswith("attn.c_proj.weight"):  # square: the layout does not show in the shape
            same_layout = gradient.T
        assert np.linalg.norm(same_layout - other[key]) < 1e-5 * np.linalg.norm(other[key]), key


def test_greedy_tokens_are_the_same_with_and_without_hugging_faces_cache():
    theirs, plain = both("gpt2")
    prompt = TOKENS[0, :4]
    assert np.array_equal(theirs.greedy(prompt, 20), plain.greedy(prompt, 20))
    assert np.array_equal(theirs.greedy(prompt, 40), plain.greedy(prompt, 40))  # past the block


def test_the_schedule_is_a_linear_rise_and_half_a_cosine():
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=3, max_steps=11)
    rates = [reference.learning_rate(config, step) for step in (0, 2, 3, 7, 11, 50)]
    assert rates == pytest.approx([0.25, 0.75, 1.0, 0.6, 0.2, 0.2])


def test_values_are_copies_that_can_be_put_back():
    plain = both("nanogpt")[1]
    before = plain.values()
    update = plain.optimizer(TrainConfig(learning_rate=1e-2, warmup_steps=0))
    plain.backward(TOKENS)
    update(0)
    assert all(not np.array_equal(before[name], now) for name, now in plain.values().items())
    plain.restore(before)
    assert all(np.array_equal(before[name], now) for name, now in plain.values().items())


def test_clipping_is_torchs_where_torchs_norm_is_sound():
    parameters = [torch.nn.Parameter(torch.zeros(7, 5)), torch.nn.Parameter(torch.zeros(3))]
    for largest in (0.5, 100.0):
        for number, parameter in enumerate(parameters):
            draw = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        ours = [torch.nn.Parameter(torch.zeros_like(p)) for p in parameters]
        for mine, theirs in zip(ours, parameters, strict=True):
            mine.grad = theirs.grad.clone()
        torch.nn.utils.clip_grad_norm_(parameters, largest)
        reference._clip(ours, largest)
        for mine, theirs in zip(ours, parameters, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=0)
