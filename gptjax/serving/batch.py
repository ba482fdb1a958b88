"""Many prompts without a server: they share the rows of an engine, and come back in order."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.data.tokenizers import Tokenizer
from gptjax.generation_config import GenerationConfig
from gptjax.sampling import Sampling
from gptjax.serving.completions import Choice, Options, Order, Prompt, joined
from gptjax.serving.engine import Engine, Stream


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: GenerationConfig,
    logprobs: int | None = None,
) -> Iterator[dict[str, Any]]:
    """`num_samples` of each prompt, in order, each as soon as it and those before it are whole: the
    texts that `sampling.generate` draws for one prompt after the other. As JSON values; `logprobs`:
    so many alternatives of each token, and OpenAI's form."""
    n, block = settings.num_samples, engine.decoder.config.block_size
    options = Options(
        **Sampling.of(settings)._asdict(), max_tokens=settings.max_new_tokens, n=n,
        stop=settings.stop, logprobs=logprobs, ignore_eos=settings.ignore_end_of_text,
        return_token_ids=True,
    )  # fmt: skip
    order = Order(options, list(prompts), settings.seed)
    updates: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)

    def stream(index: int) -> Stream:
        prompt, sample = order.prompts[index // n], index % n
        most = settings.max_new_tokens
        if settings.overflow == "stop":  # the last token drawn need not fit
            most = min(most, max(0, block + 1 - len(prompt.ids)))
        choice = Choice(index, prompt, order, tokenizer, lambda x: updates[index].append(x))
        request = dataclasses.replace(
            choice.stream().request, max_new_tokens=most, seed=settings.seed, sample=sample,
            exact=settings.overflow == "exact",
        )  # fmt: skip
        return Stream(request, choice)

    total = len(prompts) * n
    waiting = map(stream, range(total))
    for index in range(total):
        while not updates[index] or updates[index][-1]["finish_reason"] is None:
            engine.submit(list(itertools.islice(waiting, 2 * engine.decoder.rows - engine.busy)))
            engine.step()
        found = joined(updates.pop(index))
        yield {
            "prompt": order.prompts[index // n].text,
            "text": found["text"],
            "seed": settings.seed,
            "sample": index % n,
            "finish_reason": found["finish_reason"],
            "completion_tokens": len(found["token_ids"]),
        } | ({} if logprobs is None else {"logprobs": found["logprobs"]})
