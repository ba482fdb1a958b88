"""WikiText put together again, and what its words cost."""

import functools
import math

import pytest
from fuzz import damaged, read_or_refuse
from hypothesis import example, given
from hypothesis import strategies as st

from gptjax.config import ModelConfig
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer
from gptjax.errors import UserError
from gptjax.evals.wikitext import detokenise, evaluate_wikitext, read_wikitext

CONFIG = ModelConfig(2, 2, 16, block_size=24, vocab_size=257)
BYTES = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})

ORIGINAL = (
    " \n = The Hen ( bird ) = \n \n The hen 's 1 @,@ 200 eggs weigh 2 @.@ 5 kg , at 20 ° C ;"
    ' a well @-@ known poet said : " Eggs ! " . Why ? [ see below ] { x } \n'
    " = = Diet = = \n = = = Corn = = = \n The corn is cheap . \n"
)
PLAIN = (
    "\n= The Hen (bird) =\n\nThe hen's 1,200 eggs weigh 2.5 kg, at 20°C;"
    ' a well-known poet said: "Eggs!". Why? [see below] {x}\n'
    "== Diet ==\n=== Corn ===\nThe corn is cheap.\n"
)


def test_a_text_is_put_together_again():
    """As people write it."""
    assert detokenise(ORIGINAL) == PLAIN


@given(
    st.lists(st.sampled_from([*"@-,.;!?:()[]{}\"'=°N \n  s12a\u2028"]), max_size=40).map("".join)
)
@example(ORIGINAL)
@example(" @,@ @-@ @.@ @,@ ")  # two share a space
@example(" @,@ @.@  , , . ( ( a ) b ) \" c ' d \" ' = = = = = 's ' 63 ° N , ")
def test_it_is_what_the_harness_makes_of_it(text):
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    assert detokenise(text) == wikitext_detokenizer({"page": text})


@pytest.mark.parametrize("stride", [None, 5])
def test_what_is_predicted_counts_against_the_words_of_the_file(losses, nats, tmp_path, stride):
    path = tmp_path / "wiki.test.raw"
    path.write_text(ORIGINAL)
    read = read_wikitext(path, BYTES)
    assert BYTES.decode(read.text.tokens) == "<|endoftext|>" + PLAIN
    ids, expected = [256, *PLAIN.encode()], 0.0
    for target in range(1, len(ids)):
        start = max(0, math.ceil((target - 24) / (stride or 24))) * (stride or 24)
        expected += nats(ids[start:target], ids[target])
    found = evaluate_wikitext(losses, read, CONFIG, batch_size=8, stride=stride)
    assert found.tokens == len(PLAIN.encode())
    words = 63  # counted by hand
    assert read.words == words
    assert found.word_perplexity == pytest.approx(math.exp(expected / words), rel=1e-5)
    size = len(ORIGINAL.encode())
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / size, rel=1e-5)
    assert found.report().split("\n")[1:] == [
        f"loss                {found.loss:.4f} nats per token",
        f"word perplexity     {found.word_perplexity:.4f}  (of the words of the file)",
        f"bits per byte       {found.bits_per_byte:.4f}  (of the bytes of the file)",
    ]
    assert f"{words} words" in found.report().split("\n")[0]


def test_tables_are_refused(tmp_path):
    (tmp_path / "wiki.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"wiki.jsonl is no plain text; expected .*wiki.test.raw"):
        read_wikitext(tmp_path / "wiki.jsonl", BYTES)


@given(damaged(ORIGINAL.encode()))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("w") / "wiki.test.raw"
    path.write_bytes(content)
    for tokenizer in (BYTES, CharTokenizer("".join({*ORIGINAL}))):
        read_or_refuse(functools.partial(read_wikitext, path, tokenizer), path)
