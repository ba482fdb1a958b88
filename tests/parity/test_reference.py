"""The PyTorch side: its two models agree with each other, and its schedule with arithmetic."""

import dataclasses

import numpy as np
import pytest
from small_models import SMALL, VARIANTS, random_params

from gptjax.config import OptimizerConfig, TrainConfig
from gptjax.interop import parameter_names

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
from gptjax.parity import reference, torch_gpt  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 23, (2, 13))


def both(name: str) -> list[reference.Reference]:
    config, params = VARIANTS[name], random_params(VARIANTS[name], scale=0.1)
    return [reference.Reference(params, config, a, "float32") for a in ("hf", "nanogpt-style")]


@pytest.mark.parametrize("name", VARIANTS)
def test_hugging_faces_model_and_the_plain_one_agree(name):
    theirs, plain = both(name)
    tokens = torch.from_numpy(TOKENS[:, :-1])
    with torch.no_grad():
        expected, found = theirs.logits(tokens), plain.logits(tokens)
    assert expected.shape == (2, 12, 23)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert plain.backward(TOKENS) == pytest.approx(theirs.backward(TOKENS), rel=1e-6)
    ours, other = plain.gradients(), theirs.gradients()
    assert ours.keys() == other.keys()
    linear = parameter_names.torch_parameters(VARIANTS[name], "out_in")
    for key, gradient in ours.items():
        gradient = gradient.T if linear[key].transposed else gradient
        assert np.linalg.norm(gradient - other[key]) < 1e-5 * np.linalg.norm(other[key]), key


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "padded"])
def test_our_names_order_and_shapes_are_those_of_a_pytorch_gpt(name):
    theirs = torch_gpt.TorchGPT(VARIANTS[name]).named_parameters()
    ours = parameter_names.torch_parameters(VARIANTS[name], "out_in")
    assert [(n, p.shape) for n, p in ours.items()] == [(n, tuple(p.shape)) for n, p in theirs]


@pytest.mark.parametrize("tied", [True, False])
def test_our_names_and_shapes_are_those_of_transformers_gpt2(tied):
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=23,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).named_parameters()
    ours = parameter_names.torch_parameters(dataclasses.replace(SMALL, tied_head=tied), "in_out")
    assert {n: p.shape for n, p in ours.items()} == {n: tuple(p.shape) for n, p in theirs}


def test_greedy_tokens_are_the_same_with_hugging_faces_cache():
    theirs, plain = both("gpt2")
    prompt = TOKENS[0, :4]
    for count in (8, 20):  # within the block and past it
        assert np.array_equal(theirs.greedy(prompt, count), plain.greedy(prompt, count))


def test_the_schedule_is_a_linear_rise_and_half_a_cosine():
    rates = OptimizerConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=3)
    config = TrainConfig(optimizer=rates, max_steps=11)
    found = [torch_gpt.learning_rate(config, step) for step in (0, 2, 3, 7, 11, 50)]
    assert found == pytest.approx([0.25, 0.75, 1.0, 0.6, 0.2, 0.2])


def test_values_are_copies_that_can_be_put_back():
    plain = both("no bias")[1]
    before = plain.values()
    update = plain.optimizer(TrainConfig(optimizer=OptimizerConfig(1e-2, warmup_steps=0)))
    plain.backward(TOKENS)
    update(0)
    assert all(not np.array_equal(before[name], now) for name, now in plain.values().items())
    plain.restore(before)
    assert all(np.array_equal(before[name], now) for name, now in plain.values().items())


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_is_torchs_where_torchs_norm_is_sound(limit):
    ours, expected = ([torch.nn.Parameter(torch.zeros(7, 5)), torch.nn.Parameter(torch.zeros(3))]
                      for _ in range(2))  # fmt: skip
    for x, y in zip(ours, expected, strict=True):
        x.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.ndim))
        y.grad = x.grad.clone()
    torch.nn.utils.clip_grad_norm_(expected, limit)
    reference.clip(ours, limit)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=0)
