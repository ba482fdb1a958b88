"""Our tokenizers as Hugging Face loads them: the same ids, the same text, and back."""

import io
import json

import pytest
import sentencepiece
import transformers
from conftest import TEXT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizers import GPT2, TINY_RANKS, needs_gpt2

from gptjax import data, hf_tokenizer
from gptjax.errors import UserError
from gptjax.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer

CHARACTERS = "".join(sorted({*TEXT, *"\t\r\x00 \u00a0\u0301\u0130\u2028\u2581é中😀\ufeff<>|#"}))


@pytest.fixture(scope="module")
def pieces() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train([TEXT], 400)


@pytest.fixture(scope="module", params=["char", "bytes", "sentencepiece"])
def pair(request, pieces, tmp_path_factory):
    """(ours, the same one as transformers loads it, the folder between them)."""
    ours = {
        "char": CharTokenizer(CHARACTERS),
        "bytes": Gpt2Tokenizer(TINY_RANKS),
        "sentencepiece": pieces,
    }[request.param]
    return ours, *through_files(ours, tmp_path_factory.mktemp(request.param))


def through_files(ours, folder):
    hf_tokenizer.write(ours, folder, 32)
    config = {"model_type": "gpt2", "vocab_size": ours.n_vocab}
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder), folder


def texts(ours):
    if ours.kind == "char":
        return st.text(ours.characters)
    # Pieces of the training text meet merges; Hugging Face finds special tokens inside a text,
    # and we do not.
    plain = st.text().filter(lambda text: text.encode("utf-8", "ignore").decode() == text)
    alike = st.lists(st.sampled_from([*TEXT.split()[:60], " ", "\n", "  ", "é", "😀"])).map("".join)
    return (plain | alike | st.tuples(alike, plain).map("".join)).filter(
        lambda text: not any(odd in text for odd in ("\u2581", "\0", "<", "|"))
    )


@settings(max_examples=300)
@given(drawn=st.data())
def test_transformers_gives_the_same_ids_and_the_same_text_back(pair, drawn):
    ours, theirs, _ = pair
    text = drawn.draw(texts(ours))
    ids = ours.encode(text).tolist()
    assert theirs.encode(text) == ids == theirs(text)["input_ids"]
    assert theirs.decode(ids) == ours.decode(ids) == text


def test_a_long_text_has_the_same_ids(pair):
    ours, theirs, _ = pair
    assert theirs.encode(TEXT) == ours.encode(TEXT).tolist()


def test_the_vocabulary_and_the_end_of_text_are_the_same(pair):
    ours, theirs, _ = pair
    assert len(theirs) == ours.n_vocab
    assert theirs.eos_token_id == ours.eot
    assert theirs.model_max_length == 32


def test_what_was_written_is_read_as_the_same_tokenizer(pair):
    ours, _, folder = pair
    assert hf_tokenizer.read(folder).state() == ours.state()
    assert data.read_tokenizer(folder) is None  # ours is another file of this name


def test_what_transformers_saves_is_read_as_the_same_tokenizer(pair, tmp_path):
    ours, theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    if ours.kind != "sentencepiece":
        assert hf_tokenizer.read(tmp_path).state() == ours.state()
        return
    # transformers leaves out tokenizer.model, and nothing else says how ours was trained.
    with pytest.raises(UserError, match="another kind"):
        hf_tokenizer.read(tmp_path)


def test_byte_pairs_are_read_from_each_kind_of_file_alone(tmp_path):
    ours = Gpt2Tokenizer(TINY_RANKS)
    hf_tokenizer.write(ours, tmp_path, 32)
    for alone in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
        folder = tmp_path / alone[0].split(".")[0]
        folder.mkdir()
        for name in alone:
            (folder / name).write_bytes((tmp_path / name).read_bytes())
        assert hf_tokenizer.read(folder).state() == ours.state()


@needs_gpt2
def test_gpt2s_own_tokenizer_is_the_one_that_transformers_knows(tmp_path):
    theirs, folder = through_files(GPT2, tmp_path)
    for text in (TEXT, "Every effort moves you", "'ll x\n\n\n  y\t12345 é中😀\ufeff don't <|end"):
        ids = GPT2.encode(text).tolist()
        assert theirs.encode(text) == ids and theirs.decode(ids) == text
    assert theirs.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert theirs.eos_token_id == 50256 and len(theirs) == 50257
    assert (folder / "merges.txt").read_text().split("\n")[1:4] == ["Ġ t", "Ġ a", "h e"]
    assert hf_tokenizer.read(folder).state() == GPT2.state()


# ------------------------------------------------------------------------------ bad files


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert hf_tokenizer.read(tmp_path) is None


def changed(whole, **model):
    return whole | {"model": whole["model"] | model}


BYTES = json.loads(json.dumps(hf_tokenizer._gpt2_json(*hf_tokenizer._gpt2_tables(
    Gpt2Tokenizer(TINY_RANKS)))))  # fmt: skip
WORDS = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}}


ODD = {
    "empty": {},
    "list": [],
    "null": None,
    "no model": {"model": []},
    "unigram": {"model": {"type": "Unigram"}},
    "words": changed(WORDS, vocab={"a": 0, "word": 1}),
    "ids with a gap": changed(WORDS, vocab={"a": 0, "b": 5}),
    "equal ids": changed(WORDS, vocab={"a": 0, "b": 0}),
    "ids that are text": changed(WORDS, vocab={"a": "0", "b": 1}),
    "lower case": WORDS | {"normalizer": {"type": "Lowercase"}},
    "white space": WORDS | {"pre_tokenizer": {"type": "Whitespace"}},
    "merges in another order": changed(BYTES, merges=BYTES["model"]["merges"][::-1]),
    "one merge less": changed(BYTES, merges=BYTES["model"]["merges"][1:]),
    "half a merge": changed(BYTES, merges=[["a"]]),
    "no list of merges": changed(BYTES, merges=3),
    "few bytes": changed(BYTES, vocab={"a": 0, "<|endoftext|>": 1}, merges=[])
    | {"added_tokens": []},
    "all ids 0": changed(BYTES, vocab=dict.fromkeys(BYTES["model"]["vocab"], 0)),
    "another added token": BYTES | {"added_tokens": [{"content": "<pad>", "id": 263}]},
    "bytes in lower case": BYTES | {"normalizer": {"type": "Lowercase"}},
    "a space in front": BYTES
    | {"pre_tokenizer": BYTES["pre_tokenizer"] | {"add_prefix_space": True}},
}


@pytest.mark.parametrize("whole", ODD.values(), ids=ODD)
def test_a_tokenizer_that_we_cannot_follow_exactly_is_refused(tmp_path, whole):
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="--tokenizer") as error:
        hf_tokenizer.read(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@given(content=st.binary(max_size=50))
@example(b'{"model": {"type": "WordLevel", "vocab": {"\\ud800": 0}}}')
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"])
def test_no_file_raises_anything_but_a_user_error(scratch, name, content):
    folder = scratch / name
    folder.mkdir(exist_ok=True)
    for other in ("vocab.json", "merges.txt"):
        if name in ("vocab.json", "merges.txt"):
            (folder / other).write_text("{}")
    (folder / name).write_bytes(content)
    for read in (hf_tokenizer.read, data.read_tokenizer):
        try:
            read(folder)
        except UserError as error:
            assert str(folder) in str(error)


@pytest.mark.parametrize("read", [hf_tokenizer.read, data.read_tokenizer])
def test_json_nested_too_deep_is_a_user_error(tmp_path, read):
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(UserError):
        read(tmp_path)


def test_a_sentencepiece_model_that_changes_the_text_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=100,
        minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="changes the text"):
        hf_tokenizer.read(tmp_path)


def test_ids_that_do_not_follow_the_merges_are_refused(tmp_path):
    hf_tokenizer.write(Gpt2Tokenizer(TINY_RANKS), tmp_path, 32)
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text())
    # "abc": the merges make (a, bc); by the ids it would be (ab, c).
    vocab = {token: i for token, i in whole["model"]["vocab"].items() if i < 256}
    vocab |= {"bc": 256, "ab": 257, "abc": 258, "<|endoftext|>": 259}
    whole["model"] |= {"vocab": vocab, "merges": [["b", "c"], ["a", "b"], ["ab", "c"]]}
    whole["added_tokens"][0]["id"] = 259
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="other pieces"):
        hf_tokenizer.read(tmp_path)


def test_tokens_added_to_gpt2s_vocabulary_are_refused_not_dropped(tmp_path):
    hf_tokenizer.write(Gpt2Tokenizer(TINY_RANKS), tmp_path, 32)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|pad|>": len(TINY_RANKS) + 1}))
    with pytest.raises(UserError, match="not its last id"):
        hf_tokenizer.read(tmp_path)


@needs_gpt2
def test_only_gpt2s_own_pieces_pass_for_gpt2s():
    assert GPT2.is_gpt2s_own
    swapped = dict(GPT2.ranks)
    swapped[b"he"], swapped[b"in"] = swapped[b"in"], swapped[b"he"]
    assert not Gpt2Tokenizer(swapped).is_gpt2s_own
