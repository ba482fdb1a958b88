"""Text to token ids and back: every kind of tokenizer behind one protocol."""

import base64
import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import sentencepiece
import tiktoken
from tiktoken_ext import openai_public

from gptjax import files
from gptjax.config import TokenizerKind
from gptjax.data import byte_spelling
from gptjax.errors import UserError, first_line, quoted

END_OF_TEXT = "<|endoftext|>"

GPT2_SHA256 = "50fa6e3913609e5a8339bb9d9b90931b8272ced6502789605af2b4e9576fea4d"
"""Of GPT-2's pieces, concatenated in the order of their ids."""


class Tokenizer(Protocol):
    """What the rest of the package knows about a tokenizer."""

    kind: TokenizerKind
    n_vocab: int
    """Ids are 0 ... n_vocab - 1."""

    @property
    def eot(self) -> int | None:
        """The end-of-text id, which separates documents; None if the tokenizer has none."""

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        """int32 [n] ids. `decode(encode(text)) == text` for every text the tokenizer can represent.
        Raises UserError for a character it cannot represent; `skip_unknown` leaves those out."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; an incomplete UTF-8 sequence becomes U+FFFD."""

    def token_bytes(self) -> list[bytes]:
        """What each id stands for, in UTF-8, of which it may be part of a character; nothing for
        the end-of-text token and others that no text has."""

    def state(self) -> dict[str, Any]:
        """Everything it consists of, as JSON values; `from_state` rebuilds it without a network."""


class CharTokenizer:
    """One id per distinct character, in code point order."""

    kind: TokenizerKind = "char"
    eot = None

    def __init__(self, characters: str):
        """`characters`: each character once, its index is its id (ValueError otherwise)."""
        if len(set(characters)) < len(characters):
            raise ValueError("a character is listed twice")
        self.characters = characters
        self.n_vocab = len(characters)
        points = np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")
        # By code point, -1 for unknown ones; the last stands for all that follow.
        self._ids = np.full(int(points.max(initial=0)) + 2, -1, dtype=np.int32)
        self._ids[points] = np.arange(self.n_vocab)

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        # surrogatepass: a lone surrogate is an unknown character, not a crash.
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        if skip_unknown or (ids >= 0).all():
            return ids[ids >= 0]
        at = int(np.argmax(ids < 0))
        char, around = text[at], text[max(0, at - 20) : at + 20]
        raise UserError(
            f"the character {char!r} (U+{ord(char):04X}, in {around!r}) is not one of the"
            f" {self.n_vocab} characters that this tokenizer knows"
        )

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def token_bytes(self) -> list[bytes]:
        return [character.encode("utf-8", "surrogatepass") for character in self.characters]

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2), by tiktoken."""

    kind: TokenizerKind = "gpt2"
    # Contractions; then words, numbers and other symbols, each with at most one leading space; then
    # white space: the pre-tokenisation of GPT-2's released encoder. For white space that one has
    # `\s+(?!\S)|\s+`, which overflows tiktoken's stack on a million characters in a row. Taking a
    # thousand at a time, and never giving them back, matches the same.
    PATTERN = (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
        r"|(?:\s{1000}(?=\s\s))*+\s{1,1001}(?!\S)|\s+"
    )

    def __init__(self, ranks: dict[bytes, int] | None = None, added: Sequence[str] = ()):
        """`ranks`: bytes of a piece -> its id. None: GPT-2's own, which tiktoken downloads once
        (UserError if it cannot). `added`: tokens that follow the end-of-text token; where a text
        spells one, it is encoded as that token."""
        if ranks is None:
            try:
                ranks = openai_public.gpt2()["mergeable_ranks"]
            except Exception as error:  # tiktoken passes on those of requests and the file system
                raise UserError(
                    "GPT-2's merges are not on this machine and could not be downloaded"
                    f" ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has them,"
                    " or choose the tokenizer sentencepiece"
                ) from None
        assert ranks is not None
        self.ranks = ranks
        self.pieces = sorted(ranks, key=ranks.__getitem__)
        self.eot = len(ranks)
        self.added = tuple(added)
        self.n_vocab = len(ranks) + 1 + len(self.added)
        # Of two that begin at the same place the longer counts.
        longest = sorted(self.added, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest))})") if added else None
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=self.PATTERN,
            mergeable_ranks=ranks,
            special_tokens={t: self.eot + i for i, t in enumerate((END_OF_TEXT, *self.added))},
        )

    @property
    def is_gpt2s_own(self) -> bool:
        """Whether the pieces are GPT-2's; False for another encoding of the same kind."""
        if self.added:
            return False
        return hashlib.sha256(b"".join(self.pieces)).hexdigest() == GPT2_SHA256

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        # "<|endoftext|>" inside a text is text, not the end-of-text token.
        encode = self._encoding.encode_ordinary
        if not self._added:
            return np.array(encode(text), dtype=np.int32)
        ids: list[int] = []
        for i, part in enumerate(self._added.split(text)):
            # Every second one is what the text was split at.
            ids += [self._encoding.encode_single_token(part)] if i % 2 else encode(part)
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode(list(map(int, ids)))

    def token_bytes(self) -> list[bytes]:
        return [*self.pieces, b"", *(token.encode() for token in self.added)]

    def state(self) -> dict[str, Any]:
        pieces = " ".join(base64.b64encode(piece).decode() for piece in self.pieces)
        return {"kind": self.kind, "pieces": pieces} | (
            {"added": [*self.added]} if self.added else {}
        )


class BpeTokenizer(Gpt2Tokenizer):
    """GPT-2's algorithm with merges learned from the corpus."""

    kind: TokenizerKind = "bpe"

    @classmethod
    def train(
        cls, pieces: Iterable[str], vocab_size: int, special: Sequence[str] = ()
    ) -> "BpeTokenizer":
        """Train on `pieces` of text, by the package `tokenizers`. Raises UserError: not even all
        bytes are so few."""
        import tokenizers  # slow, and only needed here

        merged = vocab_size - 1 - len(special)
        if merged < 256:
            raise UserError(
                f"data.bpe_vocab_size {vocab_size} must be at least {257 + len(special)}: all"
                " bytes, the end of a text, and the special tokens"
            )
        # They are nothing to learn from. ("(?!)" matches nowhere.)
        marks = re.compile("|".join(map(re.escape, special)) or "(?!)")
        pieces = (part for piece in pieces for part in marks.split(piece))
        learned = tokenizers.Tokenizer(tokenizers.models.BPE())
        learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=merged, show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        learned.train_from_iterator(
            (piece.encode("utf-8", "replace").decode() for piece in pieces), trainer
        )
        spelled = learned.get_vocab()
        return cls({byte_spelling.to_bytes(token): id_ for token, id_ in spelled.items()}, special)


class JsonTokenizer:
    """One of the package `tokenizers`, as its tokenizer.json has it."""

    kind: TokenizerKind = "json"
    ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
    """What end-of-text tokens are called."""

    def __init__(self, content: str):
        """ValueError: it is none, or changes a text, or its tokens depend on how a text is cut."""
        import tokenizers  # slow, and only needed here

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the package raises nothing more special
            raise ValueError(first_line(error)) from None
        if json.loads(content)["model"].get("dropout"):
            raise ValueError("it leaves merges out at random (dropout): a text has no one spelling")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.content = content
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.n_vocab = 1 + max(vocab.values(), default=-1)
        added = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items()}
        self.eot = next((added[name] for name in self.ENDS if name in added), None)
        first, second = "The  cat\n\tsat: é中\ufb01\U0001f600", " on it, 12 times "
        whole = self.encode(first + second)
        if self.decode(whole) != first + second:
            raise ValueError("it changes the text: decoding gives another one back")
        parts = [self.encode(part) for part in (first, second)]
        if np.concatenate(parts).tolist() != whole.tolist():
            raise ValueError("its tokens depend on where a text is cut, even before a space")
        if "".join(map(self.decode, parts)) != first + second:
            raise ValueError("it changes the text that continues another one")

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        text = text.encode("utf-8", "replace").decode()
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        added = self._tokenizer.get_added_tokens_decoder()
        decoder = json.loads(self.content)["decoder"] or {}
        parts = {part["type"] for part in decoder.get("decoders", [decoder]) if part}

        def of(id_: int) -> bytes:
            spelled = self._tokenizer.id_to_token(id_)
            if spelled is None or id_ == self.eot:
                return b""
            if id_ in added:
                return added[id_].content.encode()
            if "ByteLevel" in parts:
                with contextlib.suppress(KeyError):
                    return byte_spelling.to_bytes(spelled)
            if "ByteFallback" in parts and re.fullmatch("<0x[0-9A-F]{2}>", spelled):
                return bytes.fromhex(spelled[3:5])
            return self.decode([id_]).encode()

        return list(map(of, range(self.n_vocab)))

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "content": self.content}


class SentencePieceTokenizer:
    """A byte-pair model trained on the corpus (Kudo & Richardson 2018). Lossless: text is not
    normalised, and characters outside the vocabulary are encoded as bytes."""

    kind: TokenizerKind = "sentencepiece"

    def __init__(self, model: bytes):
        """`model`: a serialised SentencePiece model (RuntimeError if it is not one, ValueError if
        its pieces are not UTF-8)."""
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.model = model
        self.n_vocab = self._processor.get_piece_size()
        self.eot = self._processor.eos_id()
        self._processor.decode(list(range(self.n_vocab)))  # finds damage now, not later
        # SentencePiece writes a space as U+2581, and NUL ends its strings. Where a text contains
        # one of the two, it is encoded as bytes, which decode to the original.
        self._bytes = {
            char: [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
            for char in "\u2581\0"
        }

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Train on `pieces` of text. Raises UserError if it is too short, or has too many
        characters, for `vocab_size` pieces."""
        # The trainer skips long lines, and takes no line ends: those get a piece of their own.
        lines = (
            line[at : at + 1000]
            for piece in pieces
            for line in piece.split("\n")
            for at in range(0, len(line), 1000)
        )
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for line in lines if line and "\0" not in line),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="bpe",
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                character_coverage=0.9999,
                user_defined_symbols=["\n"],
                unk_surface="\ufffd",
                minloglevel=2,
            )
        except (RuntimeError, ValueError) as error:
            reason = re.sub(r"^.*\) \[.*?\] ", "", str(error)).split(" Increase vocab_size")[0]
            if "insert_id" in str(error):
                reason = "not even the bytes and the marks are so few"
            raise UserError(
                f"cannot train a sentencepiece model of {vocab_size} pieces on this text:"
                f" {reason.strip() or 'there is no text'} (change sentencepiece_vocab_size)"
            ) from None
        return cls(model.getvalue())

    def piece(self, id_: int) -> str:
        """The model's name of an id: a space is U+2581, byte 0A is <0x0A>."""
        return self._processor.id_to_piece(id_)

    def score(self, id_: int) -> float:
        """Of two merges the one into the piece with the higher score is made first."""
        return self._processor.get_score(id_)

    def kind_of(self, id_: int) -> Literal["unknown", "control", "byte", "piece"]:
        model = self._processor
        if model.is_unknown(id_):
            return "unknown"
        return "control" if model.is_control(id_) else "byte" if model.is_byte(id_) else "piece"

    def control_ids(self) -> list[int]:
        """Ids that occur in no text."""
        model = self._processor
        return [i for i in range(self.n_vocab) if model.is_unknown(i) or model.is_control(i)]

    def learned_pieces(self) -> list[str]:
        """What merging can produce, in the order in which it was learned."""
        model, others = self._processor, set(self.control_ids())
        ids = [i for i in range(self.n_vocab) if i not in others and not model.is_byte(i)]
        return [self.piece(i) for i in sorted(ids, key=model.get_score, reverse=True)]

    def merges_pairs(self) -> bool:
        """Whether it is byte-pair encoding, whose scores are the numbers of the merges, not another
        kind of SentencePiece model ("unigram" has logarithms of probabilities)."""
        scores = map(self._processor.get_score, range(self.n_vocab))
        return all(score.is_integer() for score in scores)

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        ids: list[int] = []
        # A lone surrogate (JSON can spell one) is no UTF-8, which SentencePiece needs.
        text = text.encode("utf-8", "replace").decode()
        for part in re.split("([\u2581\0])", text):
            ids += self._bytes[part] if part in self._bytes else self._processor.encode(part)
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(list(map(int, ids)))

    def token_bytes(self) -> list[bytes]:
        def of(id_: int) -> bytes:
            match self.kind_of(id_):
                case "control":
                    return b""
                case "byte":
                    return bytes.fromhex(self.piece(id_)[3:5])
            return self.decode([id_]).encode()

        return list(map(of, range(self.n_vocab)))

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": base64.b64encode(self.model).decode()}


def from_state(state: Any, where: str) -> Tokenizer:
    """The tokenizer that `state()` described. Raises UserError if it describes none; `where` names
    its source then."""
    try:
        match state["kind"]:
            case "char":
                return CharTokenizer(state["characters"])
            case "gpt2" | "bpe" as kind:
                pieces = [base64.b64decode(piece) for piece in state["pieces"].split(" ")]
                ranks = {piece: rank for rank, piece in enumerate(pieces)}
                # tiktoken panics if a byte is missing.
                if len(ranks) < len(pieces) or not all(bytes([b]) in ranks for b in range(256)):
                    raise ValueError("its pieces are not distinct, or do not include all bytes")
                added = state.get("added", ())
                if not all(isinstance(token, str) and token for token in added) or len(
                    {END_OF_TEXT, *added}
                ) <= len(added):
                    raise ValueError("its added tokens are not distinct texts")
                return (BpeTokenizer if kind == "bpe" else Gpt2Tokenizer)(ranks, added)
            case "json":
                return JsonTokenizer(state["content"])
            case "sentencepiece":
                return SentencePieceTokenizer(base64.b64decode(state["model"]))
            case kind:
                raise ValueError(f"unknown kind {quoted(kind)}")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where} does not describe a tokenizer: {quoted(error)}") from None


def to_json(tokenizer: Tokenizer) -> str:
    """`state()` as JSON, for `from_json`."""
    return json.dumps(tokenizer.state())


def from_json(text: str, where: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote; raises as `from_state`."""
    return from_state(files.parse_json(text, where), where)
