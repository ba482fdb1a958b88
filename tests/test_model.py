"""The network: shapes, causality, its cache, and numerics against PyTorch and Hugging Face."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from gptjax import model, state_dict, torch_gpt
from gptjax.config import PRESETS, ModelConfig
from gptjax.model import attention_kernel, init_cache, sinusoids
from gptjax.train import cross_entropy

apply = jax.jit(model.apply, static_argnames="config")
init_params = jax.jit(model.init_params, static_argnames=("config", "seed"))

SMALL = ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=24, vocab_size=61)
VARIANTS = {
    "gpt2": SMALL,
    "nanogpt": dataclasses.replace(SMALL, bias=False, gelu="erf"),
    "untied_without_qkv_bias": dataclasses.replace(SMALL, tied_head=False, qkv_bias=False),
    "sinusoidal": dataclasses.replace(SMALL, position="sinusoidal"),
    "banded": dataclasses.replace(SMALL, attention_pattern=("dense", "banded"), attention_window=5),
    "padded_vocabulary": dataclasses.replace(SMALL, vocab_multiple=64),
    "no_layers": dataclasses.replace(SMALL, n_layer=0),
}


def tokens_for(config: ModelConfig, batch: int = 2, seed: int = 0) -> np.ndarray:
    shape = (batch, config.block_size)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def lively(config: ModelConfig, seed: int = 0):
    """Parameters far from their small initial values, so that every path matters."""
    params = init_params(config, seed)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [x + 0.15 * rng.standard_normal(x.shape).astype("f4") for x in leaves]
    return jax.tree.unflatten(tree, map(jnp.asarray, noisy))


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, "f8"), np.asarray(theirs, "f8")
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def count(config: ModelConfig) -> int:
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


# ------------------------------------------------------------------------------- sizes

# GPT-2: the counts of the released models; GPT-3: table 2.1 of arXiv:2005.14165.
GPT2 = {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}
GPT3 = {
    "gpt3-small": 125e6, "gpt3-medium": 350e6, "gpt3-large": 760e6, "gpt3-xl": 1.3e9,
    "gpt3-2.7b": 2.7e9, "gpt3-6.7b": 6.7e9, "gpt3-13b": 13e9, "gpt3-175b": 175e9,
}  # fmt: skip


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_sizes_have_exactly_the_released_parameter_counts(name):
    assert count(PRESETS[name]) == GPT2[name]


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_sizes_are_within_3_percent_of_the_paper(name):
    assert count(PRESETS[name]) == pytest.approx(GPT3[name], rel=0.03)


def test_untied_124m_without_qkv_bias_has_163009536_parameters():
    config = dataclasses.replace(PRESETS["gpt2"], tied_head=False, qkv_bias=False)
    assert count(config) == 163_009_536


@pytest.mark.parametrize("config", [*VARIANTS.values(), *PRESETS.values()])
def test_num_parameters_counts_what_init_makes(config):
    assert config.num_parameters() == count(config)


def test_gpt3_alternates_dense_and_banded_layers():
    assert PRESETS["gpt3-small"].windows == (2048, 256) * 6
    assert PRESETS["gpt2"].windows == (1024,) * 12


def test_two_sentences_of_four_tokens_give_2_by_4_by_50257_logits():
    # "Every effort moves you" and "Every day holds a" in GPT-2's encoding.
    tokens = np.array([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])
    config = dataclasses.replace(PRESETS["gpt2"], tied_head=False, qkv_bias=False, dropout=0.1)
    logits, cache = apply(config, init_params(config, 0), tokens)
    assert logits.shape == (2, 4, 50257) and logits.dtype == jnp.float32 and cache is None
    assert np.isfinite(logits).all()


def test_initial_weights_have_gpt2s_spread():
    params = init_params(ModelConfig(8, 4, 128, 64, vocab_size=500), 0)
    h = params["h"]
    for array in (params["wte"], params["wpe"], h["attn"]["c_attn"]["kernel"]):
        assert np.std(array) == pytest.approx(0.02, rel=0.03)
    for part in (h["attn"], h["mlp"]):
        assert np.std(part["c_proj"]["kernel"]) == pytest.approx(0.02 / 4, rel=0.03)
        assert not part["c_proj"]["bias"].any()
    # Every layer draws its own.
    assert not np.allclose(h["mlp"]["c_fc"]["kernel"][0], h["mlp"]["c_fc"]["kernel"][1])


# --------------------------------------------------------------------------- causality


@pytest.mark.parametrize("name", ["gpt2", "banded", "untied_without_qkv_bias"])
def test_gradients_reach_no_later_position_and_every_earlier_one(name):
    config, at = VARIANTS[name], 13
    params, tokens = lively(config), tokens_for(config, batch=1)

    def logit_sum(wpe):
        return (apply(config, params | {"wpe": wpe}, tokens)[0][0, at] ** 2).sum()

    reach = np.abs(jax.jit(jax.grad(logit_sum))(params["wpe"])).max(axis=1)
    assert (reach[: at + 1] > 0).all()
    assert (reach[at + 1 :] == 0).all()


def test_a_banded_layer_sees_its_window_and_no_more():
    config = dataclasses.replace(
        SMALL, n_layer=1, attention_pattern=("banded",), attention_window=5
    )
    params, tokens, at = lively(config), tokens_for(config, batch=1), 13

    def logit_sum(wpe):
        return (apply(config, params | {"wpe": wpe}, tokens)[0][0, at] ** 2).sum()

    reach = np.abs(jax.jit(jax.grad(logit_sum))(params["wpe"])).max(axis=1)
    assert np.flatnonzero(reach).tolist() == [9, 10, 11, 12, 13]


# --------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_every_gradient_match_a_pytorch_gpt(name):
    config = VARIANTS[name]
    params = lively(config)
    tokens = tokens_for(dataclasses.replace(config, block_size=config.block_size + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    tensors = state_dict.to_torch(params, config, "out_in", padding=False)
    theirs = torch_gpt.from_state_dict(config, tensors)
    torch_logits = theirs(torch.from_numpy(inputs))
    torch_loss = torch_gpt.cross_entropy(torch_logits, torch.from_numpy(targets))
    torch_loss.backward()

    def loss_of(params):
        logits, _ = apply(config, params, inputs)
        return cross_entropy(logits, targets).mean(), logits

    with jax.default_matmul_precision("highest"):
        (loss, logits), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert relative_error(logits, torch_logits.detach()) < 1e-5
    assert float(loss) == pytest.approx(torch_loss.item(), rel=1e-6)
    assert not grads["wte"][config.vocab_size :].any()
    ours = state_dict.to_torch(grads, config, "out_in", padding=False)
    for parameter, value in theirs.named_parameters():
        assert relative_error(ours[parameter], value.grad) < 1e-5, parameter


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_match_hugging_face_gpt2(tied):
    config = dataclasses.replace(SMALL, tied_head=tied)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, tie_word_embeddings=tied,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.15,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip

    def ours_from(tensors):
        """Hugging Face's Conv1D already stores [in, out]; only names and stacking differ."""
        # A tied head appears under its embedding's name only.
        tree = {"h": {}}
        for name, tensor in tensors.items():
            parts = name.removeprefix("transformer.").removesuffix(".weight").split(".")
            array = tensor.detach().numpy()
            if parts[0] in ("wte", "wpe", "lm_head"):
                tree[parts[0]] = array
                continue
            node = tree
            layer = int(parts.pop(1)) if parts[0] == "h" else None
            leaf = "bias" if parts[-1] == "bias" else "kernel"
            parts = parts[:-1] if leaf == "bias" else parts
            if parts[-1].startswith("ln_") and leaf == "kernel":
                leaf = "scale"
            for part in parts:
                node = node.setdefault(part, {})
            if layer is None:
                node[leaf] = array
            else:
                node.setdefault(leaf, []).append(array)
        is_stack = lambda x: isinstance(x, list)  # noqa: E731
        return jax.tree.map(
            lambda x: np.stack(x) if isinstance(x, list) else x, tree, is_leaf=is_stack
        )

    params = ours_from(dict(theirs.named_parameters()))
    tokens = torch.from_numpy(tokens_for(config))
    output = theirs(tokens, labels=tokens)
    output.loss.backward()

    def loss_of(params):
        logits, _ = apply(config, params, tokens.numpy())
        return cross_entropy(logits[:, :-1], tokens.numpy()[:, 1:]).mean(), logits

    with jax.default_matmul_precision("highest"):
        (_, logits), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert relative_error(logits, output.logits.detach()) < 1e-5
    expected = ours_from({n: p.grad for n, p in theirs.named_parameters()})
    errors = jax.tree.map(relative_error, grads, expected)
    worst = max(jax.tree.leaves_with_path(errors), key=lambda item: item[1])
    assert worst[1] < 1e-5, worst


def test_without_layers_it_is_embeddings_and_a_linear_head():
    config = VARIANTS["no_layers"]
    params, tokens = lively(config), tokens_for(config)
    x = np.asarray(params["wte"])[tokens] + np.asarray(params["wpe"])
    expected = x @ np.asarray(params["wte"]).T
    assert set(params) == {"wte", "wpe"}
    assert relative_error(apply(config, params, tokens)[0], expected) < 1e-6


def test_sinusoids_are_those_of_attention_is_all_you_need():
    table = sinusoids(50, 8)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert table[7, 4] == pytest.approx(math.sin(7 / 10000 ** (4 / 8)))
    assert table[7, 5] == pytest.approx(math.cos(7 / 10000 ** (4 / 8)))


def test_bfloat16_stays_near_float32_and_returns_float32():
    params, tokens = lively(SMALL), tokens_for(SMALL)
    exact, _ = apply(SMALL, params, tokens)
    rough, _ = apply(dataclasses.replace(SMALL, dtype="bfloat16"), params, tokens)
    assert rough.dtype == jnp.float32
    assert 0 < relative_error(rough, exact) < 3e-2


@pytest.mark.parametrize("change", [{"remat": True}, {"scan_unroll": 1}, {"scan_unroll": 2}])
def test_remat_and_unrolling_change_no_gradient(change):
    params, tokens = lively(SMALL), tokens_for(SMALL)

    def grads(config):
        return jax.jit(jax.grad(lambda p: apply(config, p, tokens)[0].var()))(params)

    changed = grads(dataclasses.replace(SMALL, **change))
    for a, b in zip(jax.tree.leaves(grads(SMALL)), jax.tree.leaves(changed), strict=True):
        assert relative_error(a, b) < 1e-5


def test_remat_holds_far_fewer_bytes():
    config = dataclasses.replace(SMALL, n_layer=8, block_size=256)
    params, tokens = init_params(config, 0), tokens_for(config)

    def scratch(config):
        grad = jax.jit(jax.grad(lambda p: model.apply(config, p, tokens)[0].var()))
        return grad.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert scratch(dataclasses.replace(config, remat=True)) < scratch(config) / 2


# ------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_logits_equal_uncached_ones_however_the_text_is_cut(name):
    config = VARIANTS[name]
    params, tokens = lively(config), tokens_for(config)
    whole, _ = apply(config, params, tokens)
    cache = init_cache(config, batch=2, slots=config.block_size)
    parts, start = [], 0
    for size in (5, 1, 1, 10, 7):
        logits, cache = apply(config, params, tokens[:, start : start + size], cache)
        parts.append(logits)
        start += size
    assert start == config.block_size == cache.length
    assert relative_error(np.concatenate(parts, axis=1), whole) < 1e-5


def test_one_position_s_logits_are_those_of_all_positions():
    params, tokens = lively(SMALL), tokens_for(SMALL)
    whole, _ = apply(SMALL, params, tokens)
    one, _ = apply(SMALL, params, tokens, logits_at=jnp.int32(7))
    assert one.shape == (2, 1, 61)
    assert relative_error(one[:, 0], whole[:, 7]) < 1e-6


def test_more_tokens_than_the_block_are_refused():
    with pytest.raises(ValueError, match="25 tokens do not fit block_size 24"):
        apply(SMALL, init_params(SMALL, 0), np.zeros((1, 25), int))


@pytest.mark.parametrize("name", VARIANTS)
def test_unstacked_parameters_are_the_same_model(name):
    config = VARIANTS[name]
    params, tokens = lively(config), tokens_for(config)
    apart = model.unstack(params, config)
    assert "h" not in apart and sum(key.startswith("h_") for key in apart) == config.n_layer
    expected, _ = apply(config, params, tokens)
    assert relative_error(apply(config, apart, tokens)[0], expected) < 1e-5
    at, _ = apply(config, apart, tokens, logits_at=jnp.int32(5))
    assert relative_error(at, expected[:, 5:6]) < 1e-5
    # And with a cache, read in two parts.
    cache = init_cache(config, len(tokens), config.block_size, stacked="h_0" not in apart)
    _, cache = apply(config, apart, tokens[:, :7], cache)
    rest, _ = apply(config, apart, tokens[:, 7:], cache, logits_at=jnp.int32(3))
    assert relative_error(rest, expected[:, 10:11]) < 1e-5


def test_unstacked_matrices_are_in_the_compute_precision_and_the_old_ones_freed():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = lively(config)
    apart = model.unstack(params, config, consume=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(params["h"]))
    # The weights are rounded earlier, which takes no further from float32.
    tokens = tokens_for(SMALL)
    exact, _ = apply(SMALL, lively(SMALL), tokens)
    stacked, _ = apply(config, lively(config), tokens)
    error = relative_error(apply(config, apart, tokens)[0], exact)
    assert error < 1.5 * relative_error(stacked, exact)
    norm, attention = apart["h_1"]["ln_1"], apart["h_1"]["attn"]
    assert (norm["scale"].dtype, norm["bias"].dtype) == (jnp.float32, jnp.float32)
    assert attention["c_attn"]["kernel"].dtype == apart["wte"].dtype == jnp.bfloat16


# ---------------------------------------------------------------------------- dropout


def test_dropout_acts_in_training_only_and_everywhere_the_paper_has_it():
    config = dataclasses.replace(SMALL, dropout=0.5)
    params, tokens = lively(config), tokens_for(config)
    calm, _ = apply(config, params, tokens)
    assert np.array_equal(calm, apply(SMALL, params, tokens)[0])
    wild, _ = apply(config, params, tokens, dropout_key=jax.random.key(0))
    again, _ = apply(config, params, tokens, dropout_key=jax.random.key(0))
    other, _ = apply(config, params, tokens, dropout_key=jax.random.key(1))
    assert np.array_equal(wild, again)
    assert not np.allclose(wild, calm) and not np.allclose(wild, other)
    # Without layers only the embedding's dropout is left: half of its entries, the rest doubled.
    bare = dataclasses.replace(config, n_layer=0, vocab_size=61)
    eye = {"wte": jnp.eye(61, 32), "wpe": jnp.ones((24, 32))}
    logits, _ = apply(bare, eye, np.full((400, 24), 60), dropout_key=jax.random.key(0))
    assert set(np.unique(logits[..., :32])) == {0.0, 2.0}
    assert np.mean(np.asarray(logits[..., :32]) == 0) == pytest.approx(0.5, abs=0.01)


def test_hashed_bits_are_even_and_independent_of_neighbours_and_other_keys():
    keys = jax.random.bits(jax.random.key(0), (4, 2), jnp.uint32)
    bits = np.asarray(model.hashed_bits(keys, 1 << 18))
    assert len(np.unique(bits[0])) == 1 << 18  # one to one
    for row in bits:
        for byte in row[:, None].view("u1").T:
            assert scipy.stats.chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-4
    # Chance makes correlations of about 1 / sqrt(2^18) = 0.002.
    masks = (bits >= np.uint32(0.2 * 2**32)).astype("f8")
    for lag in (1, 2, 64, 384, 4096):
        assert abs(np.corrcoef(masks[0, :-lag], masks[0, lag:])[0, 1]) < 0.01
    assert np.abs(np.corrcoef(masks) - np.eye(4)).max() < 0.01
    # A seed's neighbours are no better known than strangers.
    near = np.asarray(
        model.hashed_bits(keys[:1] ^ jnp.array([[1, 0], [0, 1]], jnp.uint32), 1 << 18)
    )
    flipped = np.bitwise_count(near ^ bits[:1]).mean(axis=1) / 32
    np.testing.assert_allclose(flipped, 0.5, atol=0.02)


@pytest.mark.parametrize("form", ["tanh", "erf"])
def test_gelu_and_its_slope_are_pytorchs(form):
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -0.0, 1e-20, -40, 40]]).astype("f4")
    theirs = torch.from_numpy(x).requires_grad_()
    approximate = {"tanh": "tanh", "erf": "none"}[form]
    value = torch.nn.functional.gelu(theirs, approximate=approximate)
    value.sum().backward()
    ours, slope = jax.vmap(jax.value_and_grad(lambda x: model.gelu(x, form)))(x)
    np.testing.assert_allclose(ours, value.detach(), rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(slope, theirs.grad, rtol=1e-5, atol=5e-6)


def test_the_attention_kernel_on_a_cpu_is_xla_and_says_why():
    kernel, why = attention_kernel(SMALL, train=True)
    assert kernel == "xla" and "GPU" in why
