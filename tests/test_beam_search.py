"""Beam search against Hugging Face's, and against all continuations there are."""

import itertools

import jax
import numpy as np
import pytest
import small_models

from gptjax import beam_search, model
from gptjax.config import ModelConfig
from gptjax.decode_layout import unstack
from gptjax.interop import huggingface


def test_enough_beams_find_the_likeliest_of_all_continuations():
    config = ModelConfig(1, 2, 8, 6, vocab_size=4)
    params = small_models.random_params(config, scale=1.0)
    every = np.array([*itertools.product(range(4), repeat=3)])
    texts = np.concatenate([np.tile([2, 1], (64, 1)), every], axis=1)
    logits, _ = jax.jit(model.apply, static_argnums=0)(config, params, texts)
    logprobs = np.asarray(jax.nn.log_softmax(logits))[:, 1:4]
    sums = np.take_along_axis(logprobs, every[..., None], -1).sum((1, 2))
    best = np.argsort(-sums)[:5]
    found = beam_search.search(unstack(params, config), np.array([2, 1]), 3, config, beams=32)
    assert [x.tokens.tolist() for x in found[:5]] == every[best].tolist()
    np.testing.assert_allclose([x.score for x in found[:5]], sums[best] / 3, rtol=1e-5)


@pytest.mark.parametrize(("beams", "penalty", "new"), [(2, 1.0, 12), (4, 0.3, 40)])
def test_what_is_found_is_what_transformers_finds(tmp_path, beams, penalty, new):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(beams)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 23}
    settings = transformers.GPT2Config(
        **sizes, initializer_range=0.3, tie_word_embeddings=False, bos_token_id=22, eos_token_id=0
    )
    theirs = transformers.GPT2LMHeadModel(settings).eval()
    theirs.save_pretrained(tmp_path)
    weights = huggingface.read(tmp_path)
    config = weights.config.model.replace(dtype="float32")
    params = unstack(jax.tree.map(jax.numpy.asarray, weights.params), config)
    lengths = set()
    for prompt in ([5], [3, 1, 4, 1] * 3):
        for eot in (0, 7, 13):
            expected = theirs.generate(
                torch.tensor([prompt]), max_length=min(len(prompt) + new, 25), do_sample=False,
                num_beams=beams, num_return_sequences=beams, length_penalty=penalty,
                eos_token_id=eot, pad_token_id=22, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            ours = beam_search.search(
                params, np.array(prompt), new, config, beams=beams, length_penalty=penalty, eot=eot
            )
            for found, text in zip(ours, expected.sequences[:, len(prompt) :], strict=True):
                ids = text.tolist()
                ids = ids[: ids.index(eot)] if eot in ids else ids
                assert found.tokens.tolist() == ids, (prompt, eot)
                lengths.add(len(ids))
            scores = [found.score for found in ours]
            np.testing.assert_allclose(scores, expected.sequences_scores, atol=1e-4)
    assert len(lengths) > 1  # some ended early
