"""Logit filters keep what Hugging Face's warpers keep."""

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
        p = min(p, 1.0)
        warpers = [transformers.TemperatureLogitsWarper(temperature)]
        warpers += [transformers.TopKLogitsWarper(k)] if k else []
        warpers += [transformers.TopPLogitsWarper(p)] if p < 1 else []
        expected = torch.from_numpy(logits)
        for warper in warpers:
            expected = warper(None, expected)
        kept = expected.isfinite().numpy()
        ours = np.asarray(filter_logits(logits, Sampling(temperature, k, p)))
        # Ours sums the largest first, theirs the smallest: seeds where rounding decides are none
        # of these.
        assert np.array_equal(ours > MASKED, kept)
        np.testing.assert_allclose(ours[kept], expected.numpy()[kept], rtol=1e-5)
