"""Logits are shaped as by Hugging Face's processors."""

import jax
import numpy as np
import pytest

from gptjax import sampling
from gptjax.attention import MASKED
from gptjax.sampling import Sampling

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

filter_logits = jax.jit(sampling.filter_logits)


@pytest.mark.parametrize("vocabulary", [61, 2000])
def test_filters_keep_what_hugging_faces_warpers_keep(vocabulary):
    draw = np.random.default_rng(0)
    for _ in range(100):
        logits = draw.standard_normal((2, vocabulary)).astype("f4") * 3
        temperature, k, p = draw.uniform(0.1, 5), int(draw.integers(71)), draw.uniform(0.01, 1.2)
        p, min_p = min(p, 1.0), max(0.0, draw.uniform(-0.3, 0.3))
        warpers = [transformers.TemperatureLogitsWarper(temperature)]
        warpers += [transformers.TopKLogitsWarper(k)] if k else []
        warpers += [transformers.TopPLogitsWarper(p)] if p < 1 else []
        warpers += [transformers.MinPLogitsWarper(min_p)] if min_p else []
        expected = torch.from_numpy(logits)
        for warper in warpers:
            expected = warper(None, expected)
        kept = expected.isfinite().numpy()
        ours = np.asarray(filter_logits(logits, Sampling(temperature, k, p, min_p)))
        # Ours sums the largest first, theirs the smallest: seeds where rounding decides are none
        # of these.
        assert np.array_equal(ours > MASKED, kept)
        np.testing.assert_allclose(ours[kept], expected.numpy()[kept], rtol=1e-5)


def test_a_repetition_penalty_is_hugging_faces():
    draw = np.random.default_rng(0)
    for penalty in (0.8, 1.3, 2.0):
        logits = draw.standard_normal((3, 61)).astype("f4")
        text = draw.integers(61, size=(3, 20))
        seen = np.zeros((3, 61), bool)
        np.put_along_axis(seen, text, True, axis=1)
        theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        expected = theirs(torch.from_numpy(text), torch.from_numpy(logits)).numpy()
        np.testing.assert_allclose(sampling.penalize(logits, seen, penalty), expected, rtol=1e-6)


def test_greedy_text_with_a_penalty_is_what_transformers_writes(tiny, tmp_path):
    run, prompt = tiny.run, "RICH"
    run.save_pretrained(tmp_path / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ids = torch.from_numpy(run.tokenizer.encode(prompt))[None].long()
    theirs = [
        model.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=penalty)[0, 4:]
        for penalty in (1.0, 1.3)
    ]
    assert theirs[0].tolist() != theirs[1].tolist()
    settings = {"max_new_tokens": 12, "temperature": 0, "repetition_penalty": 1.3}
    assert run.generate(prompt, **settings) == run.tokenizer.decode(theirs[1].tolist())
