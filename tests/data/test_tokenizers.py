"""Round trips by property, GPT-2's ids by known values, and tokenizers that travel as JSON."""

import json

import pytest
import tiktoken
import tokenizers as hf
from fuzz import damaged, read_or_refuse
from helpers import TEXT
from hypothesis import example, given
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import prepare, tokenizers
from gptjax.data.tokenizers import CharTokenizer, SentencePieceTokenizer
from gptjax.errors import UserError
from gptjax.interop import hf_tokenizer


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
@example("'ll <|endoftext|>  \n\n x \ud800"[:-1])
def test_learned_pairs_encode_as_their_own_library_does(learned_pairs, text):
    """The reference is `tokenizers`, which has learned them."""
    assert learned_pairs.decode(learned_pairs.encode(text)) == text
    reference = hf_tokenizer.convert(learned_pairs)
    for mark in ("<|endoftext|>", "<|u|>"):  # there a special token, in ours text
        text = text.replace(mark, "")
    assert learned_pairs.encode(text).tolist() == reference.encode(text).ids


@pytest.fixture(scope="module")
def learned_pairs():
    return tokenizers.BpeTokenizer.train([TEXT], 300)


def test_pairs_are_learned_from_the_text(learned_pairs):
    assert learned_pairs.n_vocab == 300 and learned_pairs.eot == 299
    assert len(learned_pairs.encode(TEXT)) < 0.7 * len(TEXT)
    # Of a text of one word there is no more to learn than its merges.
    few = tokenizers.BpeTokenizer.train(["abab abab abab"], 1000)
    assert few.n_vocab < 265 and len(few.encode("abab")) == 1
    with pytest.raises(UserError, match="bpe_vocab_size 256 must be at least 257"):
        tokenizers.BpeTokenizer.train([TEXT], 256)


def test_special_tokens_are_one_id_wherever_the_text_has_them():
    for tokenizer in (
        tokenizers.BpeTokenizer.train(["<|u|>now <|b|>"] * 9, 270, ("<|u|>", "<|b|>")),
        tokenizers.Gpt2Tokenizer({bytes([b]): b for b in range(256)}, ("<|u|>", "<|b|>")),
    ):
        u, b = tokenizer.eot + 1, tokenizer.eot + 2
        assert tokenizer.n_vocab == b + 1
        ids = tokenizer.encode("<|u|>now<|b|><|endoftext|><|u")
        assert [id_ for id_ in ids.tolist() if id_ >= tokenizer.eot] == [u, b]
        assert tokenizer.decode(ids) == "<|u|>now<|b|><|endoftext|><|u"
        again = tokenizers.from_json(tokenizers.to_json(tokenizer), "here")
        assert again.encode("<|b|>").tolist() == [b] and again.kind == tokenizer.kind
        converted = hf_tokenizer.convert(tokenizer)
        assert converted.encode("<|u|>now").ids == tokenizer.encode("<|u|>now").tolist()
        back = hf_tokenizer._from_hf(converted)
        assert back.encode("<|u|>now").tolist() == tokenizer.encode("<|u|>now").tolist()


def _own_json(**changes):
    """A tokenizer.json that somebody made with `tokenizers`."""
    own = hf.Tokenizer(hf.models.BPE(byte_fallback=True))
    own.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Digits(individual_digits=True),
         hf.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # fmt: skip
    own.decoder = hf.decoders.ByteLevel()
    for name, value in changes.items():
        setattr(own, name, value)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    own.train_from_iterator([TEXT], trainer)
    return own


@given(st.text())
def test_a_tokenizer_file_is_used_as_it_is(own_file, text):
    ours = tokenizers.JsonTokenizer(own_file)
    assert ours.encode(text).tolist() == hf.Tokenizer.from_str(own_file).encode(text).ids
    if "</s>" not in text:
        assert ours.decode(ours.encode(text)) == text
    assert ours.eot == 0 and ours.n_vocab == 320
    again = tokenizers.from_json(tokenizers.to_json(ours), "here")
    assert again.encode(text).tolist() == ours.encode(text).tolist()


@pytest.fixture(scope="module")
def own_file():
    return _own_json().to_str()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": hf.normalizers.Lowercase()}, "changes the text"),
        ({"decoder": hf.decoders.Fuse()}, "changes the text"),
        ({"pre_tokenizer": hf.pre_tokenizers.ByteLevel(add_prefix_space=True)}, "changes the text"),
        ({"model": hf.models.BPE(dropout=0.1)}, "at random"),
        (
            {
                "pre_tokenizer": hf.pre_tokenizers.Metaspace(prepend_scheme="first"),
                "decoder": hf.decoders.Sequence(
                    [hf.decoders.ByteFallback(), hf.decoders.Metaspace(prepend_scheme="first")]
                ),
            },
            "changes the text|depend on where",
        ),
    ],
)
def test_a_tokenizer_file_that_changes_texts_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        tokenizers.JsonTokenizer(_own_json(**changes).to_str())


@given(damaged(b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'))
def test_a_damaged_tokenizer_file_is_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    path.write_bytes(content)
    config = DataConfig("text.txt", "json", tokenizer_file=str(path))
    assert read_or_refuse(lambda: prepare.given_tokenizer(config), path) is None


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


def _fallback_json():
    """Characters, and bytes for those it does not know."""
    ids = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, " ": 257, "é": 258}
    own = hf.Tokenizer(hf.models.BPE(ids, [], byte_fallback=True))
    own.pre_tokenizer = hf.pre_tokenizers.Split("", "isolated")
    own.decoder = hf.decoders.Sequence([hf.decoders.ByteFallback(), hf.decoders.Fuse()])
    own.add_special_tokens(["<eos>"])
    return own.to_str()


@given(st.text())
@example("\u2581 \0a\U0001f9d1\u200d\U0001f680 \ufffd é")
def test_the_bytes_of_the_tokens_are_those_of_the_text(every_kind, text):
    for tokenizer in every_kind:
        known = text
        if tokenizer.kind == "char":
            known = tokenizer.decode(tokenizer.encode(text, skip_unknown=True))
        for mark in ("</s>", "<eos>"):  # there a token that ends a text
            known = known.replace(mark, "")
        spelled = tokenizer.token_bytes()
        assert b"".join(spelled[i] for i in tokenizer.encode(known)) == known.encode()
        assert len(spelled) == tokenizer.n_vocab
        assert tokenizer.eot is None or spelled[tokenizer.eot] == b""


@pytest.fixture(scope="module")
def every_kind(byte_pairs, sentence_pieces, own_file):
    special = tokenizers.BpeTokenizer.train([TEXT], 300, ["<|u|>", "é"])
    files = [tokenizers.JsonTokenizer(content) for content in (own_file, _fallback_json())]
    return [CharTokenizer("ab é\ufffd\U0001f680"), byte_pairs, special, sentence_pieces, *files]


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
