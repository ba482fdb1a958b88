"""gptjax evaluate RUN: how well a run predicts a text, or answers the questions that models are
compared by."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

from gptjax import files
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.runtime_config import DeviceKind, RuntimeConfig, StrategyKind
from gptjax.settings import Config

WHAT = "text", "split", "wikitext", "lambada", "hellaswag", "tasks"
OF = {
    "data_dir": ("split",),
    "stride": ("text", "split", "wikitext"),
    "hellaswag_style": ("hellaswag",),
    "task_data": ("tasks",),
    "num_fewshot": ("tasks",),
    "limit": ("tasks",),
}
"""{flag: what it goes with}."""


@dataclasses.dataclass(frozen=True)
class EvaluateFlags(Config):
    """Evaluate a run on one thing, over all devices: on a text or on its own data, where losses are
    in nats per token, and bits per character and per byte compare models with different tokenizers;
    on WikiText, LAMBADA or HellaSwag, from files; or on any tasks of lm-evaluation-harness."""

    text: str | None = None
    """A .txt or .jsonl file, a folder or a glob."""
    split: Literal["train", "val"] | None = None
    """A split of the data that the run was trained on."""
    data_dir: str | None = None
    """With --split: where the data lie now. None: where they lay in training."""
    wikitext: str | None = None
    """A file of WikiText-2 or WikiText-103, such as wiki.test.raw: perplexity of its words."""
    lambada: str | None = None
    """A file in LAMBADA's jsonl format: perplexity and accuracy of the last word."""
    hellaswag: str | None = None
    """A file in HellaSwag's jsonl format: which of four endings is the likeliest."""
    hellaswag_style: Literal["completion", "harness"] | None = None
    """completion: the texts as they are, normalised by tokens, as build-nanogpt; harness: cleaned
    and with the activity before them, normalised by characters and by bytes, as
    lm-evaluation-harness. None: completion."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, such as hellaswag lambada_openai wikitext. (Takes
    pip install 'gptjax[harness]'; the harness downloads its data, or see --task-data.)"""
    task_data: tuple[str, ...] = ()
    """TASK=PATH: a task's data, in place of a download: a .jsonl or .parquet file with the
    questions, or a folder with a file for each split. The fields are those of the public data."""
    num_fewshot: int | None = None
    """With --tasks: solved examples before each question. None: as the task has it."""
    limit: int | None = None
    """With --tasks: only so many questions of each, the first ones."""
    stride: int | None = None
    """Tokens from one window to the next. None: block_size, so that windows do not overlap; fewer
    take longer and give tokens more context."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    batch_size: int | None = None
    """Windows at a time, over all devices. None: 8, or more where there are more devices."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What to compute in; float32 is at the highest precision of matrix products."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""
    num_devices: int | None = None
    """CPU devices to split this machine's cores into. None: one, which uses all of them."""
    strategy: StrategyKind | None = None
    """How the devices hold the model, as in training. None: as the run was trained."""

    def problems(self) -> list[str]:
        out = self._check_ints(1, "stride", "batch_size", "num_devices", "limit")
        out += self._check_ints(0, "num_fewshot")
        if len(self.asked()) > 1:
            out.append(f"on what? {_listed(self.asked())} exclude each other")
        out += [f"--{name} is empty" for name in self.asked() if getattr(self, name) == ""]
        for name, of in OF.items():
            if self._given(name) and not {*of} & {*self.asked()}:
                wanted = " or ".join(f"--{each}" for each in of)
                out.append(f"--{name.replace('_', '-')} goes with {wanted}")
        for each in self.task_data:
            task, _, path = each.partition("=")
            if not (task and path):
                out.append(f"--task-data {each!r} is no task with its data: hellaswag=FILE")
        return out

    def asked(self) -> list[str]:
        """What to evaluate on."""
        return [name for name in WHAT if self._given(name)]

    def _given(self, name: str) -> bool:
        return getattr(self, name) not in (None, ())


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(f'--{name}' for name in names[:-1])} and --{names[-1]}"


DEFAULTS = [EvaluateFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError."""
    named, given = flags.parse(EvaluateFlags(), argv, prog, "RUN")
    if not given.asked():
        raise UserError(f"on what? give one of {_listed(WHAT)}")
    run_dir = terminal.need_run(named[0])
    # JAX is imported when the command runs, not to print its help.
    import jax

    from gptjax import run_metadata, train_step
    from gptjax.data import tokenizers
    from gptjax.devices import setup
    from gptjax.devices.strategy import get_strategy
    from gptjax.evals import continuations, hellaswag, lambada, perplexity, wikitext
    from gptjax.run import Run

    if given.tasks:
        from gptjax.evals import harness  # optional, and slow to import

    newest = run_metadata.newest_metadata(run_dir)
    if newest is None:
        raise UserError(f"no checkpoint in {run_dir}: training stopped before it saved one")
    setup.start(RuntimeConfig(device=given.device, num_devices=given.num_devices))
    if given.tasks and jax.process_count() > 1:
        raise UserError("--tasks runs on one host; start it on one alone")
    setup.use_compilation_cache(files.cache_dir() / "xla")
    count = setup.device_count()
    batch_size = given.batch_size or -(-8 // count) * count
    if batch_size % count:
        raise UserError(f"--batch-size {batch_size} does not divide over {count} devices")
    laid_out = RuntimeConfig(strategy=given.strategy or newest.runtime.strategy)
    strategy = get_strategy(laid_out.strategy)
    loaded = run_metadata.load_checkpoint(run_dir, given.checkpoint, strategy.targets)
    metadata = loaded.metadata
    config = loaded.model.replace(dtype=given.precision)
    if given.stride and given.stride > config.block_size:
        raise UserError(f"--stride {given.stride} exceeds the block_size {config.block_size}")
    tokenizer = tokenizers.from_json(metadata.tokenizer, str(run_dir))
    # As it was trained; other texts are single documents.
    packed = metadata.config.data.packed and bool(given.split or given.text)
    compute, _ = setup.resolve_compute(config, laid_out, train=False, packed=packed)

    def progress(done: int, total: int) -> None:
        if setup.is_main_host():
            terminal.status(f"{done:,} of {total:,}" if done < total else "")

    def on_tasks() -> str:
        run = Run(config, loaded.params, tokenizer, loaded.step, metadata.config)
        model = harness.HarnessModel(
            run, precision=given.precision, batch_size=batch_size, strategy=strategy,
            progress=progress,
        )  # fmt: skip
        named = (each.partition("=") for each in given.task_data)
        data = {task: files.path(path) for task, _, path in named}
        terminal.status("reading the tasks ...")
        return harness.evaluate(
            model, given.tasks, data, limit=given.limit, num_fewshot=given.num_fewshot
        ).report()

    def on_questions() -> str:
        scores = continuations.scores(strategy, strategy.to_devices(loaded.params), config, compute)
        how: Any = {"batch_size": batch_size, "progress": progress}
        if given.lambada:
            passages = lambada.read_passages(files.path(given.lambada), tokenizer)
            return lambada.evaluate_passages(
                scores, passages, config, name=given.lambada, **how
            ).report()
        assert given.hellaswag
        style = given.hellaswag_style or "completion"
        questions = hellaswag.read_questions(files.path(given.hellaswag), tokenizer, style)
        return hellaswag.evaluate_questions(
            scores, questions, config, name=given.hellaswag, style=style, **how
        ).report()

    def on_text() -> str:
        eot = tokenizer.eot if packed else None
        eval_step = functools.partial(train_step.eval_step, config=config, compute=compute, eot=eot)
        params = strategy.to_devices(loaded.params)
        losses = functools.partial(strategy.map_eval_step(eval_step), params)
        how: Any = {"batch_size": batch_size, "stride": given.stride, "progress": progress}
        if given.wikitext:
            read = wikitext.read_wikitext(files.path(given.wikitext), tokenizer)
            return wikitext.evaluate_wikitext(losses, read, config, **how).report()
        if given.text:
            text = perplexity.read_text(given.text, tokenizer, metadata.config.data.end_of_text)
        elif not (folder := given.data_dir or metadata.config.data.dir):
            raise UserError("these weights have no data of their own; name a text with --text")
        else:
            split, fingerprint = given.split or "val", metadata.data_fingerprint
            text = perplexity.read_split(files.path(folder), split, tokenizer, fingerprint)
        return perplexity.evaluate_text(losses, text, config, **how).report()

    (what,) = given.asked()
    evaluate = {"tasks": on_tasks, "lambada": on_questions, "hellaswag": on_questions}
    highest = "highest" if given.precision == "float32" else "default"
    with jax.default_matmul_precision(highest):
        report = evaluate.get(what, on_text)()
    if setup.is_main_host():
        print(f"{run_dir}, step {loaded.step}, in {given.precision}, on {report}")
