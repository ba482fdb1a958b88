"""Round trips by property, GPT-2's ids by known values, and tokenizers that travel as JSON."""

import json

import pytest
import tiktoken
from helpers import TEXT
from hypothesis import example, given
from hypothesis import strategies as st

from gptjax.data import tokenizers
from gptjax.data.tokenizers import CharTokenizer, SentencePieceTokenizer
from gptjax.errors import UserError


@given(st.text())
def test_char_round_trip(text):
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
@example("'ll <|endoftext|>  \n\n x")
def test_gpt2_algorithm_round_trip(byte_pairs, text):
    ids = byte_pairs.encode(text)
    assert byte_pairs.decode(ids) == text
    assert byte_pairs.eot not in ids


@given(st.text())
@example("\u2581 a\u2581\0\n\r\n<s></s><unk><0x41>  ")
@example(" ")
def test_sentencepiece_round_trip(sentence_pieces, text):
    assert sentence_pieces.decode(sentence_pieces.encode(text)) == text


@given(st.text())
@example("'ll <|endoftext|>  \n\n x")
def test_gpt2_encodes_as_tiktoken_does(gpt2, text):
    assert gpt2.encode(text).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_gpt2_ids_are_the_documented_ones(gpt2):
    assert gpt2.encode("Every effort moves you").tolist() == [6109, 3626, 6100, 345]
    assert gpt2.encode("!").tolist() == [0]
    assert (gpt2.n_vocab, gpt2.eot) == (50257, 50256)
    assert gpt2.is_gpt2s_own


@given(st.text(alphabet="a1' \n\t\u2003\x1c\x85é", max_size=60), st.sampled_from("23"))
def test_white_space_in_parts_gives_the_same_tokens(byte_pairs, text, at_once):
    ours, released = (
        tiktoken.Encoding("", pat_str=p, mergeable_ranks=byte_pairs.ranks, special_tokens={})
        for p in (
            byte_pairs.PATTERN.replace("1001", str(int(at_once) + 1)).replace("1000", at_once),
            r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        )
    )
    assert ours.encode_ordinary(text) == released.encode_ordinary(text)


@pytest.mark.parametrize("length", [999, 1000, 1001, 1002, 1003, 2000, 2001, 2002, 5000])
def test_long_white_space_has_the_tokens_of_tiktoken(gpt2, length):
    for text in (f"x{' ' * length}{end}" for end in ("", "x", "\n", "\nx")):
        assert gpt2.encode(text).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_a_megabyte_of_white_space_does_not_overflow_a_stack(byte_pairs):
    for text in (" " * 1_100_000 + "x", "x" + "\n" * 1_100_000, "x" + "\t " * 600_000 + "x"):
        assert byte_pairs.decode(byte_pairs.encode(text)) == text


def test_char_ids_are_in_code_point_order():
    tokenizer = CharTokenizer("".join(sorted(set("Hello"))))
    assert tokenizer.encode("Hello").tolist() == [0, 1, 2, 2, 3]


def test_an_unknown_character_is_named_or_skipped():
    tokenizer = CharTokenizer("abc")
    words = r"'é' \(U\+00E9, in 'abéc'\) is not one of the 3 characters"
    with pytest.raises(UserError, match=words):
        tokenizer.encode("abéc")
    assert tokenizer.encode("abéc\ud800", skip_unknown=True).tolist() == [0, 1, 2]


def test_tokenizers_travel_as_json(byte_pairs, sentence_pieces):
    for tokenizer in (CharTokenizer("\n aé"), byte_pairs, sentence_pieces):
        again = tokenizers.from_json(tokenizers.to_json(tokenizer), "here")
        text = "a a\n" if tokenizer.kind == "char" else "the thin é\u2581"
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert (again.n_vocab, again.eot) == (tokenizer.n_vocab, tokenizer.eot)
        assert again.state() == tokenizer.state()
    assert not byte_pairs.is_gpt2s_own


def test_sentencepiece_has_the_requested_size_or_says_what_fits(sentence_pieces):
    assert sentence_pieces.n_vocab == 400
    with pytest.raises(UserError, match="value <= "):
        SentencePieceTokenizer.train([TEXT], 100_000)
    with pytest.raises(UserError, match="smaller than required_chars"):
        SentencePieceTokenizer.train([TEXT], 100)


def test_sentencepiece_lists_its_merges_in_order(sentence_pieces):
    learned = sentence_pieces.learned_pieces()
    controls = {sentence_pieces.piece(i) for i in sentence_pieces.control_ids()}
    assert controls == {"<unk>", "<s>", "</s>"} and len(learned) == 400 - 256 - 3
    earlier = {piece for piece in learned if len(piece) == 1}
    for piece in learned:  # each is made of two that were there before
        cuts = range(1, len(piece))
        assert len(piece) == 1 or any({piece[:k], piece[k:]} <= earlier for k in cuts), piece
        earlier.add(piece)


KEYS = st.sampled_from(["kind", "characters", "pieces", "model"])
VALUES = st.sampled_from(["char", "gpt2", "sentencepiece", "", "A A", "zz", 3, None])


@given(st.text() | st.dictionaries(KEYS, VALUES).map(json.dumps))
@example('{"kind": "gpt2", "pieces": "YQ== YQ=="}')
@example('{"kind": "sentencepiece", "model": "AAAA"}')
@example('{"kind": "char", "characters": "aa"}')
@example('{"kind": "char", "characters": 5}')
@example('{"kind": "char", "characters": ""}')
@example('{"kind": "words"}')
@example("[]")
def test_no_json_raises_anything_but_a_user_error(text):
    try:
        tokenizers.from_json(text, "here")
    except UserError as error:
        assert str(error).startswith("here")
