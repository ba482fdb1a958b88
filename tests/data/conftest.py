"""Tokenizers of every kind, and prepared sets."""

from pathlib import Path

import pytest
from helpers import TEXT
from rich.console import Console

from gptjax.config import DataConfig
from gptjax.data.prepare import prepare
from gptjax.data.tokenizers import Gpt2Tokenizer, SentencePieceTokenizer
from gptjax.errors import UserError

# All bytes and a few merges: GPT-2's algorithm without its 50,000 merges, on any machine.
MERGES = [b" t", b"he", b" the", b"in", b"\n\n", b"  "]


@pytest.fixture(scope="session")
def byte_pairs() -> Gpt2Tokenizer:
    pieces = [bytes([byte]) for byte in range(256)] + MERGES
    return Gpt2Tokenizer({piece: rank for rank, piece in enumerate(pieces)})


@pytest.fixture(scope="session")
def sentence_pieces() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train([TEXT], 400)


@pytest.fixture(scope="session")
def gpt2() -> Gpt2Tokenizer:
    try:
        return Gpt2Tokenizer()
    except UserError:
        pytest.skip("GPT-2's merges are not on this machine, and there is no network")


@pytest.fixture(scope="session")
def make_set():
    """Prepare `text` in `folder`, with `tokenizer` or a new one of this kind; the new folder."""

    def make(
        folder: Path, text=TEXT, name="text.txt", kind="char", tokenizer=None, val=0.1,
        shard_tokens=None, **more,
    ) -> Path:  # fmt: skip
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        config = DataConfig(
            str(folder / name), kind, sentencepiece_vocab_size=400, val_fraction=val, **more
        )
        prepare(config, folder / "set", Console(quiet=True), tokenizer, shard_tokens)
        return folder / "set"

    return make
