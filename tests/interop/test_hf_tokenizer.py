"""Tokenizer files: what is written is read as the same, and all else is refused."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from fuzz import damaged, read_or_refuse
from helpers import TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.data import token_files
from gptjax.data.tokenizers import Gpt2Tokenizer
from gptjax.errors import UserError
from gptjax.interop import hf_tokenizer

FEW = settings(max_examples=40, suppress_health_check=list(HealthCheck))


def refused(folder, match):
    with pytest.raises(UserError, match=match) as error:
        hf_tokenizer.read(folder)
    assert str(folder) in str(error.value) and "--tokenizer" in str(error.value)


@pytest.fixture
def folder(tokenizer, tmp_path):
    hf_tokenizer.write(tokenizer, tmp_path, 32)
    return tmp_path


def test_what_was_written_is_read_as_the_same_tokenizer(tokenizer, folder):
    assert hf_tokenizer.read(folder).state() == tokenizer.state()
    assert token_files.read_tokenizer(folder) is None  # ours is another file of this name


@FEW
@given(drawn=st.data())
def test_a_text_has_the_same_ids_and_comes_back(tokenizer, drawn):
    text = drawn.draw(texts(tokenizer))
    converted, ids = hf_tokenizer.convert(tokenizer), tokenizer.encode(text).tolist()
    assert converted.encode(text).ids == ids
    assert converted.decode(ids) == text


def texts(tokenizer):
    if tokenizer.kind == "char":
        return st.text(tokenizer.characters)
    # Words of the training text meet merges; Hugging Face finds control tokens inside a text, and
    # we do not.
    plain = st.text().filter(lambda text: text.encode("utf-8", "ignore").decode() == text)
    parts = [*TEXT.split()[:60], " ", "\n", "  ", "é", "😀", *getattr(tokenizer, "added", [])]
    alike = st.lists(st.sampled_from(parts)).map("".join)
    return (plain | alike | st.tuples(alike, plain).map("".join)).filter(
        lambda text: not any(odd in text for odd in ("\u2581", "\0", "<", "|"))
    )


def test_byte_pairs_are_read_from_each_kind_of_file_alone(byte_pairs, tmp_path):
    hf_tokenizer.write(byte_pairs, tmp_path, 32)
    assert (tmp_path / "merges.txt").read_text().split("\n")[1:4] == ["Ġ t", "h e", "Ġt he"]
    for names in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
        folder = tmp_path / names[0].split(".")[0]
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes((tmp_path / name).read_bytes())
        assert hf_tokenizer.read(folder).state() == byte_pairs.state()


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert hf_tokenizer.read(tmp_path) is None


def changed(whole, **model):
    return whole | {"model": whole["model"] | model}


def words(whole, vocab):
    return changed(whole, type="WordLevel", vocab=vocab, unk_token="?") | {
        "added_tokens": [],
        "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated",
                          "invert": False},
    }  # fmt: skip


def with_pad(whole, **flags):
    pad = whole["added_tokens"][0] | {"content": "<pad>", "id": 263} | flags
    return whole | {"added_tokens": [*whole["added_tokens"], pad]}


LOWER = {"normalizer": {"type": "Lowercase"}}
TEMPLATE = {
    "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
    "pair": [], "special_tokens": {"x": {"id": "x", "ids": [0], "tokens": ["x"]}},
}  # fmt: skip
ODD = {
    "empty": lambda w: {},
    "a list": lambda w: [],
    "null": lambda w: None,
    "no model": lambda w: w | {"model": []},
    "unigram": lambda w: w | {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
    "words": lambda w: words(w, {"a": 0, "word": 1}),
    "ids with a gap": lambda w: words(w, {"a": 0, "b": 5}),
    "a gap of billions": lambda w: words(w, {"a": 0, "b": 2**32 - 2}),
    "equal ids": lambda w: words(w, {"a": 0, "b": 0}),
    "ids that are text": lambda w: words(w, {"a": "0", "b": 1}),
    "lower case": lambda w: words(w, {"a": 0, "b": 1}) | LOWER,
    "white space": lambda w: words(w, {"a": 0}) | {"pre_tokenizer": {"type": "Whitespace"}},
    "merges in another order": lambda w: changed(w, merges=w["model"]["merges"][::-1]),
    "one merge less": lambda w: changed(w, merges=w["model"]["merges"][1:]),
    "half a merge": lambda w: changed(w, merges=[["a"]]),
    "no list of merges": lambda w: changed(w, merges=3),
    "few bytes": lambda w: (
        changed(w, vocab={"a": 0, "<|endoftext|>": 1}, merges=[]) | {"added_tokens": []}
    ),
    "all ids 0": lambda w: changed(w, vocab=dict.fromkeys(w["model"]["vocab"], 0)),
    "an added token that takes spaces": lambda w: with_pad(w, lstrip=True),
    "an added token that is a word": lambda w: with_pad(w, single_word=True),
    "a token of the vocabulary after the last": lambda w: changed(
        w, vocab=w["model"]["vocab"] | {"hehe": 263}
    ),
    "an added token that is known": lambda w: (
        w
        | {
            "added_tokens": [
                *w["added_tokens"],
                w["added_tokens"][0] | {"content": "he", "id": 257},
            ]
        }
    ),
    "bytes in lower case": lambda w: w | LOWER,
    "a space in front": lambda w: (
        w | {"pre_tokenizer": w["pre_tokenizer"] | {"add_prefix_space": True}}
    ),
    "no words": lambda w: w | {"pre_tokenizer": w["pre_tokenizer"] | {"use_regex": False}},
    "merges left out at random": lambda w: changed(w, dropout=0.5),
    "another end of words": lambda w: changed(w, end_of_word_suffix="</w>"),
    "a token in front": lambda w: w | {"post_processor": TEMPLATE},
}


LOSSLESS = {
    "merges in another order", "one merge less", "an added token that takes spaces",
    "an added token that is a word", "a token of the vocabulary after the last",
    "an added token that is known", "no words",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_another_kind_of_tokenizer_is_used_as_it_is_unless_it_changes_a_text(
    byte_pairs, tmp_path, name
):
    whole = json.loads(hf_tokenizer.convert(byte_pairs).to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(whole))
    assert hf_tokenizer.read(tmp_path).kind == "gpt2"
    path.write_text(json.dumps(ODD[name](whole)))
    if name not in LOSSLESS:
        refused(tmp_path, "tokenizer")
        return
    found = hf_tokenizer.read(tmp_path)
    expected = tokenizers.Tokenizer.from_file(str(path)).encode(TEXT).ids
    assert found.kind == "json" and found.encode(TEXT).tolist() == expected
    assert found.decode(expected) == TEXT


def test_ids_that_do_not_follow_the_merges_are_not_taken_for_ranks(byte_pairs, tmp_path):
    whole = json.loads(hf_tokenizer.convert(byte_pairs).to_str())
    # "abc": the merges make (a, bc); by the ids it would be (ab, c).
    vocab = {token: i for token, i in whole["model"]["vocab"].items() if i < 256}
    vocab |= {"bc": 256, "ab": 257, "abc": 258, "<|endoftext|>": 259}
    whole = changed(whole, vocab=vocab, merges=[["b", "c"], ["a", "b"], ["ab", "c"]])
    whole["added_tokens"][0]["id"] = 259
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    found = hf_tokenizer.read(tmp_path)
    assert found.kind == "json" and found.encode("abc").tolist() == [vocab["a"], 256]


def test_a_very_long_token_does_not_take_hours(tmp_path):
    longer = [b"a" * 2**k for k in range(1, 18)]
    pieces = [bytes([byte]) for byte in range(256)] + longer
    vocab = hf_tokenizer.convert(Gpt2Tokenizer({piece: i for i, piece in enumerate(pieces[:256])}))
    whole = json.loads(vocab.to_str())
    ids = {token: i for token, i in whole["model"]["vocab"].items() if i < 256}
    ids |= {piece.decode(): 256 + i for i, piece in enumerate(longer)}
    merges = [[piece.decode()[: len(piece) // 2]] * 2 for piece in longer]
    whole = changed(whole, vocab=ids | {"<|endoftext|>": len(ids)}, merges=merges)
    whole["added_tokens"][0]["id"] = len(ids)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert hf_tokenizer.read(tmp_path).kind == "json"


def test_tokens_may_be_added_after_gpt2s_vocabulary_only(byte_pairs, tmp_path):
    hf_tokenizer.write(byte_pairs, tmp_path, 32)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|pad|>": byte_pairs.n_vocab}))
    found = hf_tokenizer.read(tmp_path)
    assert found.encode("he<|pad|>").tolist() == [257, byte_pairs.n_vocab]
    assert found.decode([257, 263]) == "he<|pad|>" and found.eot == byte_pairs.eot
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|pad|>": 5}))
    refused(tmp_path, "do not follow")


def test_a_sentencepiece_model_that_changes_the_text_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=100,
        minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    refused(tmp_path, "changes the text")


def test_json_nested_too_deep_is_a_user_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    refused(tmp_path, "tokenizer")


FILES = {
    "char": ["tokenizer.json"],
    "gpt2": ["tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"],
    "sentencepiece": ["tokenizer.model"],
}


@FEW
@given(drawn=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(tokenizer, folder, drawn):
    name = drawn.draw(st.sampled_from(FILES[tokenizer.kind]))
    hf_tokenizer.write(tokenizer, folder, 32)
    (folder / "added_tokens.json").write_text("{}")
    path = folder / name
    path.write_bytes(drawn.draw(damaged(path.read_bytes())))
    if tokenizer.kind == "gpt2" and name != "tokenizer.json":
        (folder / "tokenizer.json").unlink()
    found = read_or_refuse(lambda: hf_tokenizer.read(folder), folder)
    if found is not None:  # and works
        found.encode("ab \n\u2581\0é\ud800", skip_unknown=True)
        found.decode(range(min(found.n_vocab, 1000)))


def test_half_a_surrogate_in_a_vocabulary_is_refused(tmp_path):
    text = r'{"model": {"type": "WordLevel", "vocab": {"\ud800": 0}}}'
    (tmp_path / "tokenizer.json").write_text(text)
    refused(tmp_path, "tokenizer")


def test_gpt2s_own_merges_come_out_of_its_ranks(gpt2, tmp_path):
    hf_tokenizer.write(gpt2, tmp_path, 1024)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert lines[1:4] == ["Ġ t", "Ġ a", "h e"] and len(lines) == 50002
    assert hf_tokenizer.read(tmp_path).state() == gpt2.state()
