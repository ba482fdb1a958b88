"""Requests are checked; answers have whole characters, and the right tokens and counts."""

import math

import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer
from gptjax.errors import UserError
from gptjax.sampling import Sampling
from gptjax.serving.completions import Answer, Choice, Limits, attention_of, parse, spell
from gptjax.serving.decoder import Ranks
from gptjax.serving.engine import Piece

LETTERS = CharTokenizer("\n abcdef")
NAMES = "tokens", "token_logprobs", "top_logprobs", "text_offset"
BYTES = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})
LIMITS = Limits(max_tokens=50, prompt_tokens=9, choices=6)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "expected a JSON object"),
        ({"prompt": "a", "max_tokns": 3}, "unknown parameter 'max_tokns'; did you mean max_tokens"),
        ({"prompt": "a", "max_tokens": "3"}, "max_tokens is '3'; expected a whole number"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens -1 must be at least 0"),
        ({"prompt": "a", "max_tokens": 51}, "max_tokens 51 is more than 50"),
        ({"prompt": "a", "temperature": -1}, r"temperature -1.* is outside \[0, 1e6\]"),
        ({"prompt": "a", "temperature": math.nan}, "temperature nan is outside"),
        ({"prompt": "a", "top_p": 0}, "top_p 0.* is outside"),
        ({"prompt": "a", "top_k": -2}, "top_k -2 must be at least 0"),
        ({"prompt": "a", "n": 0}, "n 0 must be at least 1"),
        ({"prompt": ["a", "b"], "n": 4}, r"8 completions \(2 prompts, n 4\); at most 6"),
        ({"prompt": "a", "seed": -1}, "seed -1 must be at least 0"),
        ({"prompt": "a", "seed": 2**31}, "seed 2147483648 must be below"),
        ({"prompt": "a", "stop": ""}, "stop text must not be empty"),
        ({"prompt": "a", "stop": [1]}, "stop is .1.; expected"),
        ({"prompt": "a", "stop": list("abcde")}, "5 stop texts; at most 4"),
        ({"prompt": "a", "logprobs": 11}, "logprobs 11 is more than 10"),
        ({"prompt": "a", "best_of": 2}, "best_of is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "presence_penalty": 1}, "presence_penalty is not supported"),
        ({"prompt": "a", "logit_bias": {"1": 2}}, "logit_bias is not supported"),
        ({"prompt": "a", "stop": ["b", "z" * 257]}, "257 characters; at most 256"),
        ({"promt": "a"}, "unknown parameter 'promt'; did you mean prompt"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "needs stream: true"),
        ({"prompt": "a", "stream_options": []}, "stream_options must be an object"),
        (
            {"prompt": "a", "stream": True, "stream_options": {"include_usge": True}},
            "unknown parameter 'include_usge'; did you mean include_usage",
        ),
        ({"prompt": "x"}, "the character 'x'"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "a prompt is a text, or a list of token ids"),
        ({"prompt": []}, "a prompt is a text"),
        ({"prompt": [[1], []]}, "a prompt is a text"),
        ({"prompt": [1.5]}, "a prompt is a text"),
        ({"prompt": [8]}, "token id 8 is not one of the model's 0 to 7"),
        ({"prompt": "abcdefabcd"}, r"10 tokens of prompts \(10, n 1\); at most 9"),
        ({"prompt": ["abc", "ab"], "n": 2}, r"10 tokens of prompts \(5, n 2\); at most 9"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(body, words):
    with pytest.raises(UserError, match=words):
        parse(body, LETTERS, LIMITS)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[2, 3]]),
        (None, [[0]]),
        (["ab", "c"], [[2, 3], [4]]),
        ([2, 3], [[2, 3]]),
        ([[2, 3], [4]], [[2, 3], [4]]),
    ],
)
def test_a_prompt_may_have_every_form_of_openais(prompt, expected):
    asked = parse({"prompt": prompt, "n": None}, LETTERS, LIMITS)
    assert [each.ids.tolist() for each in asked.prompts] == expected
    assert asked.options.n == 1 and 0 <= asked.seed < 2**31


class Recorder(list):
    """What a choice sends, of tokens that a test makes."""

    def __init__(self, tokenizer, index=0, **body):
        order = parse({"prompt": "a", "max_tokens": 50, "seed": 7} | body, tokenizer, LIMITS)
        self.choice = Choice(index, order.prompts[0], order, tokenizer, self.append)
        self.stream = self.choice.stream()
        self.answer = Answer("m", order, tokenizer)

    def tell(self, ids, last=False):
        """As the engine does: token i has probability 1/2, token 0 1/4, in each place."""
        n = len(ids)
        logprobs = np.full((n, 2), np.log([0.5, 0.25]), np.float32)
        top = np.stack([ids, np.zeros(n, int)], axis=1).astype(np.int32)
        ranks = Ranks(logprobs[:, 0], top, logprobs)
        goes = self.choice(self.stream, Piece(np.array(ids, np.int32), ranks, last))
        assert goes == (self[-1]["finish_reason"] is None if self else True)
        return goes

    @property
    def whole(self):
        return self.answer.whole([self.choice], [dict(update) for update in self])

    @property
    def text(self):
        return "".join(new["text"] for new in self)


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}])
def test_no_half_character_is_sent(more):
    recorder, ids = Recorder(BYTES, **more), list("é中!".encode())
    for id_ in ids:
        recorder.tell([id_])
    recorder.tell([ids[0]], last=True)  # at the very end
    assert [new["text"] for new in recorder if new["text"]] == ["é", "中", "!", "\ufffd"]
    if logprobs := recorder.whole["choices"][0]["logprobs"]:
        assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 2, 3]
        assert (
            logprobs["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]
            and logprobs["tokens"][5] == "!"
        )


def test_a_stop_text_is_not_sent_and_ends_it():
    recorder = Recorder(LETTERS, stop="cd", logprobs=0)
    assert recorder.tell(LETTERS.encode("abc"))
    assert recorder.text == "ab"
    assert not recorder.tell(LETTERS.encode("def"))
    assert (recorder.text, recorder[-1]["finish_reason"]) == ("ab", "stop")
    assert recorder.whole["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 4,
        "total_tokens": 5,
    }
    assert recorder.whole["choices"][0]["logprobs"]["tokens"] == ["a", "b"]


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}])
def test_the_end_of_text_token_ends_it(more):
    recorder = Recorder(BYTES, return_token_ids=True, **more)
    assert not recorder.tell([97, 98, BYTES.eot, 99])
    (choice,) = recorder.whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    assert choice["token_ids"] == [97, 98, BYTES.eot] and choice["prompt_token_ids"] == [97]
    assert recorder.whole["usage"]["completion_tokens"] == 3
    assert not more or choice["logprobs"]["tokens"] == ["a", "b"]


def test_logprobs_have_openais_form():
    recorder = Recorder(LETTERS, logprobs=2, echo=True, max_tokens=2)
    recorder.tell(LETTERS.encode("b"))
    assert recorder[0]["logprobs"]["tokens"] == ["b"]  # as soon as its text is
    recorder.tell(LETTERS.encode("c"), last=True)
    (choice,) = recorder.whole["choices"]
    half, quarter = (pytest.approx(math.log(p), abs=1e-5) for p in (0.5, 0.25))
    assert choice == {
        "index": 0,
        "text": "abc",
        "finish_reason": "length",
        "logprobs": {
            "tokens": ["a", "b", "c"],
            "token_logprobs": [None, half, half],
            "top_logprobs": [None, {"b": half, "\n": quarter}, {"c": half, "\n": quarter}],
            "text_offset": [0, 1, 2],
        },
    }


@pytest.mark.parametrize(
    ("prompt", "text", "tokens", "offsets"),
    [
        ("", "ab", ["<|endoftext|>", "a", "b"], [0, 0, 1]),  # the prompt's is none of the text
        ("é", "éab", ["bytes:\\xc3", "bytes:\\xa9", "a", "b"], [0, 0, 1, 2]),
        ([0x80] * 9, "\ufffd" * 9 + "ab", ["bytes:\\x80"] * 9 + ["a", "b"], [0] * 9 + [9, 10]),
    ],
)
def test_the_echoed_prompt_is_reported_with_the_first_text(prompt, text, tokens, offsets):
    recorder = Recorder(BYTES, prompt=prompt, echo=True, logprobs=1)
    recorder.tell([97])
    first = recorder.answer.chunk(dict(recorder[0]))["choices"][0]
    assert (first["text"], first["logprobs"]["tokens"]) == (text[:-1], tokens[:-1])
    recorder.tell([98], last=True)
    (choice,) = recorder.whole["choices"]
    assert choice["text"] == text and choice["logprobs"]["tokens"] == tokens
    assert choice["logprobs"]["text_offset"] == offsets


class Twins(CharTokenizer):
    """Tokens 2 and 3 are spelled alike."""

    def decode(self, ids):
        return super().decode([2 if id_ == 3 else id_ for id_ in ids])


@pytest.mark.parametrize("drawn", [2, 3])
def test_of_tokens_spelled_alike_the_likeliest_is_reported(drawn):
    recorder = Recorder(Twins("\n abcdef"), logprobs=2)
    top = np.log(np.array([[0.5, 0.25]], np.float32))
    ranks = Ranks(top[:, drawn - 2], np.array([[2, 3]], np.int32), top)
    recorder.choice(recorder.stream, Piece(np.array([drawn], np.int32), ranks, True))
    (reported,) = recorder.whole["choices"][0]["logprobs"]["top_logprobs"]
    assert reported == {"a": pytest.approx(math.log(0.5), abs=1e-5)}


class Counting(Gpt2Tokenizer):
    decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize("id_", [97, 0x80])
def test_reporting_a_prompt_takes_time_that_grows_with_its_length(id_):
    tokenizer, length = Counting({bytes([byte]): byte for byte in range(256)}), 1000
    body = {"prompt": [id_] * length, "echo": True, "logprobs": 1}
    order = parse(body, tokenizer, Limits())
    update = {"index": 0, "prompt_ranks": None, "logprobs": {name: [] for name in NAMES}}
    reported = Answer("m", order, tokenizer).complete(update)["logprobs"]
    assert len(reported["tokens"]) == length and tokenizer.decoded < 9 * length


def test_a_choice_is_drawn_with_its_own_seed():
    assert [Recorder(LETTERS, index=i, n=3).stream.request.seed for i in range(6)] == [7, 8, 9] * 2
    assert Recorder(LETTERS, top_k=8).stream.request.sampling.top_k == 0  # all there are
    assert Recorder(LETTERS, top_k=7).stream.request.sampling.top_k == 7
    sampling = Recorder(LETTERS, min_p=0.1, repetition_penalty=1.2).stream.request.sampling
    assert sampling == Sampling(min_p=0.1, repetition_penalty=1.2)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_text_goes_on_after_the_end_of_text_token_on_request(logprobs):
    for ignore, drawn in ((False, 2), (True, 3)):
        recorder = Recorder(BYTES, logprobs=logprobs, ignore_eos=ignore)
        ids = np.array([97, BYTES.eot, 98], np.int32)
        ranks = Ranks(np.zeros(3), np.zeros((3, 1), np.int32), np.zeros((3, 1)))
        recorder.choice(recorder.stream, Piece(ids, ranks, True))
        (choice,) = recorder.whole["choices"]
        assert recorder.choice.drawn == drawn
        assert choice["finish_reason"] == ("length" if ignore else "stop")
        assert choice["text"] == BYTES.decode(ids.tolist() if ignore else [97])
        assert logprobs is None or len(choice["logprobs"]["tokens"]) == (3 if ignore else 1)


def test_tokens_are_spelled_for_people():
    assert spell(LETTERS, 2) == "a" and spell(BYTES, 0xE4) == "bytes:\\xe4"
    assert spell(BYTES, BYTES.eot) == "<|endoftext|>"


MODEL = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=8)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (3, "expected a JSON object"),
        ({}, "either a text or a list of tokens"),
        ({"text": "a", "tokens": [1]}, "either a text or a list of tokens"),
        ({"text": "ab", "position": 2}, "position must be one of 0 to 1"),
        ({"text": "ab", "position": True}, "position must be"),
        ({"text": "ab", "prompt_tokens": 3}, "prompt_tokens must be one of 1 to 2"),
        ({"tokens": [9]}, "token id 9"),
    ],
)
def test_bad_requests_for_attention_are_refused(body, words):
    with pytest.raises(UserError, match=words):
        attention_of(body, LETTERS, MODEL)


def test_attention_is_asked_of_what_the_token_saw():
    ids = [1, 2, 3, 4, 5, 6, 7]
    seen, start = attention_of({"tokens": ids, "prompt_tokens": 2}, LETTERS, MODEL)
    # 4 was the last of a full block; then 5 saw 4, and what came after.
    assert (seen.tolist(), start) == ([4, 5, 6, 7], 3)
    seen, start = attention_of({"tokens": ids, "position": 3, "prompt_tokens": 2}, LETTERS, MODEL)
    assert (seen.tolist(), start) == ([1, 2, 3, 4], 0)
    assert attention_of({"text": "ab"}, LETTERS, MODEL)[0].tolist() == [2, 3]
