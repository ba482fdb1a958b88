"""Tokenizers of every kind, and a folder with files of each."""

import pytest
from helpers import TEXT

from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer
from gptjax.errors import UserError

# All bytes and a few merges: GPT-2's algorithm without its 50,000 merges, on any machine.
MERGES = [b" t", b"he", b" the", b"in", b"\n\n", b"  "]
CHARACTERS = "".join(sorted({*TEXT, *"\t\r\x00 \u00a0\u0301\u0130\u2028\u2581é中😀\ufeff<>|#"}))


@pytest.fixture(scope="session")
def byte_pairs() -> Gpt2Tokenizer:
    pieces = [bytes([byte]) for byte in range(256)] + MERGES
    return Gpt2Tokenizer({piece: rank for rank, piece in enumerate(pieces)})


@pytest.fixture(scope="session")
def sentence_pieces() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train([TEXT], 400)


@pytest.fixture(scope="session", params=["char", "bytes", "sentencepiece", "added"])
def tokenizer(request, byte_pairs, sentence_pieces):
    """One of each kind."""
    kinds = {"char": CharTokenizer(CHARACTERS), "bytes": byte_pairs}
    kinds["added"] = Gpt2Tokenizer(byte_pairs.ranks, ["[user]", "[user]s", " \u00e9"])
    return (kinds | {"sentencepiece": sentence_pieces})[request.param]


@pytest.fixture(scope="session")
def gpt2() -> Gpt2Tokenizer:
    try:
        return Gpt2Tokenizer()
    except UserError:
        pytest.skip("GPT-2's merges are not on this machine, and there is no network")
