"""Many prompts in one batch come back in order, each with the text it would have alone."""

import jax
import numpy as np
import pytest

from gptjax.decode_layout import unstack
from gptjax.generation import prompt_ids
from gptjax.generation_config import GenerationConfig
from gptjax.serving import batch
from gptjax.serving.completions import Prompt
from gptjax.serving.decoder import Decoder
from gptjax.serving.engine import Engine

PROMPTS = ["RICHARD:\n", "n", "now is the winter", "CLARENCE:\n" * 3]


@pytest.fixture(scope="module")
def engine(tiny):
    run = tiny.run
    return Engine(Decoder(unstack(run.params, run.config), run.config, rows=3), queue=6)


def complete(engine, run, prompts=PROMPTS, logprobs=None, **settings):
    given = [Prompt(text, prompt_ids(run.tokenizer, text)) for text in prompts]
    how = GenerationConfig(**settings)
    return list(batch.complete(engine, run.tokenizer, given, how, logprobs))


@pytest.mark.parametrize("overflow", ["exact", "half", "stop"])
def test_each_has_the_text_it_would_have_alone(tiny, engine, overflow):
    how = {"max_new_tokens": 20, "num_samples": 2, "seed": 3, "overflow": overflow}
    found = complete(engine, tiny.run, **how, repetition_penalty=1.1)
    alone = [tiny.run.generate(prompt, **how, repetition_penalty=1.1) for prompt in PROMPTS]
    assert [each["text"] for each in found] == [text for texts in alone for text in texts]
    assert [each["prompt"] for each in found] == [x for x in PROMPTS for _ in range(2)]
    assert [each["sample"] for each in found] == [0, 1] * len(PROMPTS)
    # A character is a token; the last one drawn needs no room in the block of 16.
    made = [min(20, max(0, 17 - len(p))) if overflow == "stop" else 20 for p in PROMPTS]
    assert [each["completion_tokens"] for each in found] == [n for n in made for _ in range(2)]


def test_a_stop_text_ends_one_of_them(tiny, engine):
    first, second = complete(engine, tiny.run, PROMPTS[:2], max_new_tokens=20)
    stop = next(x for x in (first["text"][i : i + 3] for i in range(12)) if x not in second["text"])
    found = complete(engine, tiny.run, PROMPTS[:2], max_new_tokens=20, stop=(stop,))
    assert [x["finish_reason"] for x in found] == ["stop", "length"]
    assert found[0]["text"] == first["text"].partition(stop)[0]
    assert found[0]["completion_tokens"] == len(found[0]["text"]) + 3 and found[1] == second


def test_log_probabilities_are_the_models(tiny, engine):
    run = tiny.run
    (found,) = complete(engine, run, ["RICH"], logprobs=2, max_new_tokens=9, temperature=2.0)
    expected = jax.nn.log_softmax(run.logits("RICH" + found["text"]))[3:-1]
    ids = run.tokenizer.encode(found["text"])
    told = found["logprobs"]
    assert "".join(told["tokens"]) == found["text"]
    assert told["token_logprobs"] == pytest.approx(expected[np.arange(9), ids].tolist(), abs=1e-4)
    likeliest = run.tokenizer.decode(np.asarray(expected).argmax(axis=1).tolist())
    assert "".join(next(iter(top)) for top in told["top_logprobs"]) == likeliest
