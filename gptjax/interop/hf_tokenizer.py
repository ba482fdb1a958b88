"""Our tokenizers as Hugging Face's files, and back, by the package `tokenizers`.

`transformers.AutoTokenizer` loads what `write` leaves: the same ids for a text, and the text for
its ids. Two differences remain: in a text that spells a control token (<|endoftext|>, </s>), they
see the token where ours sees its characters; and an exported SentencePiece model has no exact
spelling of U+2581 and NUL.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from gptjax.data import byte_spelling
from gptjax.data.tokenizers import (
    END_OF_TEXT,
    CharTokenizer,
    Gpt2Tokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from gptjax.errors import UserError, first_line
from gptjax.files import read_json

SPACE = "\u2581"
"""How SentencePiece spells a space."""

LONGEST_TOKEN = 256
"""Bytes of a token that we read; GPT-2's own have 128 at most. The check of the merges takes time
that grows with the square of this."""


def write(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; for GPT-2's merges also vocab.json and
    merges.txt, for SentencePiece also its own tokenizer.model."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    converted = convert(tokenizer)
    if isinstance(tokenizer, Gpt2Tokenizer):
        converted.model.save(str(folder))
        config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
        config |= dict.fromkeys(("bos_token", "unk_token"), END_OF_TEXT)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
    if tokenizer.eot is not None:
        config["eos_token"] = converted.id_to_token(tokenizer.eot)
    converted.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def convert(tokenizer: Tokenizer) -> HfTokenizer:
    """The same tokenizer as one of the package `tokenizers`."""
    if isinstance(tokenizer, CharTokenizer):
        ids = {character: i for i, character in enumerate(tokenizer.characters)}
        # An id for unknown characters would change the vocabulary: they stay an error.
        out = HfTokenizer(models.WordLevel(ids, unk_token="<unknown character>"))
        out.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        out.decoder = decoders.Fuse()
        return out
    if isinstance(tokenizer, Gpt2Tokenizer):
        vocab = {byte_spelling.from_bytes(p): i for p, i in tokenizer.ranks.items()}
        out = HfTokenizer(models.BPE(vocab | {END_OF_TEXT: tokenizer.eot}, _merges(vocab)))
        out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        out.decoder = decoders.ByteLevel()
        out.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        out.add_tokens([AddedToken(token, normalized=False) for token in tokenizer.added])
        return out
    if isinstance(tokenizer, JsonTokenizer):
        return HfTokenizer.from_str(tokenizer.content)
    assert isinstance(tokenizer, SentencePieceTokenizer), tokenizer.kind
    pieces = [tokenizer.piece(i) for i in range(tokenizer.n_vocab)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # The same byte-pair encoding: the learned pieces come in the order of their merges.
    merges = _merges({piece: rank for rank, piece in enumerate(tokenizer.learned_pieces())})
    out = HfTokenizer(models.BPE(vocab, merges, unk_token=pieces[0], byte_fallback=True))
    out.normalizer = normalizers.Replace(" ", SPACE)
    out.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    controls = tokenizer.control_ids()
    out.add_special_tokens([AddedToken(pieces[i], normalized=False) for i in controls])
    out.add_tokens([AddedToken("\n", normalized=False)])
    return out


def _merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that make these pieces. A piece is merged from the two parts that are left of it
    when only lower ranks are merged; if there are more, or one is no piece, it never is."""
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts, lowest = list(piece), -1
        while len(parts) > 2 and lowest < rank:
            found = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            lowest = min(found)
            i = found.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2 and parts[0] in ranks and parts[1] in ranks:
            merges.append((parts[0], parts[1]))
    return merges


def read(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None if it has no tokenizer files. One of none of our
    kinds is left to the package `tokenizers`. UserError: the files are damaged, or what they decode
    is not the text that was encoded."""
    try:
        if (folder / "tokenizer.model").is_file():
            return _from_sentencepiece((folder / "tokenizer.model").read_bytes())
        if (path := folder / "tokenizer.json").is_file():
            content = path.read_text("utf-8")
            try:
                return _from_hf(HfTokenizer.from_str(content))
            except ValueError:
                return JsonTokenizer(content)
        for vocab, merges in ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"):
            if (folder / vocab).is_file():  # the second are OpenAI's
                return _from_hf(_from_vocab_files(folder / vocab, folder / merges))
    except Exception as error:  # the package raises nothing more special
        raise UserError(
            f"the tokenizer in {folder} is damaged, or of a kind that cannot be followed exactly"
            f" ({first_line(error)}); name another with --tokenizer"
        ) from None
    return None


def _from_sentencepiece(model: bytes) -> SentencePieceTokenizer:
    """Raises ValueError if it does not give every text back, as ours do."""
    tokenizer = SentencePieceTokenizer(model)
    pieces = {tokenizer.piece(i) for i in range(tokenizer.n_vocab)}
    probe = "  The  cat\n\tsat \u00e9\u4e2d\ufb01\U0001f600 "
    same = tokenizer.decode(tokenizer.encode(probe)) == probe
    if tokenizer.eot < 0 or "\n" not in pieces or not same:
        raise ValueError("a SentencePiece model that changes the text")
    return tokenizer


def _from_vocab_files(vocab: Path, merges: Path) -> HfTokenizer:
    """With added_tokens.json where it is there."""
    bpe = models.BPE.from_file(str(vocab), str(merges))
    found = HfTokenizer(bpe)
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    more = vocab.parent / "added_tokens.json"
    added = read_json(more) if more.is_file() else {}
    found.add_tokens([AddedToken(token, normalized=False) for token in added])
    if any(found.token_to_id(token) != id_ for token, id_ in added.items()):
        raise ValueError("added_tokens.json has ids that do not follow those of vocab.json")
    return found


def _from_hf(found: HfTokenizer) -> Tokenizer:
    """Raises ValueError unless ours, converted again, is the same."""
    vocab = found.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    # Before the package lists them: it counts to the largest.
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError("its ids are not 0, 1, 2, ...")
    allowed = set[str]()
    if all(len(token) == 1 for token in tokens):
        ours: Tokenizer = CharTokenizer("".join(tokens))
    else:
        plain = {
            token.content
            for token in found.get_added_tokens_decoder().values()
            if not (token.lstrip or token.rstrip or token.single_word)
        }
        end = vocab.get(END_OF_TEXT, len(vocab))
        tokens, added = tokens[:end], tokens[end + 1 :]
        allowed = {END_OF_TEXT, *added}
        if end == len(vocab) or not plain.issuperset(added):
            raise ValueError(f"{END_OF_TEXT} is not its last id, or followed by added tokens only")
        if any(len(token) > LONGEST_TOKEN for token in tokens):
            raise ValueError(f"a token is longer than {LONGEST_TOKEN} bytes")
        pieces = [byte_spelling.to_bytes(token) for token in tokens]
        if not {bytes([byte]) for byte in range(256)}.issubset(pieces):
            raise ValueError("not all bytes are among its tokens")
        ours = Gpt2Tokenizer({piece: id_ for id_, piece in enumerate(pieces)}, added)
    state = _state(found)
    wrong = [name for name, value in _state(convert(ours)).items() if state.get(name) != value]
    wrong += [t.content for t in found.get_added_tokens_decoder().values()
              if t.content not in allowed]  # fmt: skip
    if wrong:
        raise ValueError(f"we have no equivalent of its {', '.join(wrong)}")
    return ours


def _state(found: HfTokenizer) -> dict[str, Any]:
    """All that decides on the ids of a text, by name."""
    whole = json.loads(found.to_str())
    splitter, after = whole["pre_tokenizer"], whole["post_processor"]
    # Neither of these adds ids to a text.
    if after and (after["type"] == "ByteLevel" or after.get("special_tokens") == {}):
        after = None
    ignored = ("trim_offsets", "unk_token", "fuse_unk")  # of offsets, and of what all bytes cover
    return {
        "normalizer": whole["normalizer"],
        "pre_tokenizer": splitter and {k: v for k, v in splitter.items() if k not in ignored},
        "post_processor": after,
    } | {name: value or None for name, value in whole["model"].items() if name not in ignored}
