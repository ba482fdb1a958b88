"""gptjax prompt [RUN]: write a text in turns with a trained model."""

import contextlib
import dataclasses
import io
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gptjax import files, interrupts
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.generation import GrowingText, grow, prompt_ids
from gptjax.generation_config import GenerationConfig, Overflow
from gptjax.runtime_config import DeviceKind

if TYPE_CHECKING:
    from gptjax.run import Run

HELP = """\
Type a text: the model continues it. What you type next is a new line of the same text.
  Enter alone        goes on
  Ctrl-C             stops the model, Ctrl-D ends
  /reset             begins a new text
  /temperature 0.5   changes a setting; so do /top_k, /min_p, /seed, /max_new_tokens, /stop, ...
  /help              prints this
\\n and \\t are understood; a text that begins with / is written with two of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(GenerationConfig):
    """Of one text, which may become longer than the block."""

    overflow: Overflow = "half"
    """Past the model's block_size. exact: as an uncached model that sees the last block_size
    tokens; half: drop the older half and go on, much faster; stop: end there."""

    def problems(self) -> list[str]:
        return super().problems() + ["num_samples is 1 here"] * (self.num_samples > 1)


@dataclasses.dataclass(frozen=True)
class PromptFlags(Settings):
    """Write a text in turns with a trained model (runs/quickstart, if no RUN is named): you type,
    and it continues. /help says what else can be typed. The model was trained to continue texts,
    not to answer."""

    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    unknown: Literal["error", "skip"] = "error"
    """What to do with characters that the tokenizer does not know."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision, and what the weights are read in. auto: the run's own."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""


DEFAULTS = [PromptFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError."""
    named, given = flags.parse(PromptFlags(), argv, prog, "[RUN]")
    run_dir = named[0] if named else "runs/quickstart"
    terminal.need_run(run_dir)
    # JAX is imported when the command runs, not to print its help.
    from gptjax import run
    from gptjax.devices import setup

    setup.select_platform(given.device)
    setup.use_compilation_cache(files.cache_dir() / "xla")
    terminal.status(f"loading {run_dir} ...")
    model = run.load(run_dir, given.checkpoint, dtype=given.dtype)
    terminal.status("")
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(given, name) for name in names})
    text = Text(model, skip_unknown=given.unknown == "skip")
    with turns() as lines:
        for line in lines:
            try:
                if line in ("/help", "/"):
                    print(HELP, file=sys.stderr)
                elif line == "/reset":
                    text.ids = text.ids[:0]
                elif line.startswith("/") and not line.startswith("//"):
                    name, *values = line[1:].split()
                    _, changes, problems = flags.read([settings], [f"--{name}", *values], prog)
                    (settings,) = flags.apply([settings], changes, problems, prog)
                else:
                    line = flags.unescape(line.removeprefix("/") if line[:2] == "//" else line)
                    for piece in text.go_on(line, settings):
                        print(piece, end="", flush=True)
                    print(flush=True)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                print(flush=True)


class Text:
    """What was typed and what the model has written, as tokens."""

    def __init__(self, model: "Run", skip_unknown: bool):
        from gptjax.decode_layout import unstack

        self.ids = np.zeros(0, np.int32)
        self._model, self._skip_unknown = model, skip_unknown
        self._params = unstack(model.params, model.config, consume=True)

    def go_on(self, typed: str, settings: GenerationConfig) -> Iterator[str]:
        """What the model writes after another line (if it is not empty), piece by piece. Raises
        UserError."""
        from gptjax import run

        tokenizer = self._model.tokenizer
        if not len(self.ids):
            new = prompt_ids(tokenizer, typed or None, skip_unknown=self._skip_unknown)
        else:
            last = self.ids[-1]
            same_line = last != tokenizer.eot and not tokenizer.decode([last]).endswith("\n")
            typed = "\n" * (same_line and typed != "") + typed
            new = tokenizer.encode(typed, skip_unknown=self._skip_unknown)
        self.ids = np.concatenate([self.ids, new]).astype(np.int32)
        eot = None if settings.ignore_end_of_text else tokenizer.eot
        growing = GrowingText(tokenizer, [flags.unescape(x) for x in settings.stop], eot)
        pieces = run.tokens(self._params, self.ids, self._model.config, settings, stream=True)
        for _ in grow([growing], self._kept(pieces)):
            yield growing.take(keep=False)

    def _kept(self, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in pieces:
            self.ids = np.concatenate([self.ids, piece[0]])
            yield piece


@contextlib.contextmanager
def turns() -> Iterator[Iterator[str]]:
    """The lines that are typed, or piped in. At a terminal Ctrl-C does not end the process: it
    raises KeyboardInterrupt where the program is, and discards the line that is being typed."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # for `flags.text`
    if not sys.stdin.isatty():
        yield (flags.text("a line", line.rstrip("\r\n")) for line in sys.stdin)
        return
    import readline  # noqa: F401  (the keys of a line, and its history)

    print(HELP, file=sys.stderr)

    def heard(number: int) -> Any:
        return listener(number) if listener and number != signal.SIGINT else None

    listener = interrupts.listen(heard)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield typed()
    finally:
        signal.signal(signal.SIGINT, before)
        interrupts.listen(listener)


def typed() -> Iterator[str]:
    """Lines, until Ctrl-D."""
    while True:
        try:
            yield flags.text("a line", input("> "))
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
