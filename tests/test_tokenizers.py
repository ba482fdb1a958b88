"""Round trips by property, GPT-2's ids by known values, and tokenizers that travel as JSON."""

import json

import pytest
import tiktoken
from conftest import TEXT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax import tokenizers
from gptjax.errors import UserError
from gptjax.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer

# All bytes and a few merges: GPT-2's algorithm without its 50,000 merges, for any machine.
TINY_RANKS = {bytes([b]): b for b in range(256)} | {
    piece: 256 + n for n, piece in enumerate([b" t", b"he", b" the", b"in", b"\n\n", b"  "])
}


try:
    GPT2 = Gpt2Tokenizer()
except UserError:
    GPT2 = None

needs_gpt2 = pytest.mark.skipif(
    GPT2 is None, reason="GPT-2's merges are not on this machine, and there is no network"
)


@pytest.fixture(scope="module")
def pieces() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train([TEXT], 400)


@given(st.text())
def test_char_round_trip(text):
    if text.encode("utf-8", "ignore").decode() != text:
        return  # a lone surrogate is in no file
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
@example("'ll <|endoftext|>  \n\n x")
def test_gpt2_algorithm_round_trip(text):
    tokenizer = Gpt2Tokenizer(TINY_RANKS)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids


@needs_gpt2
@settings(max_examples=300)
@given(st.text())
def test_gpt2_encodes_as_tiktoken_does(text):
    ids = GPT2.encode(text)
    assert ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)


@settings(max_examples=300)
@given(text=st.text())
@example("\u2581 a\u2581\0\n\r\n<s></s><unk><0x41>  ")
@example(" ")
def test_sentencepiece_round_trip(pieces, text):
    assert pieces.decode(pieces.encode(text)) == text


@needs_gpt2
def test_gpt2_ids_are_the_documented_ones():
    assert GPT2.encode("Every effort moves you").tolist() == [6109, 3626, 6100, 345]
    assert GPT2.encode("!").tolist() == [0]
    assert (GPT2.n_vocab, GPT2.eot) == (50257, 50256)


def test_char_ids_are_in_code_point_order():
    tokenizer = CharTokenizer("".join(sorted(set("Hello"))))
    assert tokenizer.encode("Hello").tolist() == [0, 1, 2, 2, 3]


def test_an_unknown_character_is_named_or_skipped():
    tokenizer = CharTokenizer("abc")
    with pytest.raises(UserError, match=r"'é' \(U\+00E9, at offset 2\).*--unknown skip"):
        tokenizer.encode("abéc")
    assert tokenizer.encode("abéc\ud800", skip_unknown=True).tolist() == [0, 1, 2]


def test_tokenizers_travel_as_json(pieces):
    for tokenizer in (CharTokenizer("\n aé"), Gpt2Tokenizer(TINY_RANKS), pieces):
        again = tokenizers.from_json(tokenizers.to_json(tokenizer), "here")
        text = "a a\n" if tokenizer.kind == "char" else "the thin é\u2581"
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert (again.n_vocab, again.eot) == (tokenizer.n_vocab, tokenizer.eot)


def test_sentencepiece_has_the_vocabulary_asked_for_or_says_what_fits(pieces):
    assert pieces.n_vocab == 400
    with pytest.raises(UserError, match="value <= "):
        SentencePieceTokenizer.train([TEXT], 100_000)
    with pytest.raises(UserError, match="smaller than required_chars"):
        SentencePieceTokenizer.train([TEXT], 100)


KEYS = st.sampled_from(["kind", "characters", "pieces", "model"])
VALUES = st.sampled_from(["char", "gpt2", "sentencepiece", "", "A A", "zz", 3, None])


@given(st.text() | st.dictionaries(KEYS, VALUES).map(json.dumps))
@example('{"kind": "gpt2", "pieces": "YQ== YQ=="}')
@example('{"kind": "sentencepiece", "model": "AAAA"}')
@example('{"kind": "char", "characters": "aa"}')
@example('{"kind": "char", "characters": 5}')
@example('{"kind": "char", "characters": ""}')
@example("[]")
def test_no_file_raises_anything_but_a_user_error(text):
    try:
        tokenizers.from_json(text, "here")
    except UserError as error:
        assert str(error).startswith("here")
