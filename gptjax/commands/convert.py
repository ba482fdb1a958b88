"""gptjax convert import|export: weights from and to PyTorch's world."""

import dataclasses
import re
from typing import Literal

from gptjax import config_io, files
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.settings import Config

USAGE = """\
usage: {prog} import SOURCE RUN [--help]
       {prog} export RUN FOLDER [--help]

import makes a run of other programs' weights (Hugging Face, nanoGPT, OpenAI), to sample from,
evaluate or train on like any other; export writes a run for transformers, nanoGPT or llama.cpp."""


@dataclasses.dataclass(frozen=True)
class ImportFlags(Config):
    """Make a run of a Hugging Face GPT-2 folder, a checkpoint of nanoGPT or build-nanogpt, OpenAI's
    folder, or a model on the Hugging Face Hub such as gpt2-xl."""

    tokenizer: str | None = None
    """gpt2, a run or data folder of gptjax, or a folder with tokenizer files of Hugging Face or
    nanoGPT (meta.pkl). None: those beside the weights, else GPT-2's if the size is right."""
    optimizer: bool = True
    """Import the state of nanoGPT's optimizer too, so that training goes on."""
    gelu: Literal["tanh", "erf"] = "erf"
    """GELU form of a ckpt.pt: erf is nanoGPT's since 2023, tanh was its before. (A Hugging Face
    folder says which it is.)"""

    def problems(self) -> list[str]:
        return ["--tokenizer is empty; name a folder"] if self.tokenizer == "" else []


@dataclasses.dataclass(frozen=True)
class ExportFlags(Config):
    """Write a run's weights for other programs. hf: a folder that
    transformers.AutoModelForCausalLM.from_pretrained loads; nanogpt: one that nanoGPT's sample.py
    --out_dir=FOLDER reads; safetensors: a file of the weights alone; gguf: a file for llama.cpp."""

    format: Literal["hf", "nanogpt", "safetensors", "gguf"] = "hf"
    """hf, nanogpt, safetensors or gguf."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    keep_padding: bool = False
    """Keep the embedding's padded rows (not in GGUF). They have no logits here, but would have in
    PyTorch."""
    push: str | None = None
    """Then push FOLDER to this model of the Hugging Face Hub (someone/some-gpt2), which is private
    if it is new."""

    def problems(self) -> list[str]:
        wrong = self.push is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.push)
        return [f"--push {self.push!r}: expected a name such as someone/some-gpt2"] * wrong


DEFAULTS = [ImportFlags(), ExportFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError."""
    what, rest = (argv[0], argv[1:]) if argv else ("", [])
    if what in ("--help", "-h"):
        print(USAGE.format(prog=prog))
    elif what == "import":
        _import(rest, f"{prog} import")
    elif what == "export":
        _export(rest, f"{prog} export")
    else:
        raise UserError(f"import or export? {prog} import SOURCE RUN, or {prog} export RUN FOLDER")


def _import(argv: list[str], prog: str) -> None:
    named, given = flags.parse(ImportFlags(), argv, prog, "SOURCE RUN")
    from gptjax.devices import setup  # JAX, when the command runs
    from gptjax.interop import convert

    setup.select_platform("cpu")
    options = config_io.to_dict(given)
    terminal.status(f"reading {named[0]} ...")
    made = convert.import_model(named[0], files.path(named[1]), **options)
    terminal.status("")
    print(made)


def _export(argv: list[str], prog: str) -> None:
    named, given = flags.parse(ExportFlags(), argv, prog, "RUN FOLDER")
    from gptjax.devices import setup  # JAX, when the command runs
    from gptjax.interop import convert

    setup.select_platform("cpu")
    folder, options = files.path(named[1]), config_io.to_dict(given)
    terminal.status(f"writing {folder} ...")
    made = convert.export_model(files.path(named[0]), folder, **options)
    terminal.status("")
    print(made)
