"""gptjax data SOURCE: tokenise a text into a folder that training reads. gptjax data inspect DIR:
what is in such a folder."""

import dataclasses

from gptjax import console, files, program
from gptjax.commands import flags
from gptjax.config import DataConfig, TokenizerKind, TrainConfig
from gptjax.errors import UserError
from gptjax.settings import Config


@dataclasses.dataclass(frozen=True)
class DataFlags(Config):
    """Tokenise a text into a folder for `train --data.dir`. SOURCE is builtin, shakespeare, a file
    (.txt, .jsonl, .parquet, .arrow; also .gz, .xz, .bz2 or .zst of them), a folder, a glob, or
    hf://OWNER/NAME:SPLIT on the Hugging Face Hub; --mix names several instead.

    gptjax data inspect DIR shows what is in such a folder, or in nanoGPT's or llm.c's."""

    tokenizer: TokenizerKind = DataConfig.tokenizer
    """char, gpt2, bpe, sentencepiece or json."""
    sentencepiece_vocab_size: int = DataConfig.sentencepiece_vocab_size
    """Vocabulary of the sentencepiece model, in pieces."""
    val_fraction: float = DataConfig.val_fraction
    """Share of the text's characters, at its end, held out for validation, in [0, 1)."""
    val_source: str | None = None
    """A text of its own for validation; all of SOURCE is for training then."""
    mix: tuple[str, ...] = ()
    """Instead of SOURCE several texts, each with its weight: a.txt=0.7 b/=0.3."""
    end_of_text: str | None = None
    """What ends a document within a file, such as "<|endoftext|>"."""
    bpe_vocab_size: int = DataConfig.bpe_vocab_size
    """Vocabulary of the bpe tokenizer, in tokens."""
    tokenizer_file: str | None = None
    """A tokenizer.json of the package `tokenizers`, for --tokenizer json."""
    special_tokens: tuple[str, ...] = ()
    """Words such as "<|user|>" that are a token each wherever the text has them."""
    text_field: str = DataConfig.text_field
    """Field that holds the text, of JSON or a table; "meta.body" is the field body of meta."""
    shard_tokens: int | None = None
    """Tokens in a file at most; the tokens are read as if they lay in one. None: no limit."""
    out: str | None = None
    """The folder to make. None: data/ and a name made from the source."""

    def config(self, source: str | None) -> DataConfig:
        """The same as a run's settings."""
        return DataConfig(
            source, self.tokenizer, self.sentencepiece_vocab_size, self.val_fraction,
            end_of_text=self.end_of_text, val_source=self.val_source, text_field=self.text_field,
            bpe_vocab_size=self.bpe_vocab_size, tokenizer_file=self.tokenizer_file,
            special_tokens=self.special_tokens, mix=self.mix,
        )  # fmt: skip

    def problems(self) -> list[str]:
        out = self.config(None).problems() + ["--out is empty"] * (self.out == "")
        return out + self._check_ints(1, "shard_tokens")


@dataclasses.dataclass(frozen=True)
class InspectFlags(Config):
    """Show what is in a prepared folder (also nanoGPT's and llm.c's): documents, tokens, rare
    tokens, the longest lines, and the beginning of the first batch that training takes of it."""

    seed: int = TrainConfig.seed
    """Of the batch."""
    batch_size: int = TrainConfig.batch_size
    """Sequences in the batch."""
    block_size: int = 64
    """Tokens of a sequence."""

    def problems(self) -> list[str]:
        return self._check_ints(0, "seed") + self._check_ints(1, "batch_size", "block_size")


DEFAULTS = [DataFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError."""
    if argv[:1] == ["inspect"]:
        named, asked = flags.parse(InspectFlags(), argv[1:], f"{prog} inspect", "DIR")
        from gptjax.data import inspect, token_files  # slow, and not needed to print the help

        dataset = token_files.load(files.path(named[0]))
        for line in inspect.describe(dataset, asked.seed, asked.batch_size, asked.block_size):
            print(line, flush=True)
        return
    named, given = flags.parse(DataFlags(), argv, prog, "[SOURCE]")
    if bool(named) == bool(given.mix):
        raise UserError(f"of what? {prog} SOURCE names one text, --mix several with their weights")
    config = given.config(named[0] if named else None)
    from gptjax.data import prepare  # slow, and not needed to print the help

    output = console.make()
    with output.status("finding the text"):
        out = files.path(given.out) if given.out else prepare.default_dir(config)
    prepare.prepare(config, out, output, shard_tokens=given.shard_tokens)
    mix = ("--data.mix", *given.mix) if given.mix else ()
    print(f"train on it: {program.command('train', *mix, '--data.dir', out)}")
