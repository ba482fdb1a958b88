"""Tokens become text piece by piece, and it ends where it shall."""

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer
from gptjax.errors import UserError
from gptjax.generation import GrowingText, grow, prompt_ids
from gptjax.generation_config import GenerationConfig

LETTERS = CharTokenizer("\n abcdef")
BYTES = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "expected"),
    [
        (LETTERS, None, [0]),
        (CharTokenizer("abc"), None, [0]),  # a text without line ends
        (LETTERS, "ab", [2, 3]),
        (BYTES, "", [BYTES.eot]),
        (BYTES, None, [10]),
    ],
)
def test_a_prompt_is_never_without_a_token(tokenizer, prompt, expected):
    assert prompt_ids(tokenizer, prompt).tolist() == expected


def test_a_prompt_that_is_none_is_refused():
    with pytest.raises(UserError, match="the prompt is empty"):
        prompt_ids(LETTERS, "")
    with pytest.raises(UserError, match="the prompt is empty"):
        prompt_ids(LETTERS, "é", skip_unknown=True)


def grown(tokenizer, text, cut, **options):
    """(the text, the pieces taken) of a text that comes `cut` tokens at a time."""
    ids = text if isinstance(text, list) else tokenizer.encode(text).tolist()
    growing, pieces = GrowingText(tokenizer, **options), []
    for at in range(0, len(ids), cut):
        growing.extend(np.array(ids[at : at + cut]))
        pieces.append(growing.take())
    growing.ended = True
    return growing.text, [*pieces, growing.take()]


@given(st.text("abc ", max_size=30), st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
       st.integers(1, 7))  # fmt: skip
@example("a a", [" ", "a a"], 1)
def test_text_ends_before_the_first_stop_however_it_comes(text, stops, cut):
    complete = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    found, pieces = grown(LETTERS, text, cut, stops=stops)
    assert found == text[: min(complete, default=(0, len(text)))[1]]
    assert found == "".join(pieces)
    assert not any(stop in found for stop in stops)


@given(st.text("abc", max_size=60), st.lists(st.text("abc", min_size=1, max_size=4), max_size=2))
@example("é" * 5, [])
def test_what_is_not_kept_does_not_change_what_comes(text, stops):
    _, expected = grown(BYTES, text, 1, stops=stops)
    growing, pieces = GrowingText(BYTES, stops), []
    for id_ in BYTES.encode(text):
        growing.extend(np.array([id_]))
        pieces.append(growing.take(keep=False))
        held = max(map(len, stops), default=1)
        assert growing.ended or len(growing.text) <= held
    growing.ended = True
    assert [*pieces, growing.take()] == expected


def test_a_very_long_stop_costs_no_more_than_the_text():
    text = GrowingText(CharTokenizer("ab"), ["a" * 10**7])
    began = time.monotonic()
    text.extend(np.zeros(20, np.int32))
    assert text.take() == "" and time.monotonic() - began < 1


def test_the_beginning_of_a_stop_is_held_back_until_it_is_none():
    text, pieces = grown(LETTERS, "abcabdab", 1, stops=["abd"])
    assert (text, pieces) == ("abc", ["", "", "abc", "", "", "", "", "", ""])
    text, pieces = grown(LETTERS, "ab", 1, stops=["abd"])
    assert (text, pieces) == ("ab", ["", "", "ab"])


def test_a_character_of_several_bytes_is_held_back_until_whole():
    text, pieces = grown(BYTES, "aé中", 1)
    assert (text, pieces) == ("aé中", ["a", "", "é", "", "", "中", ""])


def test_the_end_of_text_token_ends_it():
    ids = [2, 3, 7, 4, 5]  # "ab", the end, "cd"
    text, pieces = grown(LETTERS, ids, 2, eot=7)
    assert (text, pieces) == ("ab", ["ab", "", "", ""])
    assert grown(LETTERS, ids, 2)[0] == "abfcd"


def test_texts_grow_until_all_have_ended_and_then_show_all():
    texts = [GrowingText(LETTERS, ["abd"]), GrowingText(LETTERS, ["b"])]
    pieces, seen = [np.stack([LETTERS.encode(letter)] * 2) for letter in "ab"], []
    for count in grow(texts, pieces):
        seen.append((count, *(text.take() for text in texts)))
    assert seen == [(1, "", "a"), (1, "", ""), (0, "ab", "")]


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_p": 0.0}, {"stop": ("",)}])
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        GenerationConfig(**setting)
