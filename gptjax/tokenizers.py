"""Text to token ids and back: char, gpt2 and sentencepiece behind one protocol."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tiktoken
from tiktoken_ext import openai_public

from gptjax.config import TokenizerKind
from gptjax.errors import UserError

END_OF_TEXT = "<|endoftext|>"

GPT2_SHA256 = "50fa6e3913609e5a8339bb9d9b90931b8272ced6502789605af2b4e9576fea4d"
"""Of GPT-2's pieces, end to end in the order of their ids."""


LONG_SPACE = 400_000
"""tiktoken's regular expression overflows its stack on a million characters of white space; from
here on they are cut out before."""

_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer."""

    kind: TokenizerKind
    n_vocab: int
    """Ids are 0 ... n_vocab - 1."""

    @property
    def eot(self) -> int | None:
        """The id that stands between documents, where there is one."""
        ...

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        """int32 [n] ids. `decode(encode(text)) == text` for every text the tokenizer can spell.

        Raises:
            UserError: a character it cannot spell, unless `skip_unknown` leaves it out.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; an incomplete UTF-8 sequence becomes U+FFFD."""
        ...

    def state(self) -> dict[str, Any]:
        """All it is made of, as JSON: `from_state` builds it again, without a network."""
        ...


class CharTokenizer:
    """One id per distinct character, in code point order."""

    kind: TokenizerKind = "char"
    eot = None

    def __init__(self, characters: str):
        """`characters`: every character once; its index is its id. ValueError otherwise."""
        if len(set(characters)) < len(characters):
            raise ValueError("a character is listed twice")
        self.characters = characters
        self.n_vocab = len(characters)
        self._code_points = np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")
        self._ids = np.full(int(self._code_points.max(initial=0)) + 1, -1, dtype=np.int32)
        self._ids[self._code_points] = np.arange(self.n_vocab)

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        # surrogatepass: a lone surrogate is a character we do not know, not a crash.
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        known = points < len(self._ids)
        ids = np.where(known, self._ids[np.where(known, points, 0)], -1)
        if (ids >= 0).all():
            return ids
        if skip_unknown:
            return ids[ids >= 0]
        where = int(np.argmax(ids < 0))
        raise UserError(
            f"the character {text[where]!r} (U+{ord(text[where]):04X}, at offset {where}) is not"
            f" among the {self.n_vocab} this tokenizer was built from; remove it"
            " (generate_jax.py leaves such characters out with --unknown skip)"
        )

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2), by tiktoken."""

    kind: TokenizerKind = "gpt2"
    # Contractions, words, numbers and other runs each with one leading space, then white space:
    # the pre-tokenisation of GPT-2's released encoder.
    PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def __init__(self, ranks: dict[bytes, int] | None = None):
        """`ranks`: merged bytes -> id. None: GPT-2's own, which tiktoken downloads once."""
        if ranks is None:
            try:
                ranks = openai_public.gpt2()["mergeable_ranks"]
            except Exception as error:  # requests' and the file system's, by way of tiktoken
                raise UserError(
                    "GPT-2's merges are not on this machine and could not be downloaded"
                    f" ({type(error).__name__}); point TIKTOKEN_CACHE_DIR at a folder that has"
                    " them, or choose the tokenizer sentencepiece"
                ) from None
        assert ranks is not None
        self.ranks = ranks
        self.eot = len(ranks)
        self.n_vocab = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=self.PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eot},
        )

    @property
    def is_gpt2s_own(self) -> bool:
        """False for another byte-pair encoding of GPT-2's kind."""
        pieces = b"".join(sorted(self.ranks, key=lambda piece: self.ranks[piece]))
        return hashlib.sha256(pieces).hexdigest() == GPT2_SHA256

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        # encode_ordinary: "<|endoftext|>" inside a text is text, not a control token.
        ids, at = list[int](), 0
        if any(map(str.isspace, text[::LONG_SPACE])):  # no other text holds so much in a row
            for run in re.finditer(f"(?<!{_SPACE}){_SPACE}{{{LONG_SPACE},}}", text):
                # As the pattern has it: one word, but for what stands before the next one.
                end = run.end() if run.end() == len(text) else run.end() - 1
                ids += self._encoding.encode_ordinary(text[at : run.start()])
                ids += self._encoding._encode_single_piece(text[run.start() : end])
                at = end
        return np.array(ids + self._encoding.encode_ordinary(text[at:]), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode(list(map(int, ids)))

    def state(self) -> dict[str, Any]:
        by_rank = sorted(self.ranks, key=self.ranks.__getitem__)
        lines = [base64.b64encode(piece).decode() for piece in by_rank]
        return {"kind": self.kind, "pieces": " ".join(lines)}


class SentencePieceTokenizer:
    """A byte-pair model trained on the corpus (Kudo & Richardson 2018), lossless: nothing is
    normalised, and characters outside the vocabulary are spelled as bytes."""

    kind: TokenizerKind = "sentencepiece"

    def __init__(self, model: bytes):
        """`model`: a serialised SentencePiece model; RuntimeError if it is not one, ValueError if
        its pieces are not UTF-8."""
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.model = model
        self.n_vocab = self._processor.get_piece_size()
        self.eot = self._processor.eos_id()
        self._processor.decode(list(range(self.n_vocab)))  # raises for damage here, not later on
        # SentencePiece writes a space as U+2581 and NUL ends its strings; a text that holds
        # either gets it spelled in bytes, which the decoder restores.
        self._bytes = {
            char: [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
            for char in "\u2581\0"
        }

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Train on `pieces` of text.

        Raises:
            UserError: the text is too small, or too varied, for `vocab_size` pieces.
        """
        # The trainer passes over long lines and never sees line ends, which get their own piece.
        lines = (line[i : i + 1000] for p in pieces for line in p.split("\n") for i in
                 range(0, len(line), 1000))  # fmt: skip
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
            raise UserError(
                f"cannot train a sentencepiece model of {vocab_size} pieces on this text:"
                f" {reason.strip() or 'there is no text'} (change sentencepiece_vocab_size)"
            ) from None
        return cls(model.getvalue())

    def piece(self, id_: int) -> str:
        """How the model spells an id: a space as U+2581, byte 0A as <0x0A>."""
        return self._processor.id_to_piece(id_)

    def control_ids(self) -> list[int]:
        """Ids that no text has."""
        processor = self._processor
        every = range(self.n_vocab)
        return [i for i in every if processor.is_unknown(i) or processor.is_control(i)]

    def learned_pieces(self) -> list[str]:
        """What merging can make, in the order it was learned."""
        processor = self._processor
        plain = [
            i
            for i in range(self.n_vocab)
            if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))
        ]
        return [self.piece(i) for i in sorted(plain, key=processor.get_score, reverse=True)]

    def encode(self, text: str, *, skip_unknown: bool = False) -> np.ndarray:
        ids: list[int] = []
        # JSON may spell half a surrogate pair, which SentencePiece does not take.
        text = text.encode("utf-8", "replace").decode()
        for part in re.split("([\u2581\0])", text):
            ids += self._bytes[part] if part in self._bytes else self._processor.encode(part)
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(list(map(int, ids)))

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": base64.b64encode(self.model).decode()}


def from_state(state: Any, where: str) -> Tokenizer:
    """The tokenizer that `state()` described; `where` names the source in errors.

    Raises:
        UserError: `state` describes none.
    """
    try:
        match state["kind"]:
            case "char":
                return CharTokenizer(state["characters"])
            case "gpt2":
                pieces = [base64.b64decode(piece) for piece in state["pieces"].split(" ")]
                ranks = {piece: rank for rank, piece in enumerate(pieces)}
                # tiktoken panics where it misses one.
                if len(ranks) < len(pieces) or not all(bytes([b]) in ranks for b in range(256)):
                    raise ValueError("its pieces are not distinct, or not all bytes are among them")
                return Gpt2Tokenizer(ranks)
            case "sentencepiece":
                return SentencePieceTokenizer(base64.b64decode(state["model"]))
            case kind:
                raise UserError(f"{where}: unknown tokenizer {kind!r}")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where} does not describe a tokenizer: {error!r}") from None


def to_json(tokenizer: Tokenizer) -> str:
    return json.dumps(tokenizer.state())


def from_json(text: str, where: str) -> Tokenizer:
    """The inverse of `to_json`; `where` names the source in errors."""
    try:
        state = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: it is no text
        raise UserError(f"{where} is not valid JSON: {error}") from None
    return from_state(state, where)
