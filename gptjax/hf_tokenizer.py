"""Our tokenizers as Hugging Face's files, and back.

`transformers.AutoTokenizer` loads what `write` leaves: the same ids for a text, and the text for
its ids. Two things are theirs: a text that spells a control token (<|endoftext|>, </s>) gets that
token's id, where ours spells it out; and an exported SentencePiece model has no exact spelling of
U+2581 and NUL.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from gptjax.errors import UserError, first_line
from gptjax.tokenizers import (
    END_OF_TEXT,
    CharTokenizer,
    Gpt2Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

SPACE = "\u2581"
"""How SentencePiece writes a space."""


CHARACTERS = {
    "type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False,
}  # fmt: skip
"""The pre-tokenizer that splits a text into its characters."""


LONGEST_PIECE = 256
"""Bytes of a token of GPT-2's kind that we read; its own have 128 at most."""


BPE_OPTIONS = (
    "dropout", "ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix",
)  # fmt: skip
"""What GPT-2's byte-pair encoding does without."""


def _byte_characters() -> dict[int, str]:
    """GPT-2 writes bytes as printable characters: itself where it is one in Latin-1, else the next
    free one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_CHARACTER = _byte_characters()
_BYTE = {character: byte for byte, character in _CHARACTER.items()}


# --------------------------------------------------------------------------------- write


def write(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """tokenizer.json and tokenizer_config.json; with GPT-2's merges also vocab.json and merges.txt,
    with SentencePiece also its own tokenizer.model."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, CharTokenizer):
        parts = _char_json(tokenizer)
    elif isinstance(tokenizer, Gpt2Tokenizer):
        vocab, merges = _gpt2_tables(tokenizer)
        parts = _gpt2_json(vocab, merges)
        _write_json(folder / "vocab.json", vocab | {END_OF_TEXT: tokenizer.eot})
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        parts = _sentencepiece_json(tokenizer)
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
        config["eos_token"] = tokenizer.piece(tokenizer.eot)
    else:
        raise AssertionError(f"a tokenizer unknown here: {tokenizer.kind}")
    fixed = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    _write_json(folder / "tokenizer.json", fixed | {"added_tokens": [], "normalizer": None} | parts)
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _added(token: str, id_: int, *, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": token, "special": special} | plain


def _char_json(tokenizer: CharTokenizer) -> dict[str, Any]:
    return {
        "pre_tokenizer": CHARACTERS,
        # An id for unknown characters would change the vocabulary: they stay an error.
        "model": {
            "type": "WordLevel",
            "vocab": {c: i for i, c in enumerate(tokenizer.characters)},
            "unk_token": "<unknown character>",
        },
        "decoder": {"type": "Fuse"},
    }


def _gpt2_tables(tokenizer: Gpt2Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's vocabulary and merges out of tiktoken's ranks. A piece's merge is of the two parts
    that are left of it when only lower ranks are merged."""

    def spell(piece: bytes) -> str:
        return "".join(_CHARACTER[byte] for byte in piece)

    ranks, merges = tokenizer.ranks, []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) == 1:
            continue
        parts = [bytes([byte]) for byte in piece]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = found.index(min(found))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((spell(parts[0]), spell(parts[1])))
    return {spell(piece): rank for piece, rank in ranks.items()}, merges


def _gpt2_json(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "added_tokens": [_added(END_OF_TEXT, len(vocab), special=True)],
        "pre_tokenizer": level | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocab | {END_OF_TEXT: len(vocab)}, "merges": merges},
        "decoder": level,
    }


def _sentencepiece_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The same byte-pair encoding, with SentencePiece's scores as the order of merges."""
    pieces = [tokenizer.piece(i) for i in range(tokenizer.n_vocab)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    controls = tokenizer.control_ids()
    # Learned pieces follow in the order they were merged in; single characters come after them.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in tokenizer.learned_pieces()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return {
        "added_tokens": [
            *(_added(pieces[i], i, special=True) for i in controls),
            _added("\n", vocab["\n"], special=False),
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "byte_fallback": True,
            "unk_token": pieces[0],
            "fuse_unk": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }


# ---------------------------------------------------------------------------------- read


def read(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None where it has no tokenizer files.

    Raises:
        UserError: the files are damaged, or of a kind that we cannot follow exactly.
    """
    try:
        if (folder / "tokenizer.model").is_file():
            return _sentencepiece((folder / "tokenizer.model").read_bytes())
        path = folder / "tokenizer.json"
        if not path.is_file() and (folder / "vocab.json").is_file():
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            more = folder / "added_tokens.json"
            added = json.loads(more.read_text(encoding="utf-8")) if more.is_file() else {}
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            return _gpt2(vocab | added, merges)
        if not path.is_file():
            return None
        whole = json.loads(path.read_text(encoding="utf-8"))
        model, splitter = whole["model"], whole["pre_tokenizer"]
        if whole["normalizer"] is None and model["type"] == "WordLevel" and splitter == CHARACTERS:
            characters = sorted(model["vocab"], key=model["vocab"].__getitem__)
            ids = sorted(model["vocab"].values())
            if ids == list(range(len(ids))) and all(len(char) == 1 for char in characters):
                return CharTokenizer("".join(characters))
        plain = not any(model.get(name) for name in BPE_OPTIONS)
        after = whole.get("post_processor") or {"type": "ByteLevel"}
        # A template without special tokens adds nothing.
        plain &= after["type"] in ("ByteLevel", "TemplateProcessing")
        plain &= whole["normalizer"] is None and not after.get("special_tokens")
        if plain and model["type"] == "BPE" and _is_byte_level(splitter):
            added = {token["content"]: token["id"] for token in whole["added_tokens"]}
            merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            return _gpt2(model["vocab"] | added, merges)
        raise ValueError(f"a {model['type']} tokenizer of another kind")
    except (
        ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError,
    ) as error:  # fmt: skip  # RecursionError is a RuntimeError
        raise UserError(
            f"the tokenizer in {folder} is damaged, or not char, GPT-2's or SentencePiece's"
            f" ({first_line(error)}); name another with --tokenizer"
        ) from None


def _sentencepiece(model: bytes) -> SentencePieceTokenizer:
    """Raises ValueError if it is not one that gives every text back, as ours do."""
    tokenizer = SentencePieceTokenizer(model)
    pieces = {tokenizer.piece(i) for i in range(tokenizer.n_vocab)}
    probe = "  The  cat\n\tsat \u00e9\u4e2d\ufb01\U0001f600 "
    if (
        tokenizer.eot < 0
        or "\n" not in pieces
        or tokenizer.decode(tokenizer.encode(probe)) != probe
    ):
        raise ValueError("a SentencePiece model that changes the text")
    return tokenizer


def _is_byte_level(splitter: dict[str, Any]) -> bool:
    """As GPT-2 splits a text."""
    flags = {"add_prefix_space": False, "use_regex": True}
    return splitter["type"] == "ByteLevel" and all(
        splitter.get(k, v) == v for k, v in flags.items()
    )


def _gpt2(vocab: dict[str, int], merges: list[list[str]]) -> Gpt2Tokenizer:
    """tiktoken merges by id: that is the same only where ids follow the order of the merges."""
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError("its ids are not 0, 1, 2, ...")
    if vocab.get(END_OF_TEXT) != len(vocab) - 1:
        raise ValueError(f"{END_OF_TEXT} is not its last id")
    first = len(vocab) - 1 - len(merges)
    if first != len(_BYTE) or not all(character in vocab for character in _BYTE):
        raise ValueError(f"{first} ids come before its merges, not the {len(_BYTE)} bytes")
    for number, pair in enumerate(merges):
        if vocab.get("".join(pair)) != first + number or len(pair) != 2:
            raise ValueError(f"merge {number + 1} does not make id {first + number}")
    # What checks the merges takes the square of a piece's length.
    if any(len(token) > LONGEST_PIECE for token in vocab):
        raise ValueError(f"a token is longer than {LONGEST_PIECE} bytes")
    tokenizer = Gpt2Tokenizer(
        {bytes(_BYTE[c] for c in token): i for token, i in vocab.items() if token != END_OF_TEXT}
    )
    if _gpt2_tables(tokenizer)[1] != [tuple(pair) for pair in merges]:
        raise ValueError("merging in the order of its ids makes other pieces")
    return tokenizer
