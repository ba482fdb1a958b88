"""gptjax explain [RUN]: what a model computes of a text, step by step."""

import dataclasses
from typing import Literal

from gptjax import config_io, console, files, program
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.runtime_config import DeviceKind
from gptjax.settings import Config


@dataclasses.dataclass(frozen=True)
class ExplainFlags(Config):
    """Walk through a model with a text of your own: tokens, embeddings, attention, what comes next,
    with the model's real numbers. RUN is a run's folder (runs/quickstart, if none is named); GPT-2
    in Hugging Face's format, nanoGPT's ckpt.pt, or a name on the Hub with its owner
    (openai-community/gpt2); or a config, whose model is untrained then."""

    prompt: str = "Every effort moves you"
    """The text to follow; \\n, \\t and \\\\ are understood."""
    out: str | None = None
    """Write a page (.html) as well, where every head's attention can be looked at."""
    checkpoint: str = "best"
    """Of a run: best (lowest validation loss), latest, or a step."""
    unknown: Literal["error", "skip"] = "error"
    """What to do with characters of the prompt that the tokenizer does not know."""
    seed: int = 1337
    """Of an untrained model's weights."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""

    def problems(self) -> list[str]:
        return self._check_ints(0, "seed") + ["--out is empty"] * (self.out == "")


DEFAULTS = [ExplainFlags()]

OPENAI = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
"""Names of configs or presets that are those of OpenAI's weights too."""


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError."""
    named, given = flags.parse(ExplainFlags(), argv, prog, "[RUN]")
    name = named[0] if named else "runs/quickstart"
    if not named and not terminal.is_run(files.path(name)):
        raise UserError(
            f"no run in {name} yet; train one ({program.command('train')}), or see an untrained"
            f" model: {program.command('explain', 'shakespeare_char_cpu')}"
        )
    folder, out = files.path(name), files.path(given.out) if given.out else None
    if out:
        out = out if out.suffix else out.with_name(f"{out.name}.html")
        if out.suffix.lower() != ".html" or out.is_dir() or not out.parent.is_dir():
            raise UserError(
                f"--out {out}: expected the name of an .html file in a folder that exists"
            )
    is_run, config = terminal.is_run(folder), None
    here = folder.exists() and folder.suffix not in (".py", ".json")
    # A name with an owner is one on the Hub, if there is no such folder.
    on_hub = name.count("/") == 1 and not folder.parent.exists() and folder.parent.name != "runs"
    if not (is_run or here or on_hub):
        try:
            config = config_io.load_config(name)[0].replace(seed=given.seed)
        except UserError as error:
            raise UserError(f"there is no run {name}, and {error}") from None
    # JAX is imported when the command runs, not to print its help.
    from gptjax import run
    from gptjax.devices import setup
    from gptjax.viz import explain, page, walk

    setup.select_platform(given.device)
    setup.use_compilation_cache(files.cache_dir() / "xla")
    terminal.status(f"loading {name} ...")
    model_name, skip = name.replace("_", "-"), given.unknown == "skip"
    if config:
        model, name = run.untrained(config), f"{name} (untrained)"
    else:
        model = run.load(name, given.checkpoint) if is_run else run.from_pretrained(name)
    prompt = flags.unescape(flags.text("--prompt", given.prompt))
    try:
        ids = model.tokenizer.encode(prompt, skip_unknown=skip)
    except UserError as error:
        raise UserError(f"{error}; --unknown skip leaves out unknown characters") from None
    prompt = model.tokenizer.decode(ids.tolist())
    sections = walk.walk(model, prompt, trained=not config)
    terminal.status("")
    explain.show(model, name, sections, console.make())
    if config and model_name in OPENAI:
        weights = program.command("explain", f"openai-community/{model_name}")
        print(f"these weights are random; OpenAI's: {weights}")
    if out:
        page.write(out, explain.to_html(model, name, prompt, sections))
        print(f"wrote {out}")
    else:
        print("every head's attention, to look at: --out explain.html")
